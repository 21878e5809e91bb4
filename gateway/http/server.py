"""Listening sockets, the limit of connections, and an orderly end.

A Server accepts on any number of sockets, plain and TLS, and runs one Connection for each client in one
nursery.
The trap: at the limit a client must be told at once; leaving it in the backlog looks like a dead server.
"""

import contextlib
import errno
import os
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
import trio

from gateway.core.network import network_of
from gateway.core.peer import peer_of
from gateway.http.connection import Connection
from gateway.http.wire import Wire, peer_address

if TYPE_CHECKING:
    from gateway.core.limits import Limits
    from gateway.http.routes import Routes

log = structlog.get_logger("gateway.http")

_BACKLOG: Final = 256
_PAUSE_WITHOUT_DESCRIPTORS: Final = 0.1
_BUSY: Final = b"Too many connections are open; try again later.\n"
_BUSY_ANSWER: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 5\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_BUSY), _BUSY)
)


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound and listening socket; `tls` is asked for the context of each connection: it can be reloaded."""

    socket: socket.socket
    tls: Callable[[], ssl.SSLContext] | None = None


def listen(host: str, port: int) -> list[socket.socket]:
    """Bind and listen on every address of `host` (names may have several). Raises OSError.

    With port 0 all addresses get the same free port.
    """
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(addresses):
            bound = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = sockets[0].getsockname()[1] if len(sockets) > 1 else port
            bound.bind((address[0], chosen, *address[2:]))
            bound.listen(_BACKLOG)
            bound.setblocking(False)
    except BaseException:
        for opened in sockets:
            opened.close()
        raise
    return sockets


def listen_locally(path: str, mode: int = 0o600) -> socket.socket:
    """Bind and listen on a Unix socket; by default only this user and root may connect. Raises OSError.

    What is at `path` is removed: the caller knows that nobody listens there any more. The path may be of any
    length, unlike that of a socket address.
    """
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name = os.path.basename(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        # Nobody can connect before listen(), and by then the permissions are right.
        bound.bind(f"/proc/self/fd/{directory}/{name}")
        os.chmod(name, mode, dir_fd=directory)
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    finally:
        os.close(directory)
    return bound


class Server:
    """Runs connections on `routes` until stop()."""

    def __init__(self, routes: "Routes", limits: "Limits") -> None:
        self._routes: Final = routes
        self._limits: Final = limits
        self._connections: set[Connection] = set()
        self._by_network: Counter[str] = Counter()
        self._accepting = trio.CancelScope()

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    async def run(
        self,
        listeners: Sequence[Listener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve until stop() or cancellation. Closes the listening sockets."""
        try:
            async with trio.open_nursery() as connections:
                with self._accepting:
                    async with trio.open_nursery() as accepting:
                        for listener in listeners:
                            listener.socket.setblocking(False)
                            accepting.start_soon(self._accept, listener, connections)
                        task_status.started()
                _close_all(listeners)
                with trio.move_on_after(self._limits.shutdown_seconds):
                    while self._connections:
                        for connection in list(self._connections):
                            connection.stop()
                        await trio.sleep(0.02)
                connections.cancel_scope.cancel()
        finally:
            _close_all(listeners)

    def stop(self) -> None:
        """Accept no more, close idle connections, and give requests limits.shutdown_seconds to finish."""
        self._accepting.cancel()

    async def _accept(self, listener: Listener, connections: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.socket)
            try:
                accepted, _ = listener.socket.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                # A client that gave up before it was accepted is no event; no descriptors is one, and passes.
                if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                    log.warning("cannot accept a connection", why=str(error))
                    await trio.sleep(_PAUSE_WITHOUT_DESCRIPTORS)
                continue
            if not _is_welcome(accepted):
                accepted.close()
                continue
            network = network_of(peer_address(accepted))
            # The administrator on this machine comes in also when the network has taken all there are.
            if accepted.family != socket.AF_UNIX and not self._has_room_for(network):
                _turn_away(accepted, tls=listener.tls is not None)
                continue
            try:
                wire = Wire(accepted, listener.tls() if listener.tls is not None else None)
            except (OSError, ValueError) as error:
                log.debug("connection lost before it began", why=str(error))
                accepted.close()
                continue
            connection = Connection(wire, self._limits, self._routes.handle)
            self._connections.add(connection)
            self._by_network[network] += 1
            connections.start_soon(self._serve, connection, network)

    async def _serve(self, connection: Connection, network: str) -> None:
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._by_network[network] -= 1
            if not self._by_network[network]:
                del self._by_network[network]

    def _has_room_for(self, network: str) -> bool:
        return (
            len(self._connections) < self._limits.connections
            and self._by_network[network] < self._limits.connections_per_address
        )


def _is_welcome(accepted: socket.socket) -> bool:
    """Whether this user may come in: through a Unix socket the gateway's own and root alone may.

    The permissions of the socket say the same; this holds where its directory was opened to others.
    """
    if accepted.family != socket.AF_UNIX:
        return True
    peer = peer_of(accepted)
    if peer.uid in {0, os.geteuid()}:
        return True
    log.warning("another user came to the local socket and was sent away", uid=peer.uid, process=peer.process)
    return False


def _turn_away(accepted: socket.socket, *, tls: bool) -> None:
    """Tell a client that there are too many, as far as that costs no waiting."""
    with contextlib.suppress(OSError), accepted:
        accepted.setblocking(False)
        if not tls:
            accepted.send(_BUSY_ANSWER)
            accepted.shutdown(socket.SHUT_WR)
            accepted.recv(65536)  # what has come of its request would turn our close into a reset


def _close_all(listeners: Sequence[Listener]) -> None:
    for listener in listeners:
        if listener.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(listener.socket)
            listener.socket.close()
