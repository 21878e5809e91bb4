"""What the kernel tells of processes and of this process's threads, after proc(5).

The trap: a number is that of a process or thread only as long as it runs, and another one's later. The start
time beside it tells them apart.
"""

import os
import struct
from typing import Final

_HIGHEST_DESCRIPTOR: Final = 1 << 30  # above are addresses


def process_start(process: int) -> int:
    """When a process was started, in ticks since the machine was. Raises OSError when there is none."""
    return _start(f"/proc/{process}")


def thread_start(thread: int) -> int:
    """The same for a thread of this process, by its native id."""
    return _start(f"/proc/self/task/{thread}")


def running_threads() -> set[int]:
    """The native ids of this process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def awaited_descriptor(thread: int) -> int | None:
    """The descriptor that a thread of this process waits for, in a call like recv or send, or in poll for it
    alone. None if it does something else. Raises OSError when there is no such thread.
    """
    with open(f"/proc/self/task/{thread}/syscall", encoding="ascii") as file:
        number, *arguments = file.read().split()
    if number in {"running", "-1"} or not arguments:
        return None
    first, second = int(arguments[0], 16), int(arguments[1], 16)
    if first < _HIGHEST_DESCRIPTOR:
        return first
    if second != 1:
        return None
    # A pollfd begins with the descriptor. The memory may be gone by now, so it isn't looked at directly.
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        try:
            (fd,) = struct.unpack("i", os.pread(memory.fileno(), 4, first))
        except (OSError, OverflowError, struct.error):
            return None
    return int(fd)


def _start(directory: str) -> int:
    # The 22nd field; the second is in brackets and may hold anything.
    with open(f"{directory}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
