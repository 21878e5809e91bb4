"""The clients of this nbdkit, found among its descriptors: nbdkit tells its plugin nothing of them.

The trap: of the process's sockets only those that nbdkit has accepted are clients. They are the ones with the
local address of a socket that listens, or did before it was taken away.
"""

import os
import socket
import stat
from collections.abc import Iterator
from typing import Final

Address = tuple[int, object]

_listened: Final[set[Address]] = set()


def client_sockets() -> Iterator[tuple[int, socket.socket]]:
    """The clients' descriptors from the moment they were accepted, each with a duplicate that is the caller's
    to close.
    """
    remember_listening()
    for fd, each in _sockets():
        if not _listens(each) and _local_address(each) in _listened:
            yield fd, each
        else:
            each.close()


def count_clients() -> int:
    """How many clients are connected."""
    found = 0
    for _, each in client_sockets():
        each.close()
        found += 1
    return found


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
        fd = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            duplicate = os.dup(fd)
        except OSError:  # closed by now
            continue
        try:
            each = socket.socket(fileno=duplicate)
        except OSError:  # something else by now
            os.close(duplicate)
            continue
        if each.type == socket.SOCK_STREAM:
            yield fd, each
        else:
            each.close()


def _listens(each: socket.socket) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _local_address(each: socket.socket) -> Address:
    """The address that clients connect to; of TCP the port, since one may listen on all interfaces."""
    try:
        address = each.getsockname()
    except OSError:
        address = None
    return (each.family, address[1] if isinstance(address, tuple) else address)
