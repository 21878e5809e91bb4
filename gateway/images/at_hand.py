"""What of a file is in memory: how one knows, and how short runs of it are read.

`os.preadv` lets go of the interpreter's lock and takes it again. That is right where a read may wait; but
where many threads want the lock, who reads sixteen short runs sleeps sixteen times, which takes longer than
to read them. So short runs that are in memory are read with the lock held.

The trap: a read that waits for storage with the lock held stops everybody. So it is told not to wait, and
where a file system can't be told, nothing is read that way.
"""

import ctypes
import errno
import os
from enum import Enum
from typing import Final

# statfs(2): tmpfs, ramfs
_IN_MEMORY: Final = frozenset({0x01021994, 0x858458F6})


class AtHand(Enum):
    """How one knows what is in memory."""

    ASKED = "the kernel tells"
    ALWAYS = "the file system is in memory"
    LATELY = "what was read lately is"


def how_at_hand(fd: int) -> AtHand:
    """How one knows what is in memory of the file `fd`. Blocking."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return AtHand.ASKED
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    else:
        return AtHand.ASKED
    # struct statfs begins with the type, a long; the rest of it is shorter than this.
    status = (ctypes.c_long * 64)()
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, ctypes.byref(status)):
        return AtHand.LATELY
    return AtHand.ALWAYS if status[0] in _IN_MEMORY else AtHand.LATELY


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


# PyDLL keeps the interpreter's lock. glibc has the function from 2.26 on; other libraries may lack it.
_library: Final = ctypes.PyDLL(None)
_HAS_FLAGS: Final = hasattr(_library, "preadv2")
if _HAS_FLAGS:
    _library.preadv2.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_Vector),
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
    )
    _library.preadv2.restype = ctypes.c_ssize_t

_FLAGS: Final = {AtHand.ASKED: os.RWF_NOWAIT, AtHand.ALWAYS: 0}


class HeldReader:
    """Reads short runs into one buffer with the interpreter's lock held, and without waiting."""

    def __init__(self, buf: bytearray | memoryview, flags: int) -> None:
        self._buffer = ctypes.c_char.from_buffer(buf)  # as long as it exists the memory stays where it is
        self._address = ctypes.addressof(self._buffer)
        self._vector = _Vector()
        self._flags = flags
        self._preadv2 = _library.preadv2

    def read(self, fd: int, start: int, length: int, offset: int) -> bool:
        """Fill `length` bytes of the buffer from `start` on; False if not all of them were at hand."""
        vector = self._vector
        vector.base, vector.length = self._address + start, length
        return bool(self._preadv2(fd, vector, 1, offset, self._flags) == length)


def held_reader(buf: bytearray | memoryview, at_hand: AtHand) -> HeldReader | None:
    """What reads short runs into `buf`; None if nothing can do it without waiting."""
    flags = _FLAGS.get(at_hand)
    return None if flags is None or not _HAS_FLAGS else HeldReader(buf, flags)
