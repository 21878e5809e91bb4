"""Which bytes of a disk a GET is about: Range and what it may depend on (RFC 9110, sections 13 and 14).

No I/O. One range is honoured; several at once get the whole, which the RFC allows and which every client that
asks for several understands. A Range that can't be read counts as none.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_RANGE: Final = re.compile(r"bytes[ \t]*=[ \t]*([0-9]{0,19})[ \t]*-[ \t]*([0-9]{0,19})[ \t]*", re.IGNORECASE)
_TAG: Final = re.compile(r'(?:W/)?("[^"]*")')


class UnsatisfiableRange(Exception):  # noqa: N818 - what the range is
    """The range lies outside of the disk: 416."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes from `start` up to `stop`, not included."""

    start: int
    stop: int

    def content_range(self, size: int) -> str:
        """The value of the Content-Range header."""
        return f"bytes {self.start}-{self.stop - 1}/{size}"


def requested_range(headers: "Mapping[str, str]", size: int, tag: str) -> ByteRange | None:
    """The range that is asked for, None for the whole. Raises UnsatisfiableRange.

    With an If-Range that isn't this very content's tag the whole is sent. A date never matches, since disks
    have no Last-Modified; weak tags never match either, since ranges of different bytes must not be joined.
    """
    value = headers.get("range")
    if value is None or ("if-range" in headers and headers["if-range"].strip() != tag):
        return None
    match = _RANGE.fullmatch(value.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= stop:
        raise UnsatisfiableRange
    return ByteRange(start, stop)


def is_another(headers: "Mapping[str, str]", tag: str) -> bool:
    """Whether If-Match names other contents alone, so that 412 is the answer; a weak tag never matches."""
    value = headers.get("if-match")
    if value is None or value.strip() == "*":
        return False
    return tag not in (each.strip() for each in value.split(","))


def is_unchanged(headers: "Mapping[str, str]", tag: str) -> bool:
    """Whether If-None-Match names this content, so that 304 is the answer."""
    value = headers.get("if-none-match")
    if value is None:
        return False
    return value.strip() == "*" or tag in _TAG.findall(value)
