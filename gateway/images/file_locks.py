"""Locks on image files that QEMU honours too: the lower layer of a lease.

QEMU (block/file-posix.c, `raw_apply_lock_bytes`) states what it does with a file by read locks on single
bytes: byte 100+p says "I use permission p", byte 200+p says "I do not share permission p". Whoever opens a
file takes its bytes first and then looks for somebody whose bytes contradict. The same bytes taken here
keep a `qemu-img` or a VM started by hand away from a leased file, and the other way round.

The trap: these are locks of the open file description (`F_OFD_SETLK`), not of the process. They last until
the last descriptor of that description is closed, in whatever process it is by then, so a descriptor passed
by SCM_RIGHTS carries its lock along. A lock is never converted and never dropped: it ends by closing.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from enum import Enum
from typing import Final

# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 is demanded for OFD locks).
_FLOCK: Final = struct.Struct("hhqqi0q")
_TO_THE_END: Final = 0

_USES: Final = 100
_DENIES: Final = 200

# Permissions of QEMU (include/block/block-common.h, BLK_PERM_*) by bit number.
_CONSISTENT_READ: Final = 0
_WRITE: Final = 1
_WRITE_UNCHANGED: Final = 2
_RESIZE: Final = 3
_PERMISSION_NAMES: Final = ("read", "write", "write unchanged data", "resize")
_EXCLUSIVELY: Final = "has locked it exclusively"


class FileUse(Enum):
    """What the holder of a lock does with the file."""

    READ = "read"
    WRITE = "write"

    @property
    def uses(self) -> tuple[int, ...]:
        """The permissions that the holder needs."""
        if self is FileUse.READ:
            return (_CONSISTENT_READ,)
        return (_CONSISTENT_READ, _WRITE, _RESIZE)

    @property
    def denies(self) -> tuple[int, ...]:
        """The permissions that nobody else may use meanwhile."""
        if self is FileUse.READ:
            return (_WRITE, _RESIZE)
        return (_CONSISTENT_READ, _WRITE, _WRITE_UNCHANGED, _RESIZE)


class FileInUse(OSError):  # noqa: N818 - a state of the file, named as the lease table names it
    """Somebody, in this process or another, does with the file what the wanted use excludes.

    The errno is EAGAIN: the caller closes the descriptor, which drops what was taken, and may retry.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(errno.EAGAIN, why, path)
        self.path = path
        self.why = why


def lock_file(fd: int, use: FileUse, path: str) -> None:
    """Take the locks of `use` on the open file description of `fd`, or raise FileInUse.

    Read locks suffice, so `fd` may be open O_RDONLY. All bytes are taken before anybody is asked about:
    two openers that race either see each other both, and both retry, or one sees the other. After an
    exception the descriptor holds some of the bytes and has to be closed. A file system without such locks
    raises OSError (EINVAL, ENOLCK).
    """
    for start in (*(_USES + p for p in use.uses), *(_DENIES + p for p in use.denies)):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, start, 1))
        except OSError as error:
            # Only a write lock stands in the way of a read lock: not QEMU's way, but somebody's.
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise FileInUse(path, f"another program {_EXCLUSIVELY}") from error
            raise
    _ask_about_others(fd, use, path)


def lock_files(wanted: Iterable[tuple[int, FileUse, str]]) -> None:
    """`lock_file` for several files, but not one byte is taken while any of them is seen to be in use.

    So whoever tries in vain, be it again and again, disturbs nobody who opens another file of the same chain.
    Of two that race, one or both are refused as by `lock_file`.
    """
    wanted = tuple(wanted)
    for fd, use, path in wanted:
        _ask_about_others(fd, use, path)
    for fd, use, path in wanted:
        lock_file(fd, use, path)


def _ask_about_others(fd: int, use: FileUse, path: str) -> None:
    for permission in use.uses:
        _ask_about(fd, _DENIES + permission, path, f"lets nobody {_PERMISSION_NAMES[permission]} it")
    for permission in use.denies:
        _ask_about(fd, _USES + permission, path, f"has it open to {_PERMISSION_NAMES[permission]} it")


def _ask_about(fd: int, start: int, path: str, meaning: str) -> None:
    """Raise FileInUse if somebody else has locked the byte at `start`, which means `meaning`."""
    lock_type = _lock_of_others(fd, start, 1)
    if lock_type == fcntl.F_UNLCK:
        return
    raise FileInUse(path, f"another program {_EXCLUSIVELY if lock_type == fcntl.F_WRLCK else meaning}")


def lock_wholly(fd: int) -> None:
    """Lock a file that says whose something is for the open file description of `fd`, which can write it.

    Not for images: these are locked on the bytes that QEMU asks about. Raises BlockingIOError or
    PermissionError where another has the lock, OSError where the file system has no such locks.
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, 0, _TO_THE_END))


def is_locked_wholly(fd: int) -> bool:
    """Whether another open file description has that lock; asking takes nothing."""
    return _lock_of_others(fd, 0, _TO_THE_END) != fcntl.F_UNLCK


def _lock_of_others(fd: int, start: int, length: int) -> int:
    # A write lock collides with every read lock of other descriptions; asking needs no writable descriptor.
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start, length))
    lock_type: int = _FLOCK.unpack(answer)[0]
    return lock_type


def _flock(lock_type: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(lock_type, os.SEEK_SET, start, length, 0)
