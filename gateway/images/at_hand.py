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
from collections.abc import Callable
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
_preadv2: Final = getattr(ctypes.PyDLL(None), "preadv2", None)
if _preadv2 is not None:
    _preadv2.argtypes = (ctypes.c_int, ctypes.POINTER(_Vector), ctypes.c_int, ctypes.c_int64, ctypes.c_int)
    _preadv2.restype = ctypes.c_ssize_t

_FLAGS: Final = {AtHand.ASKED: os.RWF_NOWAIT, AtHand.ALWAYS: 0}

# (descriptor, where in the buffer, how many bytes, where in the file); whether all of them were at hand.
ShortReader = Callable[[int, int, int, int], bool]


def short_reader(buf: bytearray | memoryview, at_hand: AtHand) -> ShortReader | None:
    """What reads short runs into `buf`, as long as that exists; None if nothing does it without waiting."""
    flags = _FLAGS.get(at_hand)
    if flags is None or _preadv2 is None:
        return None
    first = ctypes.c_char.from_buffer(buf)
    address = ctypes.addressof(first)
    vector = _Vector()

    def read(fd: int, start: int, length: int, offset: int, _keep: object = first) -> bool:
        vector.base, vector.length = address + start, length
        return bool(_preadv2(fd, vector, 1, offset, flags) == length)

    return read
