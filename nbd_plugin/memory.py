"""How much memory nbdkit keeps of what it doesn't need any more.

glibc gives each of nbdkit's threads a heap of its own, and after a while each of these has had the tables of
a disk of 2 TiB and keeps the room. So there is one heap, which is plenty, since Python has one thread at work
at a time; and soon after a disk was closed it gives back all that is free in it.

The trap: the data of requests must come from a heap, too. Where glibc takes a block from the kernel alone, it
begins 16 bytes after the beginning of a page, and to copy whole pages there takes some processors (AMD) half
as long again.
"""

import ctypes
import threading
import time
from typing import Final

# mallopt(3), malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_HEAPS: Final = 1  # the only one whose end malloc_trim(3) gives back
_LARGE: Final = 4 << 20  # more than clients ask for in one request
_UNUSED: Final = 32 << 20  # at its end, until it is given back
# What a disk had is free when its connection's threads have ended.
_PAUSE_SECONDS: Final = 1.0

_closed: Final = threading.Event()


def keep_little() -> None:
    """Bound it, before threads have heaps. Where the C library has no such thing, nothing is done."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        return
    library.mallopt(_M_ARENA_MAX, _HEAPS)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_M_TRIM_THRESHOLD, _UNUSED)
    threading.Thread(target=_give_back, args=(library,), name="memory", daemon=True).start()


def disk_closed() -> None:
    """What was known of a disk isn't needed any more."""
    _closed.set()


def _give_back(library: ctypes.CDLL) -> None:
    while True:
        _closed.wait()
        _closed.clear()
        time.sleep(_PAUSE_SECONDS)
        library.malloc_trim(0)
