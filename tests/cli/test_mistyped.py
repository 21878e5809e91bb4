"""Arguments as they come from variables that were never set, and from file systems that allow any byte."""

import os
from pathlib import Path

import pytest

from tests.cli.test_transfers import error
from tests.conftest import RunningGateway

MIB = 1 << 20


@pytest.fixture
def disk(house: RunningGateway, request: pytest.FixtureRequest) -> str:
    """The uuid of a new disk of 2 MiB."""
    return house.run("vdi-create", request.node.name[:100], "2MiB").stdout.strip()


def test_an_empty_name_is_not_that_of_a_disk_without_a_name(house: RunningGateway, tmp_path: Path) -> None:
    nameless = house.run("vdi-create", "", "2MiB").stdout.strip()
    for arguments in (
        ("vdi-destroy", "uuid="),
        ("vdi-destroy", ""),
        ("vdi-export", "", str(tmp_path / "out")),
        ("vdi-copy", nameless, "--into", ""),
        ("sr-forget", ""),
        ("vdi-create", "x", "2MiB", "--sr", ""),
    ):
        assert "is empty; " in error(house.run(*arguments), 2)
    assert nameless in house.run("vdi-list", "--minimal").stdout


@pytest.mark.parametrize("name", ["a\x01b", os.fsdecode(b"a\xffb")], ids=["control", "no UTF-8"])
def test_a_name_that_can_not_be_sent_is_told_before_anything_is_made(
    house: RunningGateway, disk: str, name: str
) -> None:
    before = house.run("vdi-list", "--minimal").stdout
    for arguments in (
        ("vdi-create", name, "2MiB"),
        ("vdi-copy", disk, f"name={name}"),
        ("vdi-clone", disk, f"new-name-label={name}"),
    ):
        assert "which is a control character or no UTF-8" in error(house.run(*arguments), 2)
    assert house.run("vdi-list", "--minimal").stdout == before


def test_a_password_that_can_not_be_sent_is_not_shown(house: RunningGateway, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\x1b[A\n")
    where = ("--url", house.url, "--password-file", str(tmp_path / "password"))
    said = error(house.run("vdi-list", *where), 2)
    assert "'\\x1b', which is a control character" in said
    assert "secret" not in said


def test_a_disk_is_no_password_file(house: RunningGateway, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    where = ("--url", house.url, "--password-file", str(tmp_path / "disk.raw"))
    assert "disk.raw is too long for a password" in error(house.run("vdi-list", *where))


def test_a_file_may_have_any_name(house: RunningGateway, disk: str, tmp_path: Path) -> None:
    for name in (b"\xff\x01.raw", "Übung \"'.raw".encode()):
        file = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
        with open(file, "wb") as opened:
            opened.write(os.urandom(2 * MIB))
        assert house.run("vdi-import", disk, file, "--quiet").returncode == 0
        assert house.run("vdi-import", "sr=disks", file, "--quiet").returncode == 0
        assert house.run("vdi-export", disk, f"{file}.out", "--quiet").returncode == 0
        assert Path(f"{file}.out").read_bytes() == Path(file).read_bytes()


def test_a_file_without_a_name_or_with_too_long_a_one_is_told_before_anything_is_fetched(
    house: RunningGateway, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the file's name is empty" in error(house.run("vdi-export", disk, ""), 2)
    assert "the file's name is empty" in error(house.run("vdi-import", disk, ""), 2)
    assert "File name too long" in error(house.run("vdi-export", disk, "n" * 250))
    assert "named like a vmdk image" in error(house.run("vdi-export", disk, "disk.vmdk"), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_that_brings_nothing_is_told(house: RunningGateway, disk: str) -> None:
    assert error(house.run("vdi-import", disk, "/dev/null")).endswith(
        "/dev/null is empty; nothing was changed"
    )
