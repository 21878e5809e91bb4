"""One connection of a client: heads in, answers out, one request after the other, until one side has enough.

It knows HTTP and limits, not what is asked: a handler gets the request, reads a small body, or takes the
socket over for disk bytes. What comes after a head stays in this connection's own buffer, so pipelined
requests are safe and a body of gigabytes never passes through the parser. The trap: answering before the body
was read means closing gently, else the client's kernel throws the answer away with the reset.
"""

from email.utils import formatdate
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_plus

import h11
import structlog
import trio

from gateway.http.request import HEAD_END, BadRequest, Request, parse_head
from gateway.http.wire import ThreadWire, Wire, WireBroken

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from gateway.core.limits import Limits

log = structlog.get_logger("gateway.http")

PLAIN_TEXT: Final = "text/plain"
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
# Of an answer; each may take the idle time, for an answer may be long and a line slow.
_PIECE: Final = 64 << 10
_LONGEST_TARGET: Final = 1000
_SECRET_KEYS: Final = frozenset({"session_id", "password", "pool_secret"})


class Connection:
    """The HTTP side of one wire. `handle` answers each request; without an answer the client gets a 500."""

    def __init__(
        self, wire: Wire, limits: "Limits", handle: "Callable[[Connection, Request], Awaitable[None]]"
    ) -> None:
        self.wire: Final = wire
        self.limits: Final = limits
        self._handle: Final = handle
        self._buffer = bytearray()
        self._protocol: h11.Connection | None = None
        self._request: Request | None = None
        self._keep_alive = False
        self._body_pending = False
        self._continue_pending = False
        self._answered: int | None = None
        self._bytes_sent = 0
        self._stopping = False
        self._stop = trio.Event()
        self._idle_scope: trio.CancelScope | None = None

    # --- the loop

    async def run(self) -> None:
        """Serve the connection until it ends. Closes the wire. Raises nothing but cancellation."""
        try:
            with trio.move_on_after(self.limits.header_seconds) as handshake:
                await self.wire.handshake()
            if handshake.cancelled_caught:
                return
            first = True
            while await self._one_request(first=first):
                first = False
                # Whoever sends on without reading is never waited for: everybody else gets a turn here.
                await trio.lowlevel.checkpoint()
        except (WireBroken, trio.TooSlowError) as broken:
            log.debug("connection broken", address=self.wire.address, why=str(broken))
        except Exception:
            # Outside of any request, and no matter of the others that are served.
            log.exception("connection failed", address=self.wire.address)
        finally:
            self.wire.close()

    def stop(self) -> None:
        """End at the next occasion: at once when no request is being served, else after its answer."""
        self._stopping = True
        self._stop.set()
        if self._idle_scope is not None:
            self._idle_scope.cancel()

    async def _one_request(self, *, first: bool) -> bool:
        """Serve one request; whether another may follow."""
        self._request = self._protocol = self._answered = None
        self._keep_alive = self._body_pending = self._continue_pending = False
        self._bytes_sent = 0
        started = monotonic()
        try:
            head = await self._read_head(first=first)
            if head is None:
                return False
            started = monotonic()
            request, self._protocol = parse_head(
                head, scheme=self.wire.scheme, address=self.wire.address, largest=self.limits.header_bytes + 1
            )
            self._request = request
            self._keep_alive = not request.wants_close and not self._stopping
            self._body_pending = request.has_body
            self._continue_pending = request.expects_continue and request.has_body
            await self._handle(self, request)
            assert self._answered is not None, "the handler gave no answer"
        except BadRequest as bad:
            await self._end_with(bad.status, bad.problem)
        except (WireBroken, trio.TooSlowError):
            self._keep_alive = False
            self._log_access(started, gone=True)
            return False
        except Exception:
            log.exception("request failed", address=self.wire.address, target=self._masked_target())
            await self._end_with(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "INTERNAL_ERROR: The gateway failed unexpectedly; see its log.",
            )
        self._log_access(started)
        if self.wire.closed:
            return False
        if self._keep_alive and not self._stopping:
            return True
        await self.wire.half_close_and_drain(
            self.limits.refusal_drain_bytes, self.limits.refusal_drain_seconds
        )
        return False

    async def _end_with(self, status: HTTPStatus, problem: str) -> None:
        """Answer what went wrong, if nothing was answered yet; the connection ends in any case."""
        self._keep_alive = False
        if self._answered is None:
            await self.respond(status, f"{problem}\n".encode())

    async def _read_head(self, *, first: bool) -> bytes | None:
        """The next head with its empty line; None if the client has gone or is silent. Raises BadRequest."""
        longest = self.limits.header_bytes
        if not await self._something_arrives(
            self.limits.header_seconds if first else self.limits.keepalive_idle
        ):
            return None
        with trio.move_on_after(self.limits.header_seconds):
            searched = 0
            while True:
                if self._buffer and self._buffer[0] in b"\r\n":  # empty lines before a request (RFC 9112 2.2)
                    del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))]
                if self._buffer and self._buffer[0] < 0x21:
                    raise BadRequest(
                        HTTPStatus.BAD_REQUEST, "This is no HTTP request; is it TLS on the plain port?"
                    )
                end = HEAD_END.search(self._buffer, max(0, searched - 3))
                if end is not None and end.end() <= longest:
                    head = bytes(self._buffer[: end.end()])
                    del self._buffer[: end.end()]
                    return head
                if end is not None or len(self._buffer) >= longest:
                    raise BadRequest(
                        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                        f"The request's head is longer than {longest} bytes; send a shorter one.",
                    )
                searched = len(self._buffer)
                received = await self.wire.receive_some()
                if not received:
                    return None
                self._buffer += received
        raise BadRequest(
            HTTPStatus.REQUEST_TIMEOUT,
            f"The request's head was not complete after {self.limits.header_seconds:g} s; send it faster.",
        )

    async def _something_arrives(self, seconds: float) -> bool:
        if self._buffer:
            return True
        if self._stopping:
            return False
        with trio.move_on_after(seconds) as self._idle_scope:
            self._buffer += await self.wire.receive_some()
        self._idle_scope = None
        return bool(self._buffer)

    # --- for handlers

    @property
    def answered(self) -> int | None:
        """The status that was sent, None before that."""
        return self._answered

    async def respond(
        self,
        status: HTTPStatus,
        body: bytes = b"",
        content_type: str = PLAIN_TEXT,
        headers: "Iterable[tuple[str, str]]" = (),
    ) -> None:
        """Send a whole answer. Raises WireBroken, trio.TooSlowError.

        A body that nobody has read makes this the connection's last answer.
        """
        sent = [("content-type", content_type), ("content-length", str(len(body))), *headers]
        await self.respond_head(status, sent, body=body)

    async def respond_head(
        self,
        status: HTTPStatus,
        headers: "Iterable[tuple[str, str]]",
        *,
        body: bytes = b"",
        close: bool = False,
    ) -> None:
        """Send the head of an answer, and `body` if it is at hand; what is missing of it the caller sends."""
        if self._body_pending or self._stopping or close:
            self._keep_alive = False
        lines = [("date", formatdate(usegmt=True)), *headers]
        if not self._keep_alive:
            lines.append(("connection", "close"))
        response = h11.Response(
            status_code=status.value,
            reason=status.phrase.encode("ascii"),
            headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in lines],
        )
        if self._protocol is None:  # the head was not understood
            self._protocol = h11.Connection(h11.SERVER)
        data = self._protocol.send(response)
        assert data is not None
        if self._request is not None and self._request.method == "HEAD":
            body = b""
        self._answered = status.value
        self._bytes_sent += len(body)
        await self.send(data + body)

    async def send(self, data: bytes) -> None:
        """Send raw bytes of an answer that has begun. Raises WireBroken, trio.TooSlowError for a client that
        takes next to nothing.
        """
        rest = memoryview(data)
        while rest:
            with trio.fail_after(self.limits.transfer_idle):
                await self.wire.send_all(rest[:_PIECE])
            rest = rest[_PIECE:]

    async def continue_body(self) -> None:
        """Send `100 Continue` if the client waits for it."""
        if self._continue_pending:
            self._continue_pending = False
            await self.send(_CONTINUE)

    async def ending(self) -> None:
        """Return when there is no use in waiting any more: the client has gone, or the gateway stops.

        For a handler that has read its body and waits for something to tell.
        """
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await self.wire.gone()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    async def read_body(self, limit: int) -> bytes:
        """The whole body of up to `limit` bytes. Raises BadRequest (411, 413, 408), WireBroken."""
        assert self._request is not None
        length = self._request.content_length
        if length is None or self._request.transfer_encoding is not None:
            raise BadRequest(HTTPStatus.LENGTH_REQUIRED, "The body has no length; send a Content-Length.")
        if length > limit:
            raise BadRequest(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The body of {length} bytes is larger than {limit} bytes; send a smaller one.",
            )
        await self.continue_body()
        with trio.move_on_after(self.limits.transfer_idle):
            while len(self._buffer) < length:
                received = await self.wire.receive_some()
                if not received:
                    raise WireBroken("the body ended early")
                self._buffer += received
            body = bytes(self._buffer[:length])
            del self._buffer[:length]
            self._body_pending = False
            return body
        raise BadRequest(
            HTTPStatus.REQUEST_TIMEOUT,
            f"The body was not complete after {self.limits.transfer_idle:g} s; send it faster.",
        )

    def take_body(self) -> ThreadWire:
        """The rest of the connection as a body for a worker thread, with what has already arrived of it.

        The answer is given on the same wire; no further request can follow.
        """
        self._keep_alive = False
        first = bytes(self._buffer)
        self._buffer.clear()
        return self.wire.for_thread(self.limits.transfer_idle, first)

    def take_sink(self) -> ThreadWire:
        """The wire as a sink for a worker thread, to send the body of the answer whose head was sent."""
        return self.wire.for_thread(self.limits.transfer_idle)

    def sent(self, count: int) -> None:
        """Count bytes of the answer that went through a sink, for the log."""
        self._bytes_sent += count

    def break_off(self) -> None:
        """End the connection so that the client sees that its answer is not whole."""
        self._keep_alive = False
        self.wire.reset()

    # --- the log

    def _masked_target(self) -> str:
        if self._request is None:
            return "-"
        request = self._request
        if not request.raw_query:
            return _shortened(request.raw_path)
        pairs = (pair.partition("=") for pair in request.raw_query.split("&"))
        masked = (
            f"{key}=***" if unquote_plus(key).lower() in _SECRET_KEYS else key + equals + value
            for key, equals, value in pairs
        )
        return _shortened(f"{request.raw_path}?{'&'.join(masked)}")

    def _log_access(self, started: float, *, gone: bool = False) -> None:
        log.info(
            "request",
            address=self.wire.address,
            method="-" if self._request is None else self._request.method,
            target=self._masked_target(),
            status=self._answered,
            sent=self._bytes_sent,
            seconds=round(monotonic() - started, 3),
            **({"client": "gone"} if gone else {}),
        )


def _shortened(target: str) -> str:
    """So that a stranger can't fill the log's disk with long requests."""
    return target if len(target) <= _LONGEST_TARGET else f"{target[:_LONGEST_TARGET]}…"
