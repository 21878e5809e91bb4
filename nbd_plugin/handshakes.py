"""Limits for clients that connect and then don't open a disk: nbdkit waits for them for ever.

Each connection has a thread of nbdkit's, which calls the plugin when it begins (`preconnect`), when the
client has said which export it wants (`open`), and when that is closed. While no disk is open it is the
client's turn, and it has so much time for it; one that only looks (NBD_OPT_INFO, nbdinfo --list) has it anew
with each export. Then its socket is shut down, and nbdkit ends the connection as if the client had gone. The
same happens to those that have been silent the longest when too many are, so that others get in.

The trap: nbdkit doesn't tell its plugin which socket a thread serves. But a thread that waits for its client
is in a system call, and the kernel tells its arguments. They are read before and after the socket is
duplicated: what a thread waits for all along is its own, and no other client is hit that got the same number.
"""

import ctypes
import enum
import errno
import math
import socket
import threading
import time
from dataclasses import dataclass
from typing import Final

from nbd_plugin.connections import client_socket
from nbd_plugin.proc import awaited_descriptor, running_threads, thread_start

_libc: Final = ctypes.CDLL(None)

_LONGEST_PAUSE: Final = 1.0  # while somebody is silent; a quarter of a limit that is short
_BUSY_SECONDS: Final = 0.01  # until one that has just come waits for what its client says
_TRIES: Final = 20
_MANY: Final = 1024
_NONE_LEFT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class _Turn:
    """A client has to say something. `began`: when its thread did, whose number may be another's later."""

    began: int
    until: float


class _Found(enum.Enum):
    """How it went to disconnect a client. `BUSY`: it has just come or said something, and is answered."""

    DISCONNECTED = enum.auto()
    BUSY = enum.auto()
    GONE = enum.auto()


# By the native ids of threads, some of which have ended; who has been silent the longest comes first.
_turns: Final[dict[int, _Turn]] = {}
_changed: Final = threading.Condition()
_limit = 0.0
_most = 0


def watch(seconds: float, most: int) -> None:
    """Disconnect clients that open nothing for so long, in a thread, and those that are silent the longest as
    soon as there are more than `most` of them; 0: never. After nbdkit has forked.
    """
    global _limit, _most
    _limit, _most = seconds, most
    if seconds > 0 or most > 0:
        threading.Thread(target=_watch, name="handshakes", daemon=True).start()


def clients_turn() -> None:
    """From now on nbdkit waits on this thread for what its client wants."""
    if _limit <= 0 and _most <= 0:
        return
    thread = threading.get_native_id()
    turn = _Turn(thread_start(thread), time.monotonic() + (_limit or math.inf))
    disconnected = 0
    with _changed:
        _turns.pop(thread, None)
        _turns[thread] = turn
        if len(_turns) > (_most or _MANY):
            _forget_ended()
            if _most:
                disconnected = _disconnect_oldest(len(_turns) - _most)
        _changed.notify()
    _say_how_many_made_room(disconnected)


def our_turn() -> None:
    """The client of this thread has said what it wants."""
    with _changed:
        _turns.pop(threading.get_native_id(), None)


def make_room() -> bool:
    """Disconnect who has been silent the longest, once one waits. False if nobody is silent."""
    for _ in range(_TRIES):
        with _changed:
            _forget_ended()
            disconnected = _disconnect_oldest(1)
            busy = len(_turns)
        _say_how_many_made_room(disconnected)
        if disconnected or not busy:
            return disconnected > 0
        time.sleep(_BUSY_SECONDS)
    return False


def _forget_ended() -> None:
    for ended in _turns.keys() - running_threads():
        del _turns[ended]


def _watch() -> None:
    pause = min(_LONGEST_PAUSE, _limit / 4 or _LONGEST_PAUSE)
    while True:
        with _changed:
            while not _turns:
                _changed.wait()
        time.sleep(pause)
        now = time.monotonic()
        with _changed:  # nobody opens a disk meanwhile
            try:
                _forget_ended()
            except OSError:  # no descriptor is left to look with
                continue
            late = [thread for thread, turn in _turns.items() if turn.until <= now]
            ended = [_disconnect(thread) for thread in late].count(_Found.DISCONNECTED)
            made_room = _disconnect_oldest(len(_turns) - _most) if _most else 0
        _say(f"a client that opened nothing for {_limit:g} s is disconnected", ended)
        _say_how_many_made_room(made_room)


def _disconnect_oldest(number: int) -> int:
    """Disconnect up to so many of those that are silent; how many there were."""
    done = 0
    for thread in list(_turns):
        if done >= number:
            break
        done += _disconnect(thread) is _Found.DISCONNECTED
    return done


def _disconnect(thread: int) -> _Found:
    """End the connection of one whose turn it is; that is forgotten then, and also if the client has gone."""
    try:
        found = _shut_down(thread, _turns[thread].began)
    except OSError as error:
        found = _Found.BUSY if error.errno in _NONE_LEFT else _Found.GONE
    if found is not _Found.BUSY:
        del _turns[thread]
    return found


def _shut_down(thread: int, began: int) -> _Found:
    """Raises OSError if the thread or its connection has ended."""
    fd = awaited_descriptor(thread)
    client = client_socket(fd) if fd is not None else None
    if client is None:
        return _Found.BUSY if thread_start(thread) == began else _Found.GONE
    with client:
        if awaited_descriptor(thread) != fd:
            return _Found.BUSY
        if thread_start(thread) != began:
            return _Found.GONE
        client.shutdown(socket.SHUT_RDWR)
    return _Found.DISCONNECTED


def _say_how_many_made_room(number: int) -> None:
    _say("a client that had opened nothing is disconnected to make room for another", number)


def _say(line: str, times: int) -> None:
    """One line for each client; whoever reads them may count them.

    By the stream of the C library: nbdkit writes its lines there in pieces, and locks it for each line.
    """
    if times:
        _libc.fputs(f"{line}\n".encode() * times, ctypes.c_void_p.in_dll(_libc, "stderr"))
