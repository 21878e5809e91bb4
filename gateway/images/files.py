"""The one seam for every file call that changes something.

Images and repositories change files only through a `FileCalls`, so that a test can record the calls, stop
after any of them, and drop or tear those that no sync has made durable. Reads go straight to `os`: they
change nothing that a crash could leave behind. All calls block; all are safe from several threads.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, NamedTuple, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

ZEROES: Final = memoryview(bytes(1 << 20))
"""To write, or to copy from; a part of it is no copy."""

_FALLOC_FL_KEEP_SIZE: Final = 0x01
_FALLOC_FL_PUNCH_HOLE: Final = 0x02
_SYNC_FILE_RANGE_WRITE: Final = 0x02
_FICLONE: Final = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_COPY_PIECE: Final = 1 << 20
_NOT_OFFERED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV})

_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range: Final = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class FileIdentity(NamedTuple):
    """What a file is, whatever it is called: locks and leases belong to this."""

    device: int
    inode: int


def identity_of(fd: int) -> FileIdentity:
    """Return the identity of the file open as `fd`."""
    status = os.fstat(fd)
    return FileIdentity(status.st_dev, status.st_ino)


def length_of(fd: int) -> int:
    """Return the bytes of a file or of a block device, whose status tells no size.

    It moves the file position, which nothing here uses.
    """
    return os.lseek(fd, 0, os.SEEK_END)


def close_all(descriptors: Iterable[int]) -> None:
    """Close every one of them, and raise the first failure only then: what stays open stays locked.

    A close gives the descriptor back whatever it says. Network file systems tell here what they could not
    write, which a sync has told already.
    """
    failures: list[OSError] = []
    for fd in descriptors:
        try:
            os.close(fd)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def pread_exactly(fd: int, length: int, offset: int) -> bytes:
    """Read up to `length` bytes; fewer only if the file ends."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def next_data(fd: int, offset: int, stop: int) -> int:
    """Return the first offset in [offset, stop) that is no hole of the file, or `stop`.

    File systems that know no holes answer that everything is data.
    """
    try:
        return min(os.lseek(fd, offset, os.SEEK_DATA), stop)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return stop
        if error.errno in _NOT_OFFERED:
            return offset
        raise


def next_hole(fd: int, offset: int, stop: int) -> int:
    """Return the first offset in [offset, stop) that is a hole of the file, or `stop`."""
    try:
        return min(os.lseek(fd, offset, os.SEEK_HOLE), stop)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return offset  # beyond the end of the file
        if error.errno in _NOT_OFFERED:
            return stop
        raise


class FileCalls:
    """The file calls themselves. Every failure is an OSError."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """Open `path`; the descriptor is never inherited by a child process."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        """Close `fd`."""
        os.close(fd)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of `data` (bytes) at `offset`."""
        written = os.pwrite(fd, data, offset)
        if written == len(data):
            return
        view = memoryview(data)
        while written < len(view):
            written += os.pwrite(fd, view[written:], offset + written)

    def write_zeroes(self, fd: int, offset: int, length: int) -> None:
        """Make the range read as zeroes and take its space."""
        stop = offset + length
        for position in range(offset, stop, len(ZEROES)):
            self.pwrite(fd, ZEROES[: stop - position], position)

    def truncate(self, fd: int, size: int) -> None:
        """Make the file `size` bytes long."""
        os.ftruncate(fd, size)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Make the range read as zeroes and give its space back; the file's length stays.

        Where that cannot be done, zeroes are written instead: by a file system that knows no holes, or on a
        block device for a range that is not made of its sectors.
        """
        if length <= 0:
            return
        while _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code not in _NOT_OFFERED:
                raise OSError(code, os.strerror(code))
            self.write_zeroes(fd, offset, min(length, length_of(fd) - offset))
            return

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        """Copy `length` bytes between files, sharing blocks where the file system can; holes stay holes.

        What the source file does not have (its end came earlier) counts as a hole.
        """
        stop = source_offset + length
        shift = offset - source_offset
        position = source_offset
        while position < stop:
            data = next_data(source_fd, position, stop)
            if data > position:
                self._make_hole(fd, position + shift, data + shift)
            position = next_hole(source_fd, data, stop) if data < stop else stop
            self._copy_data(source_fd, data, fd, data + shift, position - data)
        if length_of(fd) < offset + length:
            self.truncate(fd, offset + length)

    def clone(self, source_fd: int, fd: int) -> bool:
        """Make `fd` share all blocks of `source_fd` (reflink); False where the file system cannot."""
        try:
            fcntl.ioctl(fd, _FICLONE, source_fd)
        except OSError as error:
            if error.errno in _NOT_OFFERED or error.errno == errno.ENOTTY:
                return False
            raise
        return True

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Ask the kernel to begin writing the range out: a hint, never durability.

        Errors are ignored on purpose: whatever is wrong with the file, the sync that follows reports it.
        """
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def forget(self, fd: int, offset: int, length: int) -> None:
        """Let the page cache go of what it holds of the range, unless it has still to be written.

        A length of 0 reaches to the end of the file. A hint; errors are ignored, for nothing that
        succeeds depends on it.
        """
        with suppress(OSError):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def datasync(self, fd: int) -> None:
        """Make the file's bytes and length durable.

        What a failed sync has not written the kernel goes on showing, as if it were on the disk. Were it
        believed, as a BAT entry that is there already, a later sync would succeed without it. So the page
        cache forgets the file then, and who reads it next reads the disk.
        """
        try:
            os.fdatasync(fd)
        except OSError:
            self.forget(fd, 0, 0)
            raise

    def sync(self, fd: int) -> None:
        """Make the file durable, metadata included; of a failure the same is true."""
        try:
            os.fsync(fd)
        except OSError:
            self.forget(fd, 0, 0)
            raise

    def rename(self, source: str, target: str) -> None:
        """Rename a file over whatever `target` is."""
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Give the file a second name."""
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        """Make a directory."""
        os.mkdir(path, mode)

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _make_hole(self, fd: int, start: int, stop: int) -> None:
        stop = min(stop, length_of(fd))
        if start < stop and next_data(fd, start, stop) < stop:
            self.punch(fd, start, stop - start)

    def _copy_data(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        while length > 0:
            try:
                copied = os.copy_file_range(source_fd, fd, length, source_offset, offset)
            except OSError as error:
                if error.errno not in _NOT_OFFERED:
                    raise
                copied = 0
            if copied == 0:  # some file systems say so instead of refusing
                data = os.pread(source_fd, min(length, _COPY_PIECE), source_offset)
                if not data:
                    self._make_hole(fd, offset, offset + length)  # the source was cut shorter meanwhile
                    return
                self.pwrite(fd, data, offset)
                copied = len(data)
            source_offset += copied
            offset += copied
            length -= copied


FILES: Final = FileCalls()
