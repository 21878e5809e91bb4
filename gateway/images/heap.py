"""The heap of a process that hands out the bytes of disks: where buffers come from, and what it gives back.

glibc gives each thread a heap of its own, and after a while each of these has had the tables of a disk of
2 TiB, or the buffers of an upload, and keeps the room. So there is one heap, which is plenty, since Python
has one thread at work at a time; and soon after something large was done it gives back all that is free.

The trap: large buffers must come from the heap, too. Where glibc takes a block from the kernel alone, it
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
_LARGE: Final = 4 << 20  # more than a client of NBD asks for in one request
_UNUSED: Final = 32 << 20  # at its end, until it is given back
# What was in use is free when its threads have ended.
_PAUSE_SECONDS: Final = 1.0

_done: Final = threading.Event()


def use_one_heap() -> None:
    """Once in a process, before its threads have heaps. Where the C library can't, nothing is done."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        return
    library.mallopt(_M_ARENA_MAX, _HEAPS)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_M_TRIM_THRESHOLD, _UNUSED)
    threading.Thread(target=_give_back, args=(library,), name="heap", daemon=True).start()


def give_back_soon() -> None:
    """A disk was closed or a transfer has ended: what it needed isn't needed any more."""
    _done.set()


def _give_back(library: ctypes.CDLL) -> None:
    while True:
        _done.wait()
        _done.clear()
        time.sleep(_PAUSE_SECONDS)
        library.malloc_trim(0)
