"""What a transfer needs of the other side: a body that comes in, a sink that goes out.

Both are used by exactly one worker thread at a time, and both can be aborted from any other thread. A
transfer knows nothing of sockets, HTTP or TLS. `BodyReader` gives a body by exact amounts to those that
parse it. The trap: no method may block for longer than the idle time-out, because a thread that sleeps in the
kernel can be woken but not cancelled.
"""

from typing import Final, Protocol

_SKIP_BYTES: Final = 256 << 10

Bytes = bytes | bytearray | memoryview


class TransferAborted(Exception):  # noqa: N818 - a state of the transfer
    """Somebody called abort(): the transfer was cancelled or the gateway is stopping."""


class BodyReset(Exception):  # noqa: N818 - a state of the transfer
    """The connection broke while the body was being read."""


class BodyStalled(Exception):  # noqa: N818 - a state of the transfer
    """Nothing arrived for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing arrived for {seconds:g} s")
        self.seconds = seconds


class BodyEnded(Exception):  # noqa: N818 - a state of the transfer
    """The body ended after `count` bytes, and at least `needed` were expected."""

    def __init__(self, needed: int, count: int) -> None:
        super().__init__(f"the body ended after {count} of {needed} bytes")
        self.needed = needed
        self.count = count


class SinkClosed(Exception):  # noqa: N818 - a state of the transfer
    """The receiver has gone: it closed or reset the connection."""


class SinkStalled(Exception):  # noqa: N818 - a state of the transfer
    """The receiver took nothing for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the receiver took nothing for {seconds:g} s")
        self.seconds = seconds


class Body(Protocol):
    """Bytes that come in, in order, once."""

    def recv_into(self, view: memoryview) -> int:
        """Fill the beginning of `view` and return how many bytes came: 0 is the end of the body.

        The caller never asks for more bytes than it still expects, so an implementation may wait until a
        good part of `view` has arrived. Raises BodyStalled, BodyReset, TransferAborted.
        """

    def more_within(self, seconds: float) -> bool:
        """Whether a further byte arrives within `seconds`; end of file, reset and silence are False.

        Raises TransferAborted.
        """

    def abort(self) -> None:
        """Wake a blocked call at once; it and all later ones raise TransferAborted. From any thread."""


class Sink(Protocol):
    """Where bytes go. Every method raises SinkClosed, SinkStalled, TransferAborted."""

    def send(self, data: Bytes) -> None:
        """Send all of `data`."""

    def sendfile(self, fd: int, offset: int, length: int) -> None:
        """Send `length` bytes of the file from `offset`. A file that ends before is OSError(EIO)."""

    def zeroes(self, length: int) -> None:
        """Send `length` zero bytes."""

    def abort(self) -> None:
        """As Body.abort."""


class BodyReader:
    """A body read by exact amounts. `position` is how many bytes have been taken, `received` how many came.

    `length` is the length of the whole body in bytes, None if nobody knows it; then `end_is_told` says
    whether the protocol tells the end, so that a body that was cut off can't be taken for a whole one.
    Everything raises what Body.recv_into raises, but a reset ends the body as its end does: `broken` tells.
    """

    def __init__(self, body: Body, length: int | None, *, end_is_told: bool = False) -> None:
        self.body: Final = body
        self.length: Final = length
        self.end_is_told: Final = end_is_told
        self.position = 0
        self.received = 0
        self.broken = False
        self._ahead = b""
        self._ended = False

    def peek(self, count: int) -> bytes:
        """The next `count` bytes, which stay there; fewer only where the body ends."""
        missing = count - len(self._ahead)
        if missing > 0:
            more = bytearray(missing)
            with memoryview(more) as view:
                got = self._receive(view)
            self._ahead += more[:got]
        return self._ahead[:count]

    def fill(self, view: memoryview) -> int:
        """Fill `view`; how many bytes came, fewer only where the body ends."""
        filled = min(len(view), len(self._ahead))
        if filled:
            view[:filled] = self._ahead[:filled]
            self._ahead = self._ahead[filled:]
        filled += self._receive(view[filled:])
        self.position += filled
        return filled

    def fill_whole(self, view: memoryview) -> None:
        """Fill all of `view`. Raises BodyEnded."""
        needed = self.position + len(view)
        if self.fill(view) < len(view):
            raise BodyEnded(needed, self.position)

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises BodyEnded."""
        data = bytearray(count)
        with memoryview(data) as view:
            self.fill_whole(view)
        return bytes(data)

    def skip(self, count: int) -> None:
        """Throw `count` bytes away. Raises BodyEnded."""
        needed = self.position + count
        if self.length is not None and needed > self.length:
            raise BodyEnded(needed, self.length)
        scratch = memoryview(bytearray(min(count, _SKIP_BYTES)))
        while self.position < needed:
            if not self.fill(scratch[: needed - self.position]):
                raise BodyEnded(needed, self.position)

    def require_whole(self) -> None:
        """Raise BodyEnded if the body has ended before it was whole, as far as that can be known."""
        if self.length is not None and self.received < self.length:
            raise BodyEnded(self.length, self.received)
        if self.broken:
            raise BodyEnded(self.received + 1, self.received)

    def fraction(self, expected: int) -> float:
        """How much of `expected` bytes has been taken; 0.0 if nothing is expected."""
        return min(1.0, self.position / expected) if expected else 0.0

    def _receive(self, view: memoryview) -> int:
        wanted = len(view)
        if self.length is not None:
            wanted = min(wanted, self.length - self.received)
        filled = 0
        while filled < wanted and not self._ended:
            try:
                got = self.body.recv_into(view[filled:wanted])
            except BodyReset:
                got = 0
                self.broken = True
            if not got:
                self._ended = True
            filled += got
            self.received += got
        return filled
