"""Where an exported disk goes: a file, a block device, or stdout.

A file is filled as `FILE.part` and gets its name when it is whole and durable; what it is a part of stands in
`FILE.part.json`, so that the same command goes on with it. Runs of 64 KiB of zeroes become holes. The trap:
the note must never promise bytes that a power failure could still take, so it is written after a sync.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any, Final

from gateway.cli.output import CommandError, UsageError
from gateway.images.files import FILES

STDOUT: Final = "-"
PIECE_BYTES: Final = 64 << 10
_WRITEBACK_BYTES: Final = 8 << 20
_READ_BYTES: Final = 1 << 20
_NOTE_SECONDS: Final = 10.0
_ZEROES: Final = bytes(PIECE_BYTES)
_SECTOR_BYTES: Final = 4096
_PUNCH_HOLE_KEEP_SIZE: Final = 0x03  # linux/falloc.h

_fallocate: Final = ctypes.CDLL(None).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ExportTarget(ABC):
    """Takes the bytes of a disk from `offset` on. `etag` names the content of what is there already."""

    name: str
    offset = 0
    etag: str | None = None
    physical = 0

    @abstractmethod
    def begin(self, vdi: str, etag: str, size: int) -> None:
        """Bytes of this content come from the start. CommandError if some of another were let go already."""

    @abstractmethod
    def write(self, buffer: bytearray, count: int) -> None:
        """Take the first `count` bytes of the buffer. Raises OSError."""

    @abstractmethod
    def zeroes(self, count: int) -> None:
        """Take so many zeroes. Raises OSError."""

    @abstractmethod
    def finish(self) -> None:
        """Everything was written: make it durable. Raises OSError."""

    def keep(self) -> str:
        """The transfer ends early: keep what can be gone on with, and say so. Raises OSError."""
        return ""

    def drop(self) -> str:
        """The transfer failed, and nothing of it is wanted; what is there nevertheless. Raises OSError."""
        return f"; what {self.name} holds now is of no use" if self.offset else ""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


class StreamTarget(ExportTarget):
    """stdout, a pipe or a character device: bytes in order, and none of them comes back."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self._etag: str | None = None
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)

    def begin(self, vdi: str, etag: str, size: int) -> None:
        if self.offset and etag != self.etag:
            raise CommandError(f"the disk was changed while it was exported to {self.name}; export it again")
        self.etag = etag

    def write(self, buffer: bytearray, count: int) -> None:
        with memoryview(buffer) as view:
            done = 0
            while done < count:
                done += os.write(self._fd, view[done:count])
        self.offset += count
        self.physical += count

    def zeroes(self, count: int) -> None:
        zeroes = bytearray(min(count, _WRITEBACK_BYTES))
        while count:
            piece = min(count, len(zeroes))
            self.write(zeroes, piece)
            count -= piece

    def finish(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP, errno.EBADF):
                raise

    def close(self) -> None:
        if self._fd > 2:
            os.close(self._fd)


class DeviceTarget(ExportTarget):
    """A block device, which is written in place: zeroes are given back, or written as such where it can't."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self._size = os.lseek(fd, 0, os.SEEK_END)

    def begin(self, vdi: str, etag: str, size: int) -> None:
        if size > self._size:
            raise CommandError(f"{self.name} has {self._size} bytes, the disk {size}; give a larger device")
        self.offset = 0
        self.etag = etag

    def write(self, buffer: bytearray, count: int) -> None:
        with memoryview(buffer) as view:
            for start, stop, zero in runs(buffer, count):
                if zero:
                    self._write_zeroes(stop - start, self.offset + start)
                else:
                    FILES.pwrite(self._fd, view[start:stop], self.offset + start)
                    self.physical += stop - start
        self.offset += count

    def zeroes(self, count: int) -> None:
        self._write_zeroes(count, self.offset)
        self.offset += count

    def _write_zeroes(self, count: int, offset: int) -> None:
        # Only whole sectors can be given back, and after a broken connection the offset may be any.
        end = offset + count
        first = -(-offset // _SECTOR_BYTES) * _SECTOR_BYTES
        stop = end // _SECTOR_BYTES * _SECTOR_BYTES
        if first < stop and not _fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, first, stop - first):
            FILES.write_zeroes(self._fd, offset, first - offset)
            FILES.write_zeroes(self._fd, stop, end - stop)
        else:
            FILES.write_zeroes(self._fd, offset, count)

    def finish(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class FileTarget(ExportTarget):
    """A regular file that isn't there until it is whole."""

    def __init__(self, path: str, vdi: str) -> None:
        self.name = path
        self._part = f"{path}.part"
        self._note = f"{path}.part.json"
        self._vdi = vdi
        self._size = 0
        self._noted = time.monotonic()
        self._written_back = 0
        # A name that is too long for the note is told before anything is fetched.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(f"{self._note}.new")
        self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._lock()
            self._recall()
        except BaseException:
            os.close(self._fd)
            raise

    def begin(self, vdi: str, etag: str, size: int) -> None:
        # Without its note first: of what is cut away, none may speak any more. Then cut to nothing: what is
        # not written must be a hole.
        self._remove_note()
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, size)
        self.offset = self._written_back = self.physical = 0
        self.etag = etag
        self._size = size

    def write(self, buffer: bytearray, count: int) -> None:
        with memoryview(buffer) as view:
            for start, stop, zero in runs(buffer, count):
                if not zero:
                    FILES.pwrite(self._fd, view[start:stop], self.offset + start)
                    self.physical += stop - start
        self.offset += count
        if self.offset - self._written_back >= _WRITEBACK_BYTES:
            FILES.start_writeback(self._fd, self._written_back, self.offset - self._written_back)
            self._written_back = self.offset
        if time.monotonic() - self._noted > _NOTE_SECONDS:
            self._write_note()

    def zeroes(self, count: int) -> None:
        self.offset += count  # the file is a hole there

    def finish(self) -> None:
        self._sync(FILES.sync)
        os.rename(self._part, self.name)
        FILES.sync_directory(os.path.dirname(self.name) or ".")
        self._remove_note()

    def keep(self) -> str:
        if not self.offset:
            return ""
        self._write_note()
        return f"; {self.offset} bytes are kept in {self._part}: the same command goes on from there"

    def drop(self) -> str:
        self.offset = 0
        self._remove_note()
        return ""

    def close(self) -> None:
        # Nobody can go on with it without a note. It may be what fills the disk, so that there is none.
        if not os.path.exists(self._note):
            with contextlib.suppress(FileNotFoundError):
                if self._is_part():
                    os.unlink(self._part)
                    os.unlink(f"{self._note}.new")
        os.close(self._fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(
                f"{self._part} is being written by another export; wait for it or give another name"
            ) from None
        # Between opening and locking another export may have finished this very file.
        if not self._is_part():
            raise CommandError(
                f"another export to {self.name} has ended at this moment; look at it, and try again"
            )

    def _is_part(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._part))
        except FileNotFoundError:
            return False

    def _recall(self) -> None:
        try:
            with open(self._note, "rb") as file:
                note: dict[str, Any] = json.loads(file.read(65536))
            etag, size, offset = note["etag"], note["size"], note["offset"]
            usable = note["vdi"] == self._vdi and isinstance(etag, str)
            usable = usable and os.fstat(self._fd).st_size == size and 0 < offset <= size
        except (OSError, ValueError, KeyError, TypeError):
            return
        if usable:
            # Of a file that is whole the last byte is fetched anew: a request for none is refused, and its
            # task fails.
            self.etag, self._size, self.offset = etag, size, min(offset, size - 1)
            self._written_back = self.offset

    def _sync(self, sync: Callable[[int], None]) -> None:
        try:
            sync(self._fd)
        except OSError:
            # It is unknown which bytes were lost, and the next sync would say that all are there.
            self.drop()
            raise

    def _write_note(self) -> None:
        self._sync(FILES.datasync)
        content = {"vdi": self._vdi, "etag": self.etag, "size": self._size, "offset": self.offset}
        temporary = f"{self._note}.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            json.dump(content, file)
        os.rename(temporary, self._note)
        self._noted = time.monotonic()

    def _remove_note(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._note)


class HashedFile(FileTarget):
    """A file whose checksum is that of the bytes that came from the gateway."""

    def __init__(self, path: str, vdi: str) -> None:
        self._sum = sha256()
        super().__init__(path, vdi)
        position = 0
        while position < self.offset:
            data = os.pread(self._fd, min(_READ_BYTES, self.offset - position), position)
            if not data:
                raise OSError(errno.EIO, f"it ends at byte {position}")
            self._sum.update(data)
            position += len(data)

    @property
    def digest(self) -> str:
        """SHA-256 of what was written, in hex."""
        return self._sum.hexdigest()

    def begin(self, vdi: str, etag: str, size: int) -> None:
        super().begin(vdi, etag, size)
        self._sum = sha256()

    def write(self, buffer: bytearray, count: int) -> None:
        with memoryview(buffer) as view:
            self._sum.update(view[:count])
        super().write(buffer, count)


def open_target(name: str, vdi: str, *, force: bool, image_format: str = "raw") -> ExportTarget:
    """Open where the disk `vdi` (uuid) goes in a format. OSError.

    CommandError for a file that exists, unless `force`, and for a device that is to hold an image file;
    UsageError for no name.
    """
    if not name:
        raise UsageError("the file's name is empty; give a file, a block device, or - for stdout")
    if name in (STDOUT, "/dev/stdout"):  # which may be a file, and isn't to be replaced then
        if os.isatty(1):
            raise CommandError("stdout is a terminal; give a file, or send the disk into a pipe")
        return StreamTarget(1, "stdout")
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return FileTarget(name, vdi)
    if stat.S_ISDIR(mode):
        raise CommandError(
            f"{name} is a directory; give a file in it, as in {os.path.join(name, vdi)}.{image_format}"
        )
    if stat.S_ISREG(mode):
        if not force:
            raise CommandError(f"{name} exists already; give another name, or --force to replace it")
        return FileTarget(os.path.realpath(name), vdi)
    if stat.S_ISBLK(mode):
        if image_format != "raw":
            raise CommandError(f"{name} is a block device, which takes the disk itself; give format=raw")
        # O_EXCL: not a device that is mounted.
        return DeviceTarget(os.open(name, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC), name)
    return StreamTarget(os.open(name, os.O_WRONLY | os.O_CLOEXEC), name)


def runs(buffer: bytearray, count: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, stop, is zero) over the first `count` bytes, in pieces of 64 KiB; neighbours differ."""
    begin = 0
    current: bool | None = None
    for start in range(0, count, PIECE_BYTES):
        left = count - start
        zero = buffer.startswith(_ZEROES if left >= PIECE_BYTES else _ZEROES[:left], start)
        if zero is not current:
            if current is not None:
                yield begin, start, current
            begin, current = start, zero
    if current is not None:
        yield begin, count, current
