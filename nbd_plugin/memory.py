"""How much memory nbdkit keeps of what it doesn't need any more.

glibc gives each of nbdkit's threads a heap of its own, and learns from a large block that was freed to take
the next one from such a heap. A heap that is empty but for its end keeps everything: after a while each of
them has had the tables of a disk of 2 TiB. So there are two heaps, which is plenty, since Python has one
thread at work at a time; and large blocks are the kernel's, which has them back at once.
"""

import ctypes
from typing import Final

# mallopt(3), malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_HEAPS: Final = 2
_LARGE: Final = (
    64 << 10
)  # a piece of a table of blocks; a request's data has its buffer for as long as its thread
_UNUSED: Final = 1 << 20  # at the end of a heap


def keep_little() -> None:
    """Bound it, before threads have heaps. Where the C library has no such thing, nothing is done."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, _HEAPS)
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _UNUSED)
