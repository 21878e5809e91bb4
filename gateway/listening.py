"""The sockets on which the gateway listens, and how their addresses are told.

All are bound before the slow steps of a start, so that a port in use is told at once.
"""

import ipaddress
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from gateway.http.server import listen, listen_locally
from gateway.nbd_files import NbdFiles
from gateway.state import StateDirectory

OURS: Final = "look what is there: it is the gateway's own, and this user has to read and write it"
"""What to do about a file of the state directory that can't be used."""


class ServeRefused(Exception):  # noqa: N818  it says what happened, like the errors of the core
    """The gateway can't start: one line that says why and what to do."""


def listen_all(addresses: Sequence[tuple[str, int]], name: str, opened: ExitStack) -> list[socket.socket]:
    """Listen on each (host, port), until `opened` ends; `name` is the option's. Raises ServeRefused."""
    sockets: list[socket.socket] = []
    for host, port in addresses:
        try:
            bound = listen(host, port)
        except (OSError, UnicodeError) as error:  # UnicodeError: what can be no name
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise ServeRefused(
                f"{name}: can't listen on {host_port(host, port)}: {reason};"
                " give a free port and an address of this machine"
            ) from None
        for one in bound:
            opened.callback(one.close)
        sockets += bound
    return sockets


def listen_on_socket(path: str, opened: ExitStack, *, mode: int = 0o600) -> socket.socket:
    """Listen on a Unix socket, which goes when `opened` ends. Raises ServeRefused."""
    try:
        bound = listen_locally(path, mode)
    except OSError as error:
        raise ServeRefused(f"can't listen on {path}: {error.strerror}; {OURS}") from error
    opened.callback(Path(path).unlink, missing_ok=True)
    opened.callback(bound.close)
    return bound


def access_sockets(state: StateDirectory, nbd: NbdFiles | None, opened: ExitStack) -> list[socket.socket]:
    """Listen for programs that hold disks: everybody's socket, and that of NBD's workers. ServeRefused."""
    sockets = [listen_on_socket(state.access_socket, opened, mode=0o660)]
    if nbd is not None and nbd.access_socket is not None:
        try:
            nbd.prepare()
            sockets.append(listen_on_socket(nbd.access_socket, opened, mode=0o600))
            nbd.open_to_workers(nbd.access_socket)
        except OSError as error:
            raise ServeRefused(f"{error.filename or nbd.directory}: {error.strerror}; {OURS}") from error
    return sockets


def host_port(host: str, port: int) -> str:
    """Return the address as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def urls_of(scheme: str, sockets: Sequence[socket.socket]) -> tuple[str, ...]:
    """Return where each of the sockets is reached."""
    return tuple(f"{scheme}://{host_port(*one.getsockname()[:2])}" for one in sockets)


def address_for_others(sockets: Sequence[socket.socket]) -> str:
    """Return what other hosts are told of this one: an address that they reach, if it listens on any."""
    for one in sockets:
        address = ipaddress.ip_address(one.getsockname()[0])
        if address.is_unspecified:
            return socket.gethostname()
        if not address.is_loopback:
            return f"[{address}]" if address.version == 6 else str(address)
    return "127.0.0.1"
