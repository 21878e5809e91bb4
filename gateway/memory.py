"""How much memory the process keeps of what it doesn't need any more."""

import ctypes
from typing import Final

# malloc.h: the parameter of mallopt; fixing the threshold also ends its growth.
_M_MMAP_THRESHOLD: Final = -3
MMAP_THRESHOLD: Final = 256 << 10


def give_memory_back() -> None:
    """Makes glibc return large buffers to the system as soon as they are freed.

    Left alone it raises its threshold for mmap with the first large buffer that is freed, and from then on
    keeps them in its arenas: after eight uploads at once the process stayed at 117 MiB instead of 72.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return  # Another C library, with other habits.
    mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
