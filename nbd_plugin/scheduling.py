"""How the kernel schedules the threads that read a disk.

nbdkit has several threads for each connection, and all of them want the interpreter's lock. One that is woken
because the lock is free now interrupts another one, for which the next one then waits. Threads of SCHED_BATCH
interrupt nobody, so a disk with several connections, which is how copies are made, is read that way.

The trap: where all processors are busy such a thread waits for its turn, for milliseconds. Who has one
connection and may have one request at a time, as a guest that boots, must not have that.
"""

import contextlib
import os
import threading
from collections.abc import Hashable, Iterable
from typing import Final

from nbd_plugin.proc import running_threads

_lock: Final = threading.Lock()
# By disk and connection: the native ids of the threads that have had a request to read.
_readers: Final[dict[str, dict[Hashable, set[int]]]] = {}
_disks: Final[dict[Hashable, str]] = {}  # by connection


def opened(disk: str, connection: Hashable) -> None:
    """The disk has one more connection."""
    with _lock:
        _disks[connection] = disk
        connections = _readers.setdefault(disk, {})
        connections[connection] = set()
        if len(connections) == 2:
            _schedule_all(connections.values(), os.SCHED_BATCH)


def closed(connection: Hashable) -> None:
    """The threads of this connection have ended, or read nothing any more. Twice is allowed."""
    with _lock:
        disk = _disks.pop(connection, None)
        if disk is None:
            return
        connections = _readers[disk]
        del connections[connection]
        if len(connections) == 1:
            _schedule_all(connections.values(), os.SCHED_OTHER)
        if not connections:
            del _readers[disk]


def reads(connection: Hashable) -> None:
    """This thread has its first request."""
    with _lock:
        disk = _disks.get(connection)
        if disk is None:
            return
        connections = _readers[disk]
        connections[connection].add(threading.get_native_id())
        if len(connections) > 1:
            _schedule(0, os.SCHED_BATCH)


def _schedule_all(threads: Iterable[set[int]], policy: int) -> None:
    # Without a descriptor left nobody can look which threads there are, and a disk is opened or closed all
    # the same. One that has just ended is left alone: its number may be another process's by now.
    with contextlib.suppress(OSError):
        for thread in set().union(*threads) & running_threads():
            _schedule(thread, policy)


def _schedule(thread: int, policy: int) -> None:
    with contextlib.suppress(OSError):  # a sandbox may forbid it, which costs speed only
        # The main thread has what nbdkit was started with: another policy is somebody's wish.
        if os.sched_getscheduler(os.getpid()) == os.SCHED_OTHER:
            os.sched_setscheduler(thread, policy, os.sched_param(0))
