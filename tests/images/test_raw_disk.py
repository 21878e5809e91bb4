import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.images.disk import Disk, Extent, ExtentKind, FileRange, Hole
from gateway.images.errors import CorruptImage
from gateway.images.files import Buffer, FileCalls
from gateway.images.vhd.create import create_dynamic
from tests.images.disks import open_leaf, put, read, read_by_segments

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    with path.open("wb") as file:
        file.seek(MIB)
        file.write(b"d" * 8192)
        file.truncate(4 * MIB)
    return path


def kinds(disk: Disk) -> list[Extent]:
    return list(disk.extents(0, disk.size))


def test_holes_of_the_file_are_holes_of_the_disk(image: Path) -> None:
    disk = open_leaf(image)
    assert kinds(disk) == [
        Extent(0, MIB, ExtentKind.HOLE),
        Extent(MIB, 8192, ExtentKind.DATA),
        Extent(MIB + 8192, 3 * MIB - 8192, ExtentKind.HOLE),
    ]
    parts = list(disk.segments(MIB + 100, 2 * MIB))
    assert [type(part) for part in parts] == [FileRange, Hole]
    assert [part.length for part in parts] == [8092, 2 * MIB - 8092]
    assert read_by_segments(disk, 0, 4 * MIB) == image.read_bytes()
    disk.close()


def test_writes_zeroes_and_trims_read_back(image: Path) -> None:
    disk = open_leaf(image, writable=True)
    disk.pwrite(memoryview(b"w" * 5000), 10)
    disk.zero(MIB, 4096, trim=True)
    disk.zero(MIB + 4096, 4096, trim=False)
    disk.flush()
    assert read(disk, 0, 5020) == bytes(10) + b"w" * 5000 + bytes(10)
    assert not any(read(disk, MIB, 8192))
    assert [extent.kind for extent in kinds(disk)][:3] == [ExtentKind.DATA, ExtentKind.HOLE, ExtentKind.DATA]
    disk.close()
    assert image.stat().st_size == 4 * MIB


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (4 * MIB, 1), (4 * MIB - 1, 2)])
def test_the_disk_ends_where_the_file_ended_at_opening(image: Path, offset: int, length: int) -> None:
    disk = open_leaf(image, writable=True)
    for action in (
        lambda: disk.pread_into(bytearray(length), offset),
        lambda: disk.pwrite(bytes(length), offset),
        lambda: disk.zero(offset, length, trim=True),
        lambda: list(disk.extents(offset, length)),
    ):
        with pytest.raises(ValueError, match="not on a disk"):
            action()
    disk.close()


def test_a_read_only_disk_refuses_to_change(image: Path) -> None:
    disk = open_leaf(image)
    with pytest.raises(PermissionError):
        disk.pwrite(b"x", 0)
    with pytest.raises(PermissionError):
        disk.zero(0, 1, trim=True)
    disk.close()


def test_a_file_cut_shorter_is_an_error_and_no_stale_bytes(image: Path) -> None:
    disk = open_leaf(image)
    os.truncate(image, MIB)
    with pytest.raises(CorruptImage, match="cut shorter"):
        read(disk, MIB - 10, 20)
    disk.close()


def test_a_sync_that_failed_fails_for_good_and_the_descriptor_is_closed(image: Path) -> None:
    class Failing(FileCalls):
        def datasync(self, fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = len(os.listdir("/proc/self/fd"))
    disk = open_leaf(image, writable=True, files=Failing())
    disk.flush()
    disk.pwrite(b"x", 0)
    with pytest.raises(OSError, match="Input/output error"):
        disk.flush()
    with pytest.raises(OSError, match="earlier sync failed"):
        disk.close()
    assert len(os.listdir("/proc/self/fd")) == before


class Counted(FileCalls):
    """Does something at first: before the data of the write, or before the sync of the flush."""

    def __init__(self, call: str, what: Callable[[], None]) -> None:
        self.syncs = 0
        self._at_first = {call: what}

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        self._at_first.pop("pwrite", lambda: None)()
        super().pwrite(fd, data, offset)

    def datasync(self, fd: int) -> None:
        self.syncs += 1
        super().datasync(fd)
        self._at_first.pop("datasync", lambda: None)()


def test_each_change_is_synced_by_the_flush_after_it_and_not_by_one_beside_it(image: Path) -> None:
    def flush() -> None:
        disk.flush()

    beside = Counted("pwrite", flush)
    disk = open_leaf(image, writable=True, files=beside)
    disk.pwrite(b"w", 0)  # a flush runs before the byte is written
    assert beside.syncs == 0
    disk.flush()
    assert beside.syncs == 1
    for number, trim in enumerate((True, False), 2):
        disk.zero(0, 4096, trim=trim)
        disk.flush()
        assert beside.syncs == number
    disk.close()
    within = Counted("datasync", lambda: disk.pwrite(b"w", 0))
    disk = open_leaf(image, writable=True, files=within)
    disk.pwrite(b"w", 0)
    disk.flush()  # a byte is written while it syncs
    disk.flush()
    assert within.syncs == 2
    disk.close()


@pytest.mark.parametrize("kind", ["raw", "dynamic"])
def test_a_flush_beside_another_one_waits_for_its_sync(tmp_path: Path, image: Path, kind: str) -> None:
    if kind == "dynamic":
        image = tmp_path / "full.vhd"
        create_dynamic(str(image), 2 * MIB)
        put(image, (0, b"o" * 2 * MIB))
    outcomes: list[str] = []

    class Failing(FileCalls):
        def datasync(self, fd: int) -> None:
            beside.start()
            beside.join(timeout=0.3)  # who does not wait is done by then, and was told that all is durable
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def flush() -> None:
        try:
            disk.flush()
            outcomes.append("durable")
        except OSError as error:
            outcomes.append(str(error))

    beside = threading.Thread(target=flush)
    disk = open_leaf(image, writable=True, files=Failing())
    disk.pwrite(b"w" * 4096, 0)
    flush()
    beside.join()
    assert outcomes[0] == f"[Errno {errno.EIO}] {os.strerror(errno.EIO)}"
    assert "sync failed" in outcomes[1]
    with pytest.raises(OSError, match="sync failed"):
        disk.close()
