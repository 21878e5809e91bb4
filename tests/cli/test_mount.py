"""The arguments of `vdi-gateway mount`, and what it says when it can't; tests/fuse_mount has the mounts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import house_in
from tests.conftest import RunningGateway, clean_environment, program, run_here


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "mnt"
    directory.mkdir()
    return directory


def refused(done: "subprocess.CompletedProcess[str]", code: int = 1) -> str:
    """The one line of a refusal."""
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("vdi-gateway mount: ")
    return done.stderr


def needs_fuse_itself() -> bool:
    return os.access("/dev/fuse", os.R_OK | os.W_OK)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "https://gateway.example:8443"], "on the gateway's own machine"),
        (["--onyl", "disk"], "--onyl"),
        (["more"], "more"),
    ],
)
def test_wrong_arguments_are_told_by_their_names(directory: Path, arguments: list[str], said: str) -> None:
    assert said in refused(run_here("mount", str(directory), *arguments), 2)


def test_a_directory_must_be_named() -> None:
    assert "DIRECTORY" in refused(run_here("mount"), 2)


@pytest.mark.skipif(not needs_fuse_itself(), reason="/dev/fuse isn't there or can't be opened")
def test_a_disk_or_a_user_that_is_not_there_is_told(house: RunningGateway, directory: Path) -> None:
    path = str(directory)
    assert "there is no disk 'nothing'" in refused(house.command("mount", path, "--only", "nothing"))
    uuids = [house.run("vdi-create", "same", "2MiB").stdout.strip() for _ in range(2)]
    house.run("vdi-snapshot", uuids[0])
    line = refused(house.command("mount", path, "--only", "same"))
    assert line.endswith(f": {', '.join(sorted(uuids))}\n")
    assert "SESSION_AUTHENTICATION_FAILED" in refused(house.command("mount", path, "--user", "nobody"))
    assert "there is no file" in refused(house.command("mount", path, "--password-file", "nothing"))
    assert "there is no disk 'nothing'" in refused(
        house.command("mount", path, "--background", "--only", "nothing")
    )


@pytest.mark.skipif(not needs_fuse_itself(), reason="/dev/fuse isn't there or can't be opened")
def test_a_log_that_can_not_be_written_is_told(tmp_path: Path, directory: Path) -> None:
    with house_in(tmp_path) as gateway:
        (gateway.state_dir / "mount.log").mkdir()
        assert "mount.log can't be written" in refused(
            gateway.command("mount", str(directory), "--background")
        )


def test_without_libfuse_there_is_a_sentence(tmp_path: Path, directory: Path) -> None:
    broken = tmp_path / "modules"
    broken.mkdir()
    (broken / "pyfuse3.py").write_text(
        "raise ImportError('libfuse3.so.3: cannot open shared object file: No such file or directory')\n"
    )
    done = subprocess.run(
        [program(), "mount", str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env={**clean_environment(), "PYTHONPATH": str(broken)},
    )
    line = refused(done)
    assert "libfuse3.so.3" in line
    assert "scripts/setup" in line


def test_no_other_command_loads_what_the_mount_needs() -> None:
    check = (
        "import sys\n"
        "from gateway.cli.main import application\n"
        "application(loaded=True)\n"
        "print([name for name in ('pyfuse3', 'trio', 'fuse_mount.operations') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
