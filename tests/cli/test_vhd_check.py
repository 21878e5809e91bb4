import json
import subprocess
from pathlib import Path

from gateway.images.file_locks import FileUse, lock_file
from gateway.images.vhd.create import create_dynamic
from tests.conftest import clean_environment, program

NAME = "9e4de8b1-5d3c-4a61-9d6a-3a5f0e1c2b70.vhd"


def check(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [program(), "vhd-check", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean_environment(),
    )


def make_image(directory: Path) -> Path:
    path = directory / NAME
    create_dynamic(str(path), 8 << 20)
    return path


def damage_the_footer_at_the_end(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-440, 2)
        file.write(b"\xff")


def test_a_sound_file_and_its_directory_pass(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    done = check(path)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"{path}: 1 file checked, 0 errors, 0 warnings\n",
        "",
    )
    done = check(tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}: 1 file checked, 0 errors, 0 warnings\n")


def test_a_damaged_file_fails_and_says_that_it_can_be_repaired(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    damage_the_footer_at_the_end(path)
    before = path.read_bytes()
    done = check(tmp_path)
    assert done.returncode == 1
    assert f"error: {path}: " in done.stdout
    assert "--repair repairs 1 of them" in done.stdout
    assert path.read_bytes() == before


def test_repair_mends_a_file_in_a_directory(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    sound = path.read_bytes()
    damage_the_footer_at_the_end(path)
    done = check("--repair", tmp_path)
    assert done.returncode == 0, done
    assert f"repaired: {path}: " in done.stdout
    assert path.read_bytes() == sound
    assert check(tmp_path).returncode == 0


def test_a_file_in_use_keeps_no_other_from_being_repaired(tmp_path: Path) -> None:
    used = make_image(tmp_path)
    other = tmp_path / f"a{NAME[1:]}"
    create_dynamic(str(other), 8 << 20)
    for path in (used, other):
        damage_the_footer_at_the_end(path)
    with used.open("rb") as reader:
        lock_file(reader.fileno(), FileUse.READ, str(used))
        done = check("--repair", tmp_path)
    assert done.returncode == 1
    assert f"repaired: {other}: " in done.stdout
    assert f"error: {used}: " in done.stdout
    why = "another program lets nobody write it"
    assert done.stderr == f"vdi-gateway vhd-check: not repaired: {used}: {why}\n"
    assert check("--repair", tmp_path).returncode == 0


def test_json_names_every_problem(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    damage_the_footer_at_the_end(path)
    done = check("--json", path)
    assert done.returncode == 1
    (report,) = json.loads(done.stdout)
    assert report["path"] == str(path)
    assert [problem["repairable"] for problem in report["problems"]] == [True]


def test_a_path_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = check(tmp_path / "nothing.vhd")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vdi-gateway vhd-check: {tmp_path}/nothing.vhd: No such file or directory\n"


def test_it_loads_neither_trio_nor_the_database() -> None:
    code = (
        "import sys\n"
        "import gateway.cli.main, gateway.cli.check, gateway.cli.sr, gateway.cli.vdi, gateway.cli.task\n"
        "print(*sorted({'trio', 'sqlalchemy', 'h11', 'structlog', 'cryptography'} & set(sys.modules)))\n"
    )
    python = Path(program()).parent / "python"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
