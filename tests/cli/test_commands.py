import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RunningGateway, clean_environment, program


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    running = RunningGateway(tmp_path_factory.mktemp("lasting"))
    running.start()
    try:
        yield running
    finally:
        try:
            running.stop()
        finally:
            running.kill()
    assert "Traceback" not in running.log()


@pytest.fixture
def gateway(lasting: RunningGateway) -> Iterator[RunningGateway]:
    """One for all tests, which a test may stop; each finds it without an SR."""
    yield lasting
    lasting.clear()


@pytest.fixture
def with_sr(gateway: RunningGateway, tmp_path: Path) -> RunningGateway:
    done = gateway.run("sr-create", str(tmp_path / "disks"))
    assert (done.returncode, done.stderr) == (0, "")
    return gateway


def listed(gateway: RunningGateway) -> list[dict[str, object]]:
    done = gateway.run("vdi-list", "--json")
    assert done.returncode == 0, done
    disks: list[dict[str, object]] = json.loads(done.stdout)
    return disks


def refused(done: "subprocess.CompletedProcess[str]", code: int = 1) -> str:
    """The one line of a refusal."""
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_sr_create_prints_the_uuid_and_names_the_sr_after_its_directory(
    gateway: RunningGateway, tmp_path: Path
) -> None:
    done = gateway.command("sr-create", str(tmp_path / "disks"), "--json")
    assert done.returncode == 0, done
    made = json.loads(done.stdout)
    assert made["name_label"] == "disks"
    assert gateway.call("SR.get_uuid", made["ref"]) == made["uuid"]
    assert (tmp_path / "disks" / ".vdi-gateway" / "sr.json").exists()


def test_a_path_is_meant_from_where_the_command_runs(gateway: RunningGateway, tmp_path: Path) -> None:
    assert gateway.command("sr-create", "here", cwd=tmp_path).returncode == 0
    assert (tmp_path / "here").is_dir()


@pytest.mark.parametrize("place", ["no/such/parent", "file/sr", "full"])
def test_a_directory_that_cannot_become_an_sr_is_refused_by_its_path(
    gateway: RunningGateway, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    assert str(tmp_path / place) in refused(gateway.run("sr-create", str(tmp_path / place)))
    assert gateway.call("SR.get_all") == []


def test_vdi_create_prints_the_uuid_alone(with_sr: RunningGateway, tmp_path: Path) -> None:
    done = with_sr.command("vdi-create", "first", "10MiB", "--description", "ein Überrest")
    assert (done.returncode, done.stderr) == (0, "")
    uuid = done.stdout.strip()
    assert (tmp_path / "disks" / f"{uuid}.vhd").exists()
    reference = with_sr.call("VDI.get_by_uuid", uuid)
    assert with_sr.call("VDI.get_name_label", reference) == "first"
    assert with_sr.call("VDI.get_name_description", reference) == "ein Überrest"
    assert with_sr.call("VDI.get_virtual_size", reference) == str(10 << 20)


def test_vdi_create_says_when_the_size_was_rounded_up(with_sr: RunningGateway) -> None:
    done = with_sr.run("vdi-create", "odd", "3MiB")
    assert done.returncode == 0
    assert done.stderr == "the size was rounded up from 3145728 to 4194304 bytes, a multiple of 2 MiB\n"
    assert [disk["virtual_size"] for disk in listed(with_sr)] == [4 << 20]


def test_vdi_list_is_one_line_of_tabs_for_each_disk(with_sr: RunningGateway) -> None:
    uuids = {name: with_sr.run("vdi-create", name, "2MiB").stdout.strip() for name in ("b", "a")}
    lines = with_sr.run("vdi-list").stdout.splitlines()
    assert [line.split("\t")[:3] for line in lines] == [
        ["UUID", "Name", "Size"],
        [uuids["a"], "a", "2 MiB"],
        [uuids["b"], "b", "2 MiB"],
    ]


def test_which_sr_must_be_said_when_there_are_several(with_sr: RunningGateway, tmp_path: Path) -> None:
    assert with_sr.run("sr-create", str(tmp_path / "more")).returncode == 0
    line = refused(with_sr.run("vdi-create", "disk", "2MiB"))
    assert "--sr UUID" in line
    assert "(disks)" in line
    assert "(more)" in line
    assert with_sr.run("vdi-create", "disk", "2MiB", "--sr", "more").returncode == 0
    assert "'other'" in refused(with_sr.run("vdi-create", "disk", "2MiB", "--sr", "other"))


def test_without_an_sr_vdi_create_says_how_to_make_one(gateway: RunningGateway) -> None:
    assert "sr-create" in refused(gateway.run("vdi-create", "disk", "2MiB"))


def test_a_disk_is_named_by_its_uuid_in_either_case_its_reference_or_a_name_of_its_own(
    with_sr: RunningGateway,
) -> None:
    made = json.loads(with_sr.run("vdi-create", "one", "2MiB", "--json").stdout)
    twins = [with_sr.run("vdi-create", "twin", "2MiB").stdout.strip() for _ in range(2)]
    for wanted in (made["uuid"], made["uuid"].upper(), made["ref"], "one"):
        assert with_sr.run("vdi-chain", wanted).stdout.startswith(made["uuid"])
    ambiguous = refused(with_sr.run("vdi-destroy", "twin"))
    assert all(uuid in ambiguous for uuid in ("several disks are called 'twin'", *twins))
    for unknown in ("no one", made["uuid"].replace(made["uuid"][0], "x"), "OpaqueRef:" + made["uuid"]):
        assert f"there is no disk {unknown!r}" in refused(with_sr.run("vdi-destroy", unknown))
    # A name may look like a reference.
    with_sr.run("vdi-create", "OpaqueRef:one", "2MiB")
    assert with_sr.run("vdi-destroy", "OpaqueRef:one").returncode == 0


def test_a_refusal_of_the_gateway_is_its_sentence_and_its_code(with_sr: RunningGateway) -> None:
    line = refused(with_sr.run("vdi-create", "huge", "3000GiB"))
    assert "3221225472000 bytes" in line
    assert "(VDI_TOO_LARGE from VDI.create)" in line


def test_sr_attach_is_read_only_until_writable_is_said(with_sr: RunningGateway, tmp_path: Path) -> None:
    assert with_sr.run("vdi-create", "disk", "2MiB").returncode == 0
    sr = tmp_path / "disks"
    with_sr.stop()
    before = {path: path.stat().st_mtime_ns for path in sr.rglob("*")}
    other = RunningGateway(tmp_path / "other")
    other.state_dir.parent.mkdir()
    other.start()
    try:
        attached = other.run("sr-attach", str(sr))
        assert (attached.returncode, attached.stderr) == (0, "")
        assert [disk["name_label"] for disk in listed(other)] == ["disk"]
        refused(other.run("vdi-create", "more", "2MiB"))
        assert {path: path.stat().st_mtime_ns for path in sr.rglob("*")} == before
        again = other.run("sr-attach", str(sr), "--writable")
        assert (again.returncode, again.stdout) == (0, attached.stdout)
        assert other.run("vdi-create", "more", "2MiB").returncode == 0
        once_more = other.run("sr-attach", str(sr), "--writable")
        assert (once_more.returncode, once_more.stderr) == (0, "the SR is attached so already\n")
    finally:
        other.kill()


def test_an_sr_that_no_gateway_has_marked_becomes_writable_and_read_only_again(
    gateway: RunningGateway, tmp_path: Path
) -> None:
    sr = tmp_path / "of a XenServer"
    sr.mkdir()
    done = gateway.run("sr-attach", str(sr), "--name", "old")
    attached = done.stdout
    assert done.stderr == f"no disk was found in {sr}; is it the directory that the .vhd files are in?\n"
    for arguments in (["--writable"], [], []):
        again = gateway.run("sr-attach", str(sr), *arguments)
        assert (again.returncode, again.stdout) == (0, attached)
    gateway.run("sr-attach", str(sr), "--writable")
    assert gateway.run("vdi-create", "disk", "2MiB", "--sr", "old").returncode == 0


def test_an_sr_that_another_gateway_has_is_refused_and_can_be_attached_later(
    with_sr: RunningGateway, tmp_path: Path
) -> None:
    other = RunningGateway(tmp_path / "other")
    other.state_dir.parent.mkdir()
    other.start()
    try:
        assert str(with_sr.state_dir) in refused(
            other.run("sr-attach", str(tmp_path / "disks"), "--writable")
        )
        with_sr.stop()
        assert other.run("sr-attach", str(tmp_path / "disks"), "--writable").returncode == 0
    finally:
        other.kill()


def test_an_sr_that_becomes_read_only_is_told(with_sr: RunningGateway, tmp_path: Path) -> None:
    sr = str(tmp_path / "disks")
    again = with_sr.run("sr-attach", sr, "--writable")
    assert (again.returncode, again.stderr) == (0, "the SR is attached so already\n")
    done = with_sr.run("sr-attach", sr)
    assert (done.returncode, done.stdout) == (0, again.stdout)
    assert "was attached writable and is read-only from now on" in done.stderr
    assert with_sr.run("sr-list", "--minimal", "params=state").stdout == "read-only\n"


def test_a_directory_that_is_not_there_is_not_remembered(gateway: RunningGateway, tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refused(gateway.run("sr-attach", str(tmp_path / "nothing")))
    assert gateway.call("SR.get_all") == []


def test_srs_are_attached_again_after_a_restart(with_sr: RunningGateway) -> None:
    assert with_sr.run("vdi-create", "disk", "2MiB").returncode == 0
    with_sr.restart()
    assert [disk["name_label"] for disk in listed(with_sr)] == ["disk"]
    assert with_sr.run("vdi-create", "another", "2MiB").returncode == 0


def test_task_list_shows_an_upload_that_failed_and_why(with_sr: RunningGateway) -> None:
    uuid = with_sr.run("vdi-create", "disk", "2MiB").stdout.strip()
    config = with_sr.state_dir / "curl.conf"
    config.write_text(f'user = "root:{with_sr.password}"\n')
    curl = ["curl", "-sS", "--config", str(config), "-T", "-", f"{with_sr.url}/import_raw_vdi?vdi={uuid}"]
    curl += ["-H", f"Content-Length: {4 << 20}", "-H", "Transfer-Encoding:"]
    assert subprocess.run(curl, input=bytes(4 << 20), capture_output=True, check=False).returncode != 0
    (task,) = json.loads(with_sr.run("task-list", "--json").stdout)
    assert (task["status"], task["error_info"][0]) == ("failure", "VDI_TOO_SMALL")
    assert "VDI_TOO_SMALL" in with_sr.run("task-list").stdout


def remote(gateway: RunningGateway, url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [program(), "vdi-list", "--url", url, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=clean_environment()
    )


def test_a_wrong_password_is_told(gateway: RunningGateway, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wrong\n")
    line = refused(remote(gateway, gateway.url, "--password-file", str(tmp_path / "wrong")))
    assert "SESSION_AUTHENTICATION_FAILED" in line
