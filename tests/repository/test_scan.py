import os
import shutil
from pathlib import Path

import pytest

from gateway.images.vhd.create import create_differencing, create_dynamic, create_fixed
from gateway.images.vhd.image import open_vhd
from gateway.repository.directory import SRDirectory
from gateway.repository.scan import Scanner, ScanResult

A, B, C, D = (f"{number:08d}-0000-4000-8000-000000000000" for number in range(1, 5))
MIB = 1 << 20


def scan(directory: Path) -> ScanResult:
    return Scanner(SRDirectory(str(directory))).scan()


def make_child(directory: Path, child: str, parent: str) -> None:
    path = str(directory / f"{parent}.vhd")
    fd = os.open(path, os.O_RDONLY)
    try:
        create_differencing(str(directory / f"{child}.vhd"), path, open_vhd(fd, path))
    finally:
        os.close(fd)


def test_sizes_parents_and_formats_are_found(tmp_path: Path) -> None:
    create_dynamic(str(tmp_path / f"{A}.vhd"), 10 * MIB)
    make_child(tmp_path, B, A)
    create_fixed(str(tmp_path / f"{C}.vhd"), 4 * MIB)
    with open(tmp_path / f"{D}.raw", "wb") as raw:
        raw.truncate(3 * MIB)
        raw.write(b"x" * 65536)
    result = scan(tmp_path)
    assert {uuid: (image.format, image.virtual_size // MIB) for uuid, image in result.images.items()} == {
        A: ("vhd", 10),
        B: ("vhd", 10),
        C: ("vhd", 4),
        D: ("raw", 3),
    }
    assert result.images[B].parent == A
    assert result.children(A) == (B,)
    assert result.images[D].physical_utilisation == 65536
    assert not list(result.errors())


def test_one_broken_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    create_dynamic(str(tmp_path / f"{A}.vhd"), 2 * MIB)
    (tmp_path / f"{B}.vhd").write_bytes(b"nothing" * 1000)
    (tmp_path / f"{C}.vhd").symlink_to(tmp_path / f"{A}.vhd")
    os.mkfifo(tmp_path / f"{D}.vhd")
    result = scan(tmp_path)
    assert result.images[A].error is None
    assert [line.partition(":")[0] for line in result.errors()] == [f"{B}.vhd", f"{C}.vhd", f"{D}.vhd"]


def test_a_missing_parent_and_a_parent_with_another_id_are_errors_of_the_child(tmp_path: Path) -> None:
    create_dynamic(str(tmp_path / f"{A}.vhd"), 2 * MIB)
    make_child(tmp_path, B, A)
    (tmp_path / f"{A}.vhd").unlink()
    assert [*scan(tmp_path).errors()] == [f"{B}.vhd: its parent {A}.vhd is missing"]
    create_dynamic(str(tmp_path / f"{A}.vhd"), 2 * MIB)
    (error,) = scan(tmp_path).errors()
    assert f"but {A}.vhd is another disk" in error


def test_two_files_of_one_uuid_are_an_error(tmp_path: Path) -> None:
    create_dynamic(str(tmp_path / f"{A}.vhd"), 2 * MIB)
    (tmp_path / f"{A}.raw").write_bytes(bytes(512))
    (error,) = scan(tmp_path).errors()
    assert f"{A}.raw" in error
    assert f"{A}.vhd" in error


def test_names_are_sorted_into_images_journals_known_and_strange(tmp_path: Path) -> None:
    for name in (f"coalesce_{A}", f"OLD_{A}.vhd", f"{A}.cbtlog", "filelog.txt", "notes.txt", "BASE.vhd"):
        (tmp_path / name).touch()
    (tmp_path / ".vdi-gateway").mkdir()
    result = scan(tmp_path)
    assert not result.images
    assert result.journals == (f"OLD_{A}.vhd", f"coalesce_{A}")
    assert result.strange == ("BASE.vhd", "notes.txt")


def test_a_copy_of_an_image_under_another_name_is_told_with_what_it_stands_on(tmp_path: Path) -> None:
    create_dynamic(str(tmp_path / f"{A}.vhd"), 2 * MIB)
    make_child(tmp_path, B, A)
    shutil.copy(tmp_path / f"{B}.vhd", tmp_path / "before the upgrade.vhd.old")
    shutil.copy(tmp_path / f"{A}.vhd", tmp_path / "whole.vhd")
    result = scan(tmp_path)
    assert result.strange == ("before the upgrade.vhd.old", "whole.vhd")
    (error,) = result.errors()
    assert error.startswith(f"before the upgrade.vhd.old: it stands on {A}.vhd and")
    assert result.images[B].error is None


@pytest.mark.parametrize("name", [".nfs000000000008000500000001", ".fuse_hidden00000a73000005b6"])
def test_what_is_kept_of_a_file_that_went_while_it_was_open_is_no_copy(tmp_path: Path, name: str) -> None:
    create_dynamic(str(tmp_path / f"{A}.vhd"), 2 * MIB)
    make_child(tmp_path, B, A)
    (tmp_path / f"{B}.vhd").rename(tmp_path / name)
    result = scan(tmp_path)
    assert not result.strange
    assert not [*result.errors()]


def test_a_file_is_read_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counting(fd: int, path: str) -> object:
        read.append(path)
        return open_vhd(fd, path)

    monkeypatch.setattr("gateway.repository.scan.open_vhd", counting)
    path = tmp_path / f"{A}.vhd"
    create_dynamic(str(path), 2 * MIB)
    scanner = Scanner(SRDirectory(str(tmp_path)))
    scanner.scan()
    scanner.scan()
    assert len(read) == 2, "a file that was written to just now is not believed"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    scanner.scan()
    scanner.scan()
    assert len(read) == 3
    os.utime(path, (1_000_000_001, 1_000_000_001))
    scanner.scan()
    assert len(read) == 4
    assert scanner.scan_one(str(path)).virtual_size == 2 * MIB


def test_to_look_at_one_image_its_directory_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_dynamic(str(tmp_path / f"{A}.vhd"), 2 * MIB)
    make_child(tmp_path, B, A)
    scanner = Scanner(SRDirectory(str(tmp_path)))
    monkeypatch.delattr("os.listdir")
    monkeypatch.delattr("os.scandir")
    assert scanner.scan_one(str(tmp_path / f"{B}.vhd")).parent == A
    (tmp_path / f"{A}.vhd").unlink()
    assert "is missing" in (scanner.scan_one(str(tmp_path / f"{B}.vhd")).error or "")
