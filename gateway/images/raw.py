"""A disk whose bytes lie in a file as they are: a raw image, or a fixed VHD without its footer.

The size is fixed at opening and nothing is written beyond it, so a fixed VHD's footer stays untouched.
Holes of the file are holes of the disk.
"""

import errno
import os
import threading
from collections.abc import Iterator
from os import RWF_NOWAIT, preadv

from gateway.images.disk import (
    Extent,
    ExtentKind,
    FileRange,
    Hole,
    Reader,
    check_range,
    check_writable,
    merge_extents,
)
from gateway.images.errors import CorruptImage
from gateway.images.files import FILES, Buffer, FileCalls, next_data, next_hole

_FAR = 1 << 62  # beyond any file


class RawDisk:
    """A `Disk` over the first `size` bytes of `fd`, which it owns."""

    def __init__(self, fd: int, size: int, *, read_only: bool, path: str, files: FileCalls = FILES) -> None:
        self.size = size
        self.read_only = read_only
        self._fd = fd
        self._path = path
        self._files = files
        self._flush_lock = threading.Lock()
        self._dirty = False
        self._failed: OSError | None = None
        self._run = DataRun()
        self._closed = False

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        """Fill `buf` with the bytes at `offset`."""
        length = len(buf)
        check_range(offset, length, self.size)
        if os.preadv(self._fd, (buf,), offset) != length:
            read_range(self._fd, memoryview(buf), offset, self._path)

    def reader(self, *, nowait: bool = False) -> Reader:
        """Return `pread_into` for who knows that a range lies on the disk; see FileDisk."""
        fd, path = self._fd, self._path

        def read_at_hand(buf: bytearray | memoryview, offset: int) -> None:
            if preadv(fd, (buf,), offset, RWF_NOWAIT) != len(buf):
                raise not_at_hand()

        def read(buf: bytearray | memoryview, offset: int) -> None:
            if preadv(fd, (buf,), offset) != len(buf):
                read_range(fd, memoryview(buf), offset, path)

        return read_at_hand if nowait else read

    def pwrite(self, buf: Buffer, offset: int) -> None:
        """Write `buf` at `offset`. Durable only after `flush`."""
        check_writable(self.read_only)
        check_range(offset, len(buf), self.size)
        self._files.pwrite(self._fd, buf, offset)
        self._dirty = True  # only now: a flush that runs meanwhile must not take this write as its own

    def zero(self, offset: int, length: int, *, trim: bool) -> None:
        """Make a range read as zeroes: a hole with `trim`, written zeroes without."""
        check_writable(self.read_only)
        check_range(offset, length, self.size)
        if trim:
            self._files.punch(self._fd, offset, length)
        else:
            self._files.write_zeroes(self._fd, offset, length)
        self._dirty = True

    def copy_in(self, offset: int, source_fd: int, source_offset: int, length: int) -> None:
        """Copy a range of another file to `offset`; holes replace what was there."""
        check_writable(self.read_only)
        check_range(offset, length, self.size)
        self._files.copy_range(source_fd, source_offset, self._fd, offset, length)
        self._dirty = True

    def flush(self) -> None:
        """Make every completed write durable.

        A sync that failed fails for good: the kernel reports a lost page once, and a second sync would lie.
        """
        with self._flush_lock:  # who flushes while another sync runs has to wait for it: it may be his
            if self._failed is not None:
                raise OSError(
                    self._failed.errno, f"{self._path}: an earlier sync failed: {self._failed.strerror}"
                )
            if self._dirty:
                self._dirty = False
                try:
                    self._files.datasync(self._fd)
                except OSError as error:
                    self._failed = error
                    raise
                except MemoryError:
                    self._dirty = True
                    raise

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield the data and the holes of the range."""
        check_range(offset, length, self.size)
        run = self._run if self.read_only else DataRun()
        return merge_extents(file_extents(self._fd, offset, length, offset, ExtentKind.HOLE, run=run))

    def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        """Yield where the bytes of the range lie."""
        for extent in self.extents(offset, length):
            if extent.kind is ExtentKind.DATA:
                yield FileRange(self._fd, extent.offset, extent.length)
            else:
                yield Hole(extent.length)

    def close(self) -> None:
        """Flush what was written and close the file."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            os.close(self._fd)


def read_range(fd: int, view: memoryview, offset: int, path: str) -> None:
    """Fill `view` from `offset`. Raises CorruptImage when the file ends first."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, (view[done:],), offset + done)
        if count == 0:
            raise CorruptImage(path, "the file was cut shorter while it was open")
        done += count


def not_at_hand() -> BlockingIOError:
    """What a reader that doesn't wait raises."""
    return BlockingIOError(errno.EAGAIN, "the bytes are not in memory")


class DataRun:
    """The stretch of data that was last found in a file, so that its end is looked for once.

    A kernel looks for the next hole page by page or extent by extent, however far it is. To be kept only as
    long as nobody makes holes.
    """

    __slots__ = ("_run",)

    def __init__(self) -> None:
        self._run = (0, 0)

    def next_data(self, fd: int, offset: int, stop: int) -> int:
        """Return the first offset in [offset, stop) that is no hole, or `stop`."""
        first, last = self._run
        return offset if first <= offset < last else next_data(fd, offset, stop)

    def next_hole(self, fd: int, offset: int, stop: int) -> int:
        """Return the first offset in [offset, stop) that is a hole, or `stop`."""
        first, last = self._run
        if not first <= offset < last:
            last = next_hole(fd, offset, _FAR)
            self._run = (offset, last)
        return min(last, stop)


def file_extents(
    fd: int, position: int, length: int, offset: int, hole: ExtentKind, *, run: DataRun
) -> Iterator[tuple[int, int, ExtentKind]]:
    """Yield (disk offset, length, kind) for a range of a file that backs the disk from `offset` on."""
    stop = position + length
    shift = offset - position
    while position < stop:
        data = run.next_data(fd, position, stop)
        if data > position:
            yield position + shift, data - position, hole
        if data < stop:
            position = run.next_hole(fd, data, stop)
            if position <= data:  # a file that changes meanwhile; what is left counts as data
                position = stop
            yield data + shift, position - data, ExtentKind.DATA
        else:
            position = stop
