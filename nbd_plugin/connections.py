"""The clients of this nbdkit, found among its descriptors: nbdkit tells its plugin nothing of them.

The trap: of the process's sockets only those that nbdkit has accepted are clients. They are the ones with the
local address of a socket that listens, or did before it was taken away.
"""

import errno
import math
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

Address = tuple[int, object]

COUNT_PAUSE_SECONDS: Final = 0.1
SPARE_DESCRIPTORS: Final = 32

_listened: Final[set[Address]] = set()


def client_sockets() -> Iterator[socket.socket]:
    """The clients' sockets from the moment they were accepted: duplicates that are the caller's to close.

    Raises OSError where no descriptor is left to look for them, as do those who use it.
    """
    for name in os.listdir("/proc/self/fd"):
        client = client_socket(int(name))
        if client is not None:
            yield client


def client_socket(fd: int) -> socket.socket | None:
    """A duplicate of this descriptor if it is a client's; the caller's to close."""
    if not _listened:
        remember_listening()
    each = _stream_socket(fd)
    if each is None or (not _listens(each) and _local_address(each) in _listened):
        return each
    each.close()
    return None


def descriptors_run_short() -> bool:
    """Whether fewer files may be opened than are needed to serve who is here, and to look who that is.

    Without any left nbdkit turns in circles: it accepts nobody, and isn't told to end, either.
    """
    try:
        lowest = os.dup(0)
    except OSError:
        return True
    os.close(lowest)
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most != resource.RLIM_INFINITY and lowest >= most - SPARE_DESCRIPTORS


def count_clients() -> int:
    """How many clients are connected."""
    found = 0
    for each in client_sockets():
        each.close()
        found += 1
    return found


class Room:
    """Whether another client may come, asked once for each that has.

    Counting takes time with each client, so who comes again and again must not have it done each time. Since
    the last count there are at most as many more as have come.
    """

    def __init__(
        self, count: Callable[[], int] = count_clients, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._count: Final = count
        self._now: Final = now
        self._lock: Final = threading.Lock()
        self._most = 0
        self._count_at = -math.inf

    def is_there(self, limit: int) -> bool:
        """False if the client is one of more than `limit`, or may be one and it was counted just now."""
        with self._lock:
            self._most += 1
            if self._most > limit and self._now() >= self._count_at:
                self._most = self._count()
                self._count_at = self._now() + COUNT_PAUSE_SECONDS
            if self._most <= limit:
                return True
            self._most -= 1  # it goes
            return False


def listening_descriptors() -> list[int]:
    """The descriptors that this process listens on."""
    found = []
    for fd, each in _sockets():
        with each:
            if _listens(each):
                found.append(fd)
    return found


def remember_listening() -> None:
    """Know the clients of the sockets that listen now also when these have been taken away."""
    for _, each in _sockets():
        with each:
            if _listens(each):
                _listened.add(_local_address(each))


def _sockets() -> Iterator[tuple[int, socket.socket]]:
    """Descriptors of stream sockets, each with a duplicate."""
    for name in os.listdir("/proc/self/fd"):
        each = _stream_socket(int(name))
        if each is not None:
            yield int(name), each


def _stream_socket(fd: int) -> socket.socket | None:
    """A duplicate of this descriptor if it is one of a stream socket."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        duplicate = os.dup(fd)
    except OSError as error:
        if error.errno == errno.EBADF:  # closed by now
            return None
        raise
    try:
        each = socket.socket(fileno=duplicate)
    except OSError:  # something else by now
        os.close(duplicate)
        return None
    if each.type == socket.SOCK_STREAM:
        return each
    each.close()
    return None


def _listens(each: socket.socket) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _local_address(each: socket.socket) -> Address:
    """The address that clients connect to; of TCP the port, since one may listen on all interfaces."""
    try:
        address = each.getsockname()
    except OSError:
        address = None
    return (each.family, address[1] if isinstance(address, tuple) else address)
