"""What a transfer needs of the other side: a body that comes in, a sink that goes out.

Both are used by exactly one worker thread at a time, and both can be aborted from any other thread. A
transfer knows nothing of sockets, HTTP or TLS. The trap: no method may block for longer than the idle time-
out, because a thread that sleeps in the kernel can be woken but not cancelled.
"""

from typing import Protocol

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
