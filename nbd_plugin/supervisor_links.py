"""The supervisor's control socket: gateways that are connected get its log and its status, and give orders.

    supervisor: {"status": {...}}, {"log": {"level": ..., "event": ..., "about": {...}}}
    gateway:    {"do": "stop"}, {"do": "drain"}, {"do": "renew", "tls": DIRECTORY}

One object of JSON a line, both ways. The trap: a gateway that hangs must not hold the supervisor up; what its
socket doesn't take at once is dropped with the connection.
"""

import json
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from nbd_plugin.supervisor_events import Events
from nbd_plugin.supervisor_log import Log

_LONGEST_ORDER: Final = 65536
_AGAIN_SECONDS: Final = 1.0


class _Link:
    """One connection."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self._received = b""

    def send(self, message: dict[str, Any]) -> bool:
        """False when the other side is gone or doesn't read."""
        data = json.dumps(message).encode() + b"\n"
        try:
            sent = self.socket.send(data)
            if sent < len(data):
                self.socket.shutdown(socket.SHUT_RDWR)  # what came next would be read as the rest
        except OSError:
            return False
        return sent == len(data)

    def orders(self) -> list[dict[str, Any]] | None:
        """What has come, None at the end."""
        try:
            data = self.socket.recv(_LONGEST_ORDER)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > _LONGEST_ORDER:
            return None
        try:
            return [order for order in map(json.loads, lines) if isinstance(order, dict)]
        except (ValueError, RecursionError):
            return None


class Links:
    """The connections of one listening socket, which is closed with `close`.

    `status` says how things are, and `obey` gets each order.
    """

    def __init__(
        self,
        listening: socket.socket,
        events: Events,
        log: Log,
        *,
        status: Callable[[], dict[str, Any]],
        obey: Callable[[dict[str, Any]], None],
    ) -> None:
        listening.setblocking(False)
        self._listening: Final = listening
        self._events: Final = events
        self._log: Final = log
        self._status: Final = status
        self._obey: Final = obey
        self._links: set[_Link] = set()
        self._told: dict[str, Any] = {}
        self.again_at: float | None = None
        """When `accept_again` is due: there was no descriptor left for who has connected."""
        events.watch(listening.fileno(), self._accept)

    def __len__(self) -> int:
        return len(self._links)

    def tell_status(self) -> None:
        """Let everybody know what has changed since the last time."""
        status = self._status()
        if status == self._told:
            return
        self._told = status
        for link in set(self._links):
            if not link.send({"status": status}):
                self._drop(link)

    def close(self) -> None:
        """Accept nobody any more; who is connected stays. Twice is allowed."""
        self.again_at = None
        if self._listening.fileno() >= 0:
            self._events.forget(self._listening.fileno())
            self._listening.close()

    def accept_again(self, now: float) -> None:
        """Look again for who has connected, if that is due."""
        if self.again_at is not None and now >= self.again_at:
            self.again_at = None
            self._events.watch(self._listening.fileno(), self._accept)

    def end(self) -> None:
        """Disconnect everybody."""
        for link in set(self._links):
            self._drop(link)

    def _accept(self) -> None:
        try:
            connected, _ = self._listening.accept()
        except BlockingIOError:
            return
        except OSError:
            # Who waits is told of without end, so that the supervisor would do nothing else.
            self._events.forget(self._listening.fileno())
            self.again_at = time.monotonic() + _AGAIN_SECONDS
            return
        link = _Link(connected)
        self._links.add(link)
        self._log.link = link.send
        self._events.watch(connected.fileno(), partial(self._hear, link))
        link.send({"status": self._status()})

    def _hear(self, link: _Link) -> None:
        orders = link.orders()
        for order in orders or ():
            self._obey(order)
        if orders is None:
            self._drop(link)

    def _drop(self, link: _Link) -> None:
        self._events.forget(link.socket.fileno())
        link.socket.close()
        self._links.discard(link)
        self._log.link = next(iter(self._links)).send if self._links else None
