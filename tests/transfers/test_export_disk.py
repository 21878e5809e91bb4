"""A disk as a stream of bytes, into a sink that can fail."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.images.disk import Extent, FileRange, Hole
from gateway.images.files import Buffer
from gateway.images.layout import raw_layout
from gateway.images.raw import RawDisk
from gateway.transfers import export_disk
from gateway.transfers.export_disk import DiskExport

MIB = 1 << 20


class Collected:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.data = b""
        self.calls: list[str] = []
        self.lengths: list[int] = []

    def send(self, data: bytes | bytearray | memoryview) -> None:
        self.calls.append("send")
        self.lengths.append(len(data))
        self.data += bytes(data)

    def sendfile(self, fd: int, offset: int, length: int) -> None:
        self.calls.append("sendfile")
        self.lengths.append(length)
        self.data += os.pread(fd, length, offset)

    def zeroes(self, length: int) -> None:
        self.calls.append("zeroes")
        self.lengths.append(length)
        self.data += bytes(length)

    def abort(self) -> None: ...


def disk_of(path: Path, pieces: list[tuple[int, bytes]], size: int) -> RawDisk:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    for offset, data in pieces:
        os.pwrite(fd, data, offset)
    return RawDisk(fd, size, read_only=True, path=str(path))


@pytest.fixture
def copied_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes at the end of a body are copied."""
    return lambda count: monkeypatch.setattr(export_disk, "COPIED_BYTES", count)


def test_data_goes_by_sendfile_and_holes_are_not_read(
    tmp_path: Path, copied_bytes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied_bytes(0)
    monkeypatch.setattr(export_disk, "_PIECE", MIB // 4)
    data = os.urandom(MIB)
    disk = disk_of(tmp_path / "x", [(4 * MIB, data)], 300 * MIB)
    export, sink = DiskExport(raw_layout(disk)), Collected()
    export.send(sink, 3 * MIB, 6 * MIB)
    assert sink.data == bytes(MIB) + data + bytes(MIB)
    assert sink.calls.count("sendfile") == 4
    assert max(sink.lengths) == MIB // 4
    assert export.sent == 3 * MIB
    disk.close()


def test_the_end_of_a_body_is_copied_since_the_file_may_change_before_it_is_read(
    tmp_path: Path, copied_bytes: Callable[[int], None]
) -> None:
    copied_bytes(3 * MIB + 100)
    data = os.urandom(4 * MIB)
    disk = disk_of(tmp_path / "x", [(0, data), (6 * MIB, data)], 11 * MIB)
    export, sink = DiskExport(raw_layout(disk)), Collected()
    for number in (1, 2):
        export.send(sink, 0, 11 * MIB)
        assert sink.data == (data + bytes(2 * MIB) + data + bytes(MIB)) * number
        assert export.sent == 11 * MIB * number
    by_file = [length for call, length in zip(sink.calls, sink.lengths, strict=True) if call == "sendfile"]
    copied = [length for call, length in zip(sink.calls, sink.lengths, strict=True) if call == "send"]
    # The last MiB of each body is a hole.
    assert sum(copied) == 2 * (2 * MIB + 100)
    assert sum(by_file) == 2 * (6 * MIB - 100)
    disk.close()


def test_as_much_is_copied_as_two_sockets_of_this_machine_hold() -> None:
    most = sum(
        int(Path(f"/proc/sys/net/ipv4/tcp_{name}").read_text().split()[2]) for name in ("wmem", "rmem")
    )
    assert most <= export_disk.COPIED_BYTES


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 6), (0, 3 * MIB), (MIB - 1, MIB + 1)])
def test_any_range(tmp_path: Path, start: int, stop: int) -> None:
    data = os.urandom(3 * MIB)
    disk = disk_of(tmp_path / "x", [(0, data)], len(data))
    sink = Collected()
    DiskExport(raw_layout(disk)).send(sink, start, stop)
    assert sink.data == data[start:stop]
    disk.close()


def test_a_file_that_was_cut_is_an_error_and_no_short_body(tmp_path: Path) -> None:
    class Cut:
        size = 1000
        read_only = True

        def __init__(self, fd: int) -> None:
            self.fd = fd

        def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
            yield FileRange(self.fd, offset, length)

        def pread_into(self, buf: bytearray | memoryview, offset: int) -> None: ...
        def pwrite(self, buf: Buffer, offset: int) -> None: ...
        def zero(self, offset: int, length: int, *, trim: bool) -> None: ...
        def flush(self) -> None: ...
        def extents(self, offset: int, length: int) -> Iterator[Extent]: ...  # type: ignore[empty-body]
        def close(self) -> None: ...

    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(999))
    with pytest.raises(OSError, match="ends before"):
        DiskExport(raw_layout(Cut(fd))).send(Collected(), 0, 1000)
    os.close(fd)
