"""One answer of an HTTP server, fetched by a worker thread that can be woken at any time.

h11 reads what is HTTP. Bytes of a body of known length go straight from the socket into the caller's buffer.

The trap: a server may send a byte now and then and so hold a transfer for ever. What counts is therefore
not silence: in as much waiting as the patience allows, a good piece has to come.
"""

import select
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Final

import h11

from gateway.core.errors import XenAPIError
from gateway.transfers.pull_socket import Broken, Interrupt, Patience, open_socket
from gateway.transfers.pull_source import ImageURL, PullRules, WrongURL

MOST_REDIRECTS: Final = 5
# In `Patience.idle` seconds of waiting so much has to come.
LEAST_BYTES: Final = 64 << 10
_MOST_INFORMATION: Final = 16
_HEAD_BYTES: Final = 64 << 10
_PIECE_BYTES: Final = 256 << 10
# One look so often, so that the few last bytes below the low-water mark are not waited for long.
_LOOK_SECONDS: Final = 0.25
_REDIRECTIONS: Final = frozenset({301, 302, 303, 307, 308})
_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Client:
    """What all requests of one transfer have in common."""

    rules: PullRules
    patience: Patience
    interrupt: Interrupt

    def get(self, url: ImageURL, headers: dict[str, str]) -> "Answer":
        """The answer to a GET, redirections followed; its status is 200, 206 or 416. Blocks.

        Raises Broken, TransferAborted, and XenAPIError: PULL_ERROR_ADDRESS_REFUSED, PULL_ERROR_CERTIFICATE,
        PULL_ERROR_STATUS, PULL_ERROR_REDIRECT, PULL_ERROR_NOT_HTTP.
        """
        for _ in range(MOST_REDIRECTS + 1):
            answer = Answer(self, url)
            try:
                answer.ask(headers)
                if answer.status not in _REDIRECTIONS:
                    _require_good(answer)
                    return answer
                try:
                    following = url.redirected(answer.header("location") or "")
                except WrongURL as wrong:
                    raise XenAPIError("PULL_ERROR_REDIRECT", str(url), str(wrong)) from None
            except BaseException:
                answer.close()
                raise
            answer.close()
            url = following
        raise XenAPIError("PULL_ERROR_REDIRECT", str(url), f"there are more than {MOST_REDIRECTS} of them")


def _require_good(answer: "Answer") -> None:
    status = answer.status
    if status in (200, 206, 416):
        return
    error = XenAPIError("PULL_ERROR_STATUS", str(answer.url), str(status))
    if status in _BUSY:
        raise Broken(error)
    raise error


class Answer:
    """One connection, from its begin to the end of its answer. Used by one thread."""

    def __init__(self, client: Client, url: ImageURL) -> None:
        self.url: Final = url
        self.status = 0
        self.length: int | None = None
        """Bytes of the body, None if the head doesn't say it."""
        self.end_is_told = False
        self._client = client
        self._headers: dict[str, str] = {}
        self._socket: socket.socket | None = None
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
        self._ahead = memoryview(b"")
        self._left: int | None = None
        self._chunked = False
        self._ended = False
        self._waited = 0.0
        self._since = 0
        self._low_water = 1

    def header(self, name: str) -> str | None:
        """The value of a header, its name in lower case."""
        return self._headers.get(name)

    def close(self) -> None:
        """Break the connection off. Repeatable."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- the connection

    def ask(self, headers: dict[str, str]) -> None:
        """Connect, send the request and read the head of the answer. Raises as Client.get."""
        client = self._client
        self._socket = open_socket(self.url, client.rules, client.patience, client.interrupt)
        self._send(headers)
        self._read_head()

    def _wait_until(self, events: int, until: float) -> None:
        assert self._socket is not None
        if not self._client.interrupt.wait(self._socket.fileno(), events, until - monotonic()):
            raise self._broken("it did not answer in time")

    def _broken(self, why: str, count: int = 0) -> Broken:
        return Broken(XenAPIError("PULL_ERROR_BROKEN_OFF", str(self.url), str(count), why))

    # --- the request and the head of the answer

    def _send(self, headers: dict[str, str]) -> None:
        sent = {
            "Host": self.url.authority,
            "User-Agent": "vdi-gateway",
            "Accept": "*/*",
            # The checksum is of the file as it lies there.
            "Accept-Encoding": "identity",
            "Connection": "close",
            **headers,
        }
        if self.url.authorization is not None:
            sent["Authorization"] = self.url.authorization
        request = h11.Request(method="GET", target=self.url.target, headers=list(sent.items()))
        data = (self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b"")
        until = monotonic() + self._client.patience.idle
        assert self._socket is not None
        while data:
            try:
                data = data[self._socket.send(data) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._wait_until(select.POLLOUT, until)
            except ssl.SSLWantReadError:
                self._wait_until(select.POLLIN, until)
            except OSError as error:
                raise self._broken(_said(error)) from error

    def _read_head(self) -> None:
        until = monotonic() + self._client.patience.idle
        informational = 0
        while True:
            event = self._next_event()
            if event is h11.NEED_DATA:
                self._feed(until)
            elif isinstance(event, h11.InformationalResponse) and informational < _MOST_INFORMATION:
                informational += 1
            elif isinstance(event, h11.Response):
                self._begin_body(event)
                return
            else:
                raise XenAPIError("PULL_ERROR_NOT_HTTP", str(self.url), "there is no answer to the request")

    def _next_event(self) -> object:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:
            if self._ended:
                raise self._broken("the connection was closed before the answer") from error
            raise XenAPIError("PULL_ERROR_NOT_HTTP", str(self.url), str(error)) from error

    def _feed(self, until: float) -> None:
        """Give h11 what comes next."""
        assert self._socket is not None
        while True:
            try:
                data = self._socket.recv(_HEAD_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait_until(select.POLLIN, until)
            except ssl.SSLWantWriteError:
                self._wait_until(select.POLLOUT, until)
            except OSError as error:
                raise self._broken(_said(error)) from error
            else:
                self._ended = not data
                self._http.receive_data(data)
                return

    def _begin_body(self, response: h11.Response) -> None:
        self.status = response.status_code
        for name, value in response.headers:
            self._headers.setdefault(name.decode("ascii").lower(), value.decode("latin-1"))
        self._chunked = "transfer-encoding" in self._headers
        if not self._chunked:
            length = self.header("content-length")
            # h11 has looked that it is a number, and one alone.
            self.length = self._left = None if length is None else int(length)
            self._ahead = memoryview(bytes(self._http.trailing_data[0]))
        self.end_is_told = self._chunked or self.length is not None

    # --- the body

    def recv_into(self, view: memoryview) -> int:
        """Fill the beginning of `view`; 0 is the end of a body that is whole as far as can be known.

        Raises Broken, TransferAborted.
        """
        # A server that is quick enough is never waited for.
        self._client.interrupt.check()
        if self._left is not None:
            view = view[: self._left]
        if not view:
            return 0
        if not self._ahead and self._chunked:
            self._next_chunk()
        if self._ahead:
            count = min(len(view), len(self._ahead))
            view[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
        elif self._ended:
            return 0
        else:
            count = self._receive(view)
            self._ended = not count
        if self._left is not None:
            self._left -= count
            if not count:
                raise self._broken(f"it was closed {self._left} bytes before its end")
        return count

    def _next_chunk(self) -> None:
        piece = bytearray(_PIECE_BYTES)
        while not self._ahead and not self._ended:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise self._broken(str(error)) from error
            if isinstance(event, h11.Data):
                self._ahead = memoryview(bytes(event.data))
            elif event is h11.NEED_DATA:
                with memoryview(piece) as view:
                    count = self._receive(view)
                self._http.receive_data(bytes(piece[:count]))
            else:
                self._ended = True

    def _receive(self, view: memoryview) -> int:
        """Some bytes from the socket, 0 at its end. Raises Broken, TransferAborted."""
        assert self._socket is not None
        plain = not isinstance(self._socket, ssl.SSLSocket)
        while True:
            events = select.POLLIN
            try:
                count = self._socket.recv_into(view)
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except ssl.SSLZeroReturnError:
                return 0
            except OSError as error:
                raise self._broken(_said(error)) from error
            else:
                self._note(count)
                return count
            if plain:
                self._set_low_water(min(_PIECE_BYTES, len(view)))
            before = monotonic()
            self._client.interrupt.wait(self._socket.fileno(), events, _LOOK_SECONDS)
            self._waited += monotonic() - before
            if self._waited >= self._client.patience.idle:
                raise self._broken(f"almost nothing came for {self._client.patience.idle:g} s")

    def _note(self, count: int) -> None:
        self._since += count
        if self._since >= LEAST_BYTES:
            self._since, self._waited = 0, 0.0

    def _set_low_water(self, count: int) -> None:
        if count != self._low_water and self._socket is not None:
            self._low_water = count
            with suppress(OSError):  # a socket that is gone says so to the next recv
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)


def _said(error: OSError) -> str:
    if isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", "") == "UNEXPECTED_EOF_WHILE_READING":
        return "the connection was cut off"
    return error.strerror or str(error) or type(error).__name__
