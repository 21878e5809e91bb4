"""A limit for clients that connect and then don't open a disk: nbdkit waits for them for ever.

Each connection has a thread of nbdkit's, which calls the plugin when it begins (`preconnect`), when the
client has said which export it wants (`open`), and when that is closed. While no disk is open it is the
client's turn, and it has so much time for it; one that only looks (NBD_OPT_INFO, nbdinfo --list) has it anew
with each export. Then its socket is shut down, and nbdkit ends the connection as if the client had gone.

The trap: nbdkit doesn't tell its plugin which socket a thread serves. But a thread that waits for its client
is in a system call, and the kernel tells its arguments. Sockets are duplicated before these are read: a
thread that still waits then has had its socket all along, and no other one is hit that got the same number.
"""

import contextlib
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Final

from nbd_plugin.connections import client_sockets
from nbd_plugin.proc import awaited_descriptor, running_threads, thread_start

_SHORTEST_PAUSE: Final = 1.0  # however many clients come; a quarter of a limit that is short
_MANY: Final = 1024


@dataclass(frozen=True, slots=True)
class _Turn:
    """A client has to say something. `began`: when its thread did, whose number may be another's later."""

    began: int
    until: float


_turns: Final[dict[int, _Turn]] = {}  # by the native ids of threads, some of which have ended
_changed: Final = threading.Condition()
_limit = 0.0


def watch(seconds: float) -> None:
    """Disconnect clients that open nothing for so long, in a thread; 0: never. After nbdkit has forked."""
    global _limit  # noqa: PLW0603 - one process is one nbdkit
    _limit = seconds
    if seconds > 0:
        threading.Thread(target=_watch, name="handshakes", daemon=True).start()


def clients_turn() -> None:
    """From now on nbdkit waits on this thread for what its client wants."""
    if _limit <= 0:
        return
    thread = threading.get_native_id()
    turn = _Turn(thread_start(thread), time.monotonic() + _limit)
    with _changed:
        _turns[thread] = turn
        if len(_turns) > _MANY:
            for ended in _turns.keys() - running_threads():
                del _turns[ended]
        _changed.notify()


def our_turn() -> None:
    """The client of this thread has said what it wants."""
    with _changed:
        _turns.pop(threading.get_native_id(), None)


def _watch() -> None:
    shortest = min(_SHORTEST_PAUSE, _limit / 4)
    while True:
        with _changed:
            while not _turns:
                _changed.wait()
            first = min(turn.until for turn in _turns.values())
        time.sleep(max(first - time.monotonic(), shortest))
        if disconnected := _disconnect(time.monotonic()):
            sys.stderr.write(
                f"clients that opened nothing for {_limit:g} s are disconnected: {disconnected}\n"
            )
            sys.stderr.flush()


def _disconnect(now: float) -> int:
    """End the connections of those whose time is over; how many there were."""
    with contextlib.ExitStack() as duplicates:
        sockets = {fd: duplicates.enter_context(each) for fd, each in client_sockets()}
        found = 0
        with _changed:  # nobody opens a disk meanwhile
            for thread, turn in list(_turns.items()):
                if turn.until > now:
                    continue
                client: socket.socket | None = None
                with contextlib.suppress(OSError):
                    if thread_start(thread) == turn.began:
                        client = sockets.get(awaited_descriptor(thread) or -1)
                        if client is None:
                            continue  # it is busy for a moment
                        client.shutdown(socket.SHUT_RDWR)
                        found += 1
                del _turns[thread]
    return found
