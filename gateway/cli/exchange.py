"""One HTTP request on a socket of its own, for the bytes of a disk.

http.client reads ahead into buffers of its own and hides the socket; here a body goes between the socket and
one large buffer, or from a file to the socket within the kernel. The trap: the answer to an upload begins
before the body is sent, and its last line may come at any time; `spoke` asks for it without waiting.
"""

import errno
import http.client
import io
import os
import select
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from gateway.cli.door import Door, block
from gateway.cli.output import CommandError

_HEAD_BYTES: Final = 64 << 10
PIECE_BYTES: Final = 1 << 20
_STALLS: Final = (BlockingIOError, TimeoutError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
SENDFILE_BYTES: Final = 4 << 20


class ConnectionLostError(CommandError):
    """The connection broke, or nothing came through it for too long; trying again may help."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers (lower case) of an answer."""

    status: int
    headers: Mapping[str, str]

    @property
    def length(self) -> int | None:
        """Bytes of the body, if it says so."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdecimal() else None


class Exchange:
    """A request and its answer. Every failure of the connection is ConnectionLostError.

    When nothing has moved for two minutes that is one, unless `waits` knows that the other side is at work.
    """

    def __init__(self, door: Door, waits: Callable[[], bool] = lambda: False) -> None:
        self._door = door
        self._waits = waits
        self._socket = door.open()
        self._ahead = bytearray()
        block(self._socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Break off, or end; the other side sees the end of the connection."""
        self._socket.close()

    def request(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        """Send the head of a request."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._door.host}", "User-Agent: vdi-gateway"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def answer(self) -> Head:
        """Wait for the head of the answer; a 100 before it is passed over."""
        while True:
            while (end := self._ahead.find(b"\r\n\r\n")) < 0:
                if len(self._ahead) > _HEAD_BYTES or not self._fill():
                    raise ConnectionLostError(f"{self._door.url} ended the connection without an answer")
            head = bytes(self._ahead[: end + 4])
            del self._ahead[: end + 4]
            first, _, rest = head.partition(b"\r\n")
            words = first.split(None, 2)
            if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
                raise CommandError(f"{self._door.url} doesn't answer as a gateway does; check the address")
            fields = http.client.parse_headers(io.BytesIO(rest))
            if int(words[1]) != 100:
                return Head(int(words[1]), {name.lower(): value for name, value in fields.items()})

    def recv_into(self, view: memoryview) -> int:
        """Some bytes of the body; 0 when the connection has ended."""
        if self._ahead:
            count = min(len(self._ahead), len(view))
            view[:count] = self._ahead[:count]
            del self._ahead[:count]
            return count
        try:
            return self._moved(self._socket.recv_into, view)
        except (OSError, ssl.SSLError) as error:
            raise self._lost(error) from None

    def rest(self, limit: int = _HEAD_BYTES) -> bytes:
        """What still comes, up to `limit` bytes or the end of the connection."""
        try:
            while len(self._ahead) < limit and self._fill():
                pass
        except ConnectionLostError:
            pass  # what came before is all there is
        return bytes(self._ahead[:limit])

    def send(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        left = memoryview(data)
        try:
            while left:
                left = left[self._moved(self._socket.send, left) :]
        except (OSError, ssl.SSLError) as error:
            raise self._lost(error) from None

    @property
    def can_sendfile(self) -> bool:
        """Whether the kernel can send files by itself: not through TLS."""
        return not isinstance(self._socket, ssl.SSLSocket)

    def sendfile(self, fd: int, offset: int, count: int) -> int:
        """Send up to `count` bytes of a file; how many were sent, 0 where the file ends.

        OSError when the file can't be read (so).
        """
        try:
            return self._moved(os.sendfile, self._socket.fileno(), fd, offset, count)
        except (ConnectionError, BlockingIOError, TimeoutError) as error:
            raise self._lost(error) from None

    def spoke(self) -> bool:
        """Whether the other side has sent something, or has gone."""
        if self._ahead or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLRDHUP)
        return bool(poll.poll(0))

    def _fill(self) -> bool:
        try:
            data = bytearray(_HEAD_BYTES)
            count = self._moved(self._socket.recv_into, data)
        except (OSError, ssl.SSLError) as error:
            raise self._lost(error) from None
        self._ahead += data[:count]
        return bool(count)

    def _moved(self, call: Callable[..., int], *arguments: object) -> int:
        """What a call on the socket has moved. Raises what it raises."""
        while True:
            try:
                return call(*arguments)
            except _STALLS as stall:
                if not _is_stall(stall) or not self._waits():
                    raise

    def _lost(self, error: OSError) -> ConnectionLostError:
        text = "nothing moved for two minutes" if _is_stall(error) else error.strerror or str(error)
        return ConnectionLostError(f"the connection to {self._door.url} broke: {text}")


def _is_stall(error: OSError) -> bool:
    """Whether nothing came in time, over a connection that may be sound."""
    return isinstance(error, _STALLS) and error.errno != errno.ETIMEDOUT
