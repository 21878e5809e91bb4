"""A body with `transfer-encoding: chunked`: the lengths between its pieces are taken out (RFC 9112 7.1).

The trap: whoever asks a socket for more than still comes waits in vain, so a length is read by as few bytes
as it can have, and only the bytes of a piece are asked for in bulk.
"""

from typing import TYPE_CHECKING, Final

from gateway.transfers.body import BodyReset, BodyStalled

if TYPE_CHECKING:
    from gateway.transfers.body import Body

_LONGEST_LINE: Final = 256  # with extensions, which mean nothing here
_SHORTEST: Final = 3  # a line feed, a digit, a line feed
_MOST_TRAILERS: Final = 64
_DIGITS: Final = frozenset(b"0123456789abcdefABCDEF")


class ChunkedBody:
    """The bytes within another body's chunks. One that is cut off, or is no such body, is BodyReset."""

    def __init__(self, body: "Body") -> None:
        self._body: Final = body
        self._left = 0  # of the present chunk
        self._first = True
        self._ended = False

    def recv_into(self, view: memoryview) -> int:
        """As Body.recv_into. 0 is the end that was told."""
        if not self._left and not self._ended:
            self._begin_chunk()
        if self._ended or not view:
            return 0
        got = self._body.recv_into(view[: min(len(view), self._left)])
        if not got:
            raise BodyReset("the body ended within a chunk")
        self._left -= got
        return got

    def more_within(self, _seconds: float) -> bool:
        """Whether there is a further byte, however long it takes: the end is told."""
        try:
            return self.recv_into(memoryview(bytearray(1))) > 0
        except (BodyReset, BodyStalled):
            return False

    def abort(self) -> None:
        """As Body.abort."""
        self._body.abort()

    def _begin_chunk(self) -> None:
        if self._first:
            begin = b""
        else:
            # The end of the chunk before and the line that follows have at least so many bytes.
            begin = self._exactly(_SHORTEST)
            if begin[:2] == b"\r\n":
                begin = begin[2:]
            elif begin[:1] == b"\n":
                begin = begin[1:]
            else:
                raise BodyReset("a chunk is longer than it said")
        self._first = False
        digits = self._line(begin).partition(b";")[0].strip(b" \t")
        if not digits or len(digits) > 15 or not _DIGITS.issuperset(digits):
            raise BodyReset("a chunk has no length")
        self._left = int(digits, 16)
        if self._left:
            return
        for _ in range(_MOST_TRAILERS):
            if not self._line():
                self._ended = True
                return
        raise BodyReset("there is no end of the trailers")

    def _exactly(self, count: int) -> bytes:
        data = bytearray(count)
        with memoryview(data) as view:
            filled = 0
            while filled < count:
                got = self._body.recv_into(view[filled:])
                if not got:
                    raise BodyReset("the body ended between two chunks")
                filled += got
        return bytes(data)

    def _line(self, begin: bytes = b"") -> bytes:
        """The bytes up to the next line feed, without it and the carriage return before it.

        `begin` are those that were read already; they hold no line feed but at their end.
        """
        if begin.endswith(b"\n"):
            return begin.rstrip(b"\r\n")
        line = bytearray(begin)
        byte = bytearray(1)
        with memoryview(byte) as view:
            while len(line) < _LONGEST_LINE:
                if not self._body.recv_into(view):
                    raise BodyReset("the body ended between two chunks")
                if byte == b"\n":
                    return bytes(line.removesuffix(b"\r"))
                line += byte
        raise BodyReset("the line before a chunk is too long")
