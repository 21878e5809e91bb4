"""The sockets that clients of NBD connect to.

The options of a listening TCP socket go over to what is accepted from it; nbdkit sets none itself. The trap:
workers share these sockets, and nbdkit turns in circles on one that doesn't block.
"""

import errno
import ipaddress
import os
import socket
import time
from contextlib import suppress
from typing import Final

BACKLOG: Final = 256
KEEPALIVE_IDLE: Final = 15  # seconds until a silent client is probed,
KEEPALIVE_INTERVAL: Final = 5  # every so often,
KEEPALIVE_COUNT: Final = 3  # so many times; then its host is dead and its lease free
UNACKNOWLEDGED_MILLISECONDS: Final = 30_000  # the same for one that owes the receipt of an answer

# Workers of a supervisor that was killed give the address up within moments.
_TAKEN_SECONDS: Final = 1.5
_AGAIN_SECONDS: Final = 0.05


def resolve(host: str, port: int) -> list[tuple[int, tuple[object, ...]]]:
    """Family and address of everything that `host` stands for. Raises OSError, UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, address) for family, _, _, _, address in dict.fromkeys(found)]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Raises OSError, UnicodeError when it can't be resolved."""
    return all(
        ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for _, address in resolve(host, 0)
    )


def listen_on(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of `host`, with port 0 on the same free one. Raises OSError."""
    deadline = time.monotonic() + _TAKEN_SECONDS
    while True:
        try:
            return _listen_on(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(_AGAIN_SECONDS)


def _listen_on(host: str, port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for family, address in resolve(host, port):
            bound = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MILLISECONDS)
            chosen = sockets[0].getsockname()[1] if len(sockets) > 1 else port
            bound.bind((address[0], chosen, *address[2:]))
            bound.listen(BACKLOG)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


def listen_locally(directory: str, name: str) -> socket.socket:
    """Listen on a Unix socket that only this user and root may connect to. Raises OSError.

    What has that name is removed: the caller knows that nobody listens there. The path may be of any length.
    """
    parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        # Nobody can connect before listen(), and by then the permissions are right.
        bound.bind(f"/proc/self/fd/{parent}/{name}")
        os.chmod(name, 0o600, dir_fd=parent)
        bound.listen(BACKLOG)
    except BaseException:
        bound.close()
        raise
    finally:
        os.close(parent)
    return bound
