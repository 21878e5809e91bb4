import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.slow_proxy import Proxy
from tests.conftest import RunningGateway, clean_environment, program

MIB = 1 << 20


@pytest.fixture
def disk(house: RunningGateway, request: pytest.FixtureRequest) -> str:
    """The uuid of a new disk of 32 MiB."""
    done = house.run("vdi-create", request.node.name[:100], "32MiB")
    assert done.returncode == 0, done
    return done.stdout.strip()


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A disk of 32 MiB with 4 MiB of data and an odd tail."""
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        file.truncate(32 * MIB)
        for offset in (0, 9 * MIB + 4096, 32 * MIB - MIB):
            file.seek(offset)
            file.write(os.urandom(MIB))
        file.seek(20 * MIB)
        file.write(os.urandom(4096))
    return path


def remote(house: RunningGateway, url: str) -> tuple[str, ...]:
    return ("--url", url, "--password-file", str(house.state_dir / "admin-password"))


def lines(done: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def error(done: "subprocess.CompletedProcess[str]", code: int = 1) -> str:
    assert done.returncode == code, done
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(said) == 1, done.stderr
    return said[0]


@pytest.mark.parametrize("door", ["socket", "http", "https"])
def test_a_sparse_disk_comes_back_as_it_was(
    house: RunningGateway, disk: str, sparse: Path, tmp_path: Path, door: str
) -> None:
    urls = {"http": house.url, "https": house.https_url}
    where = remote(house, urls[door]) if door in urls else ()
    done = house.run("vdi-import", f"uuid={disk}", f"filename={sparse}", *where)
    assert (done.returncode, done.stdout) == (0, ""), done
    last = lines(done)[-1]
    assert (last["state"], last["bytes"], last["total"]) == ("done", 32 * MIB, 32 * MIB)
    assert last["physical_bytes"] == 3 * MIB + 4096
    out = tmp_path / "out.raw"
    done = house.run("vdi-export", f"uuid={disk}", f"filename={out}", "--quiet", *where)
    assert (done.returncode, done.stdout, "{" in done.stderr) == (0, "", False), done
    assert out.read_bytes() == sparse.read_bytes()
    assert out.stat().st_blocks * 512 <= 4 * MIB
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.raw"]


def test_pipes_carry_a_disk_both_ways(house: RunningGateway, disk: str, sparse: Path) -> None:
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    command = [program(), "vdi-import", disk, "-", "--quiet"]
    subprocess.run(command, input=sparse.read_bytes(), env=environment, check=True)
    command = [program(), "vdi-export", disk, "-", "--quiet"]
    assert subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout == (
        sparse.read_bytes()
    )


def test_stdout_by_its_path_is_stdout_also_where_it_is_a_file(
    house: RunningGateway, disk: str, tmp_path: Path
) -> None:
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    with (tmp_path / "out").open("wb") as out:
        out.write(b"before")
        out.flush()
        command = [program(), "vdi-export", disk, "/dev/stdout", "--quiet"]
        assert subprocess.run(command, stdout=out, env=environment, check=False).returncode == 0
    assert (tmp_path / "out").read_bytes() == b"before" + bytes(32 * MIB)


@pytest.mark.parametrize(
    ("sent", "arguments", "words"),
    [
        (5 * MIB, (), f"ended after {5 * MIB} bytes, the disk has {32 * MIB}"),
        (32 * MIB + 1, (), "has more than the"),
        (5 * MIB, ("--size", "6MiB"), f"ended after {5 * MIB} of {6 * MIB} bytes"),
        (6 * MIB + 1, ("--size", "6MiB"), "has more than"),
        (MIB, ("--size", "33MiB"), "vdi-resize"),
    ],
)
def test_a_pipe_of_another_length_changes_nothing(
    house: RunningGateway, disk: str, sent: int, arguments: tuple[str, ...], words: str
) -> None:
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    command = [program(), "vdi-import", disk, "-", "--quiet", *arguments]
    done = subprocess.run(command, input=b"x" * sent, env=environment, capture_output=True, check=False)
    assert (done.returncode, words in done.stderr.decode()) == (1, True), done
    content = subprocess.run(
        [program(), "vdi-export", disk, "-", "--quiet"], env=environment, capture_output=True, check=True
    )
    assert not content.stdout.strip(b"\0")


def test_a_shorter_file_leaves_the_rest_as_it_was(
    house: RunningGateway, disk: str, sparse: Path, tmp_path: Path
) -> None:
    assert house.run("vdi-import", disk, str(sparse)).returncode == 0
    (tmp_path / "short").write_bytes(b"y" * MIB)
    done = house.run("vdi-import", disk, str(tmp_path / "short"))
    assert "the rest of the disk stays as it is" in lines(done)[0]["note"]
    assert house.run("vdi-export", disk, str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_bytes() == b"y" * MIB + sparse.read_bytes()[MIB:]


def test_what_cannot_be_imported_is_told_in_one_line(
    house: RunningGateway, disk: str, tmp_path: Path
) -> None:
    large, image, empty = tmp_path / "large", tmp_path / "image.qcow2", tmp_path / "empty"
    large.touch()
    os.truncate(large, 33 * MIB)
    image.write_bytes(b"QFI\xfb" + bytes(MIB))
    empty.touch()
    assert "vdi-resize" in error(house.run("vdi-import", disk, str(large)))
    assert "its version is 0" in error(house.run("vdi-import", disk, str(image)))
    assert "either a disk" in error(house.run("vdi-import", disk, str(image), "sr=disks"), 2)
    assert "--format" in error(house.run("vdi-import", disk, str(image), "format=tar"), 2)
    assert "--size" in error(house.run("vdi-import", "-", "sr=disks"), 2)
    assert "there is no SR" in error(house.run("vdi-import", str(image), "sr=nowhere"))
    assert "is empty" in error(house.run("vdi-import", disk, str(empty)))
    assert "No such file" in error(house.run("vdi-import", disk, str(tmp_path / "none")))
    assert "is a directory" in error(house.run("vdi-import", disk, str(tmp_path)))
    assert "no disk 'nobody'" in error(house.run("vdi-import", "nobody", str(image), "--format", "raw"))
    assert house.run("vdi-import", disk, str(image), "--format", "raw").returncode == 0


@pytest.mark.parametrize("form", ["qcow2", "vpc", "fixed", "vmdk", "vhdx"])
def test_an_image_is_known_by_its_file(
    house: RunningGateway, disk: str, sparse: Path, tmp_path: Path, form: str
) -> None:
    driver, image = {"fixed": "vpc"}.get(form, form), tmp_path / "image"
    options = {"fixed": ["-o", "subformat=fixed,force_size=on"], "vpc": ["-o", "force_size=on"]}
    command = ["qemu-img", "convert", "-f", "raw", "-O", driver, *options.get(form, [])]
    subprocess.run([*command, str(sparse), str(image)], check=True)
    done = house.run("vdi-import", f"uuid={disk}", f"filename={image}", "--quiet")
    assert (done.returncode, done.stdout) == (0, ""), done
    assert house.run("vdi-export", disk, str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_bytes() == sparse.read_bytes()


def test_a_new_disk_is_made_of_an_image_from_a_pipe_or_a_file(
    house: RunningGateway, sparse: Path, tmp_path: Path
) -> None:
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    image = tmp_path / "gold.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(sparse), str(image)], check=True)
    (sr,) = json.loads(house.run("sr-list", "--json").stdout)
    piped = subprocess.run(
        [program(), "vdi-import", "-", f"sr={sr['uuid']}", "format=qcow2", "name=piped", "--quiet"],
        input=image.read_bytes(),
        env=environment,
        capture_output=True,
        check=True,
    )
    filed = house.run("vdi-import", str(image), f"sr={sr['name_label']}", "--quiet")
    for uuid, name in ((piped.stdout.decode().strip(), "piped"), (filed.stdout.strip(), "gold.qcow2")):
        (row,) = json.loads(house.run("vdi-list", "--json", f"uuid={uuid}").stdout)
        assert row["name_label"] == name
        assert house.run("vdi-export", uuid, str(tmp_path / name)[:-1], "--quiet").returncode == 0
        assert Path(str(tmp_path / name)[:-1]).read_bytes() == sparse.read_bytes()


def test_the_gateways_refusal_is_told(house: RunningGateway, disk: str, sparse: Path) -> None:
    assert house.run("vdi-param-set", disk, "read-only=true").returncode == 0
    said = error(house.run("vdi-import", disk, str(sparse)))
    assert "status 409" in said
    assert "read-only" in said
    pending = house.run("task-list", "--minimal", "status=pending", "name-label=vdi-import")
    assert pending.stdout == "\n"


def test_a_file_that_exists_is_replaced_by_force_only(
    house: RunningGateway, disk: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert "--force" in error(house.run("vdi-export", disk, str(out)))
    assert out.read_text() == "mine"
    assert house.run("vdi-export", disk, str(out), "--force").returncode == 0
    assert out.stat().st_size == 32 * MIB


def test_a_broken_export_goes_on_by_itself(
    house: RunningGateway, disk: str, sparse: Path, tmp_path: Path
) -> None:
    assert house.run("vdi-import", disk, str(sparse)).returncode == 0
    with Proxy(house.url, cut_after=10 * MIB, cuts=2) as proxy:
        done = house.run("vdi-export", disk, str(tmp_path / "out"), *remote(house, proxy.url))
    assert done.returncode == 0, done
    assert proxy.cut == 2
    notes = [line["note"] for line in lines(done) if "note" in line]
    assert len(notes) == 2
    assert re.search(r"trying again in 0\.5 s at [1-9]\d+ bytes", notes[0]), notes
    assert (tmp_path / "out").read_bytes() == sparse.read_bytes()


def broken_export(house: RunningGateway, disk: str, target: Path) -> int:
    """An export that was killed by Ctrl-C after some megabytes; how many bytes it kept."""
    with Proxy(house.url, hold_after=12 * MIB) as proxy:
        environment = clean_environment()
        process = subprocess.Popen(
            [program(), "vdi-export", disk, str(target), *remote(house, proxy.url)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert proxy.held.wait(30)
        deadline = time.monotonic() + 30
        part = target.with_name(target.name + ".part")
        while not part.exists() or part.stat().st_blocks * 512 < 8 * MIB:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert not target.exists()
    kept = re.search(r"(\d+) bytes are kept in", said)
    assert kept is not None, said
    return int(kept[1])


def test_the_same_command_goes_on_with_an_interrupted_export(
    house: RunningGateway, disk: str, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(os.urandom(32 * MIB))
    assert house.run("vdi-import", disk, str(tmp_path / "source")).returncode == 0
    out = tmp_path / "out"
    kept = broken_export(house, disk, out)
    # What was being written when the signal came counts as blocks of the file, but not as kept.
    assert 4 * MIB <= kept < 32 * MIB
    done = house.run("vdi-export", disk, str(out))
    assert done.returncode == 0, done
    assert f"going on with {out} at {kept} bytes" in lines(done)[0]["note"]
    assert out.read_bytes() == (tmp_path / "source").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_an_export_that_has_all_bytes_already_ends_well_and_its_task_too(
    house: RunningGateway, disk: str, tmp_path: Path
) -> None:
    source = os.urandom(32 * MIB)
    (tmp_path / "source").write_bytes(source)
    assert house.run("vdi-import", disk, str(tmp_path / "source")).returncode == 0
    broken_export(house, disk, tmp_path / "out")
    (tmp_path / "out.part").write_bytes(source)
    note = tmp_path / "out.part.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "offset": len(source)}))
    before = {task["uuid"] for task in json.loads(house.run("task-list", "--json").stdout)}
    done = house.run("vdi-export", disk, str(tmp_path / "out"))
    assert done.returncode == 0, done
    assert (tmp_path / "out").read_bytes() == source
    tasks = json.loads(house.run("task-list", "--json").stdout)
    new = {(task["name_label"], task["status"]) for task in tasks if task["uuid"] not in before}
    assert new == {("vdi-export", "success")}


def test_an_export_of_a_disk_that_has_changed_begins_anew(
    house: RunningGateway, disk: str, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(os.urandom(32 * MIB))
    assert house.run("vdi-import", disk, str(tmp_path / "source")).returncode == 0
    out = tmp_path / "out"
    broken_export(house, disk, out)
    (tmp_path / "source").write_bytes(os.urandom(16 * MIB) + bytes(16 * MIB))
    assert house.run("vdi-import", disk, str(tmp_path / "source")).returncode == 0
    done = house.run("vdi-export", disk, str(out))
    assert any("beginning anew" in line.get("note", "") for line in lines(done)), done
    assert out.read_bytes() == (tmp_path / "source").read_bytes()
    assert out.stat().st_blocks * 512 <= 17 * MIB


def test_a_full_disk_of_the_client_is_told_and_the_part_is_kept(
    house: RunningGateway, disk: str, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(os.urandom(32 * MIB))
    assert house.run("vdi-import", disk, str(tmp_path / "source")).returncode == 0
    out = tmp_path / "out"
    command = f"trap '' XFSZ; ulimit -f {20 << 10}; exec {program()} vdi-export {disk} {out} --progress none"
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert str(out) in error(done)
    assert "Traceback" not in done.stderr
    assert house.run("vdi-export", disk, str(out)).returncode == 0
    assert out.read_bytes() == (tmp_path / "source").read_bytes()


def test_a_gateway_that_is_killed_in_an_import_is_told(gateway: RunningGateway, tmp_path: Path) -> None:
    assert gateway.run("sr-create", str(tmp_path / "disks")).returncode == 0
    uuid = gateway.run("vdi-create", "disk", "32MiB").stdout.strip()
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(gateway.state_dir)}
    process = subprocess.Popen(
        [program(), "vdi-import", uuid, "-", "--quiet"],
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(b"x" * 4 * MIB)
    process.stdin.flush()
    while gateway.call("task.get_all") == []:
        time.sleep(0.01)
    gateway.kill()
    _, said = process.communicate(b"y" * 28 * MIB, timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in said
    assert said.count(b"\n") == 1, said


def test_a_disk_grows_keeps_its_content_and_does_not_shrink(
    house: RunningGateway, disk: str, sparse: Path, tmp_path: Path
) -> None:
    assert house.run("vdi-import", disk, str(sparse)).returncode == 0
    done = house.run("vdi-resize", f"uuid={disk}", "disk-size=65MiB")
    assert done.returncode == 0, done
    assert "rounded up" in done.stderr
    assert house.run("vdi-export", disk, str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_bytes() == sparse.read_bytes() + bytes(34 * MIB)
    assert "can only become larger" in error(house.run("vdi-resize", disk, "1MiB"))
