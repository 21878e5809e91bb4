"""A disk becoming a stream of bytes: an ordered list of parts with known offsets and a known total size.

Every format that goes out is a Layout: literal bytes, tables that are made when they are sent, and ranges or
blocks of disks, one after another. The size and all offsets are known before the first byte, so one
implementation gives Content-Length, Range and HEAD. Segments are made lazily, as they are sent: a Layout of a
2 TiB disk costs no more than the numbers of its blocks.

The trap: a chain of sparse bitmaps can cut a block into sector-sized runs, and one `sendfile` for each would
drown in system calls. Short neighbours are therefore handed out together, as one `Gather` to be read into
one buffer; only runs of SENDFILE_MINIMUM bytes and more are handed out as ranges for `sendfile`.
"""

import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from gateway.images.disk import Disk, FileRange, Hole, Literal, Segment

if TYPE_CHECKING:
    from array import array

SENDFILE_MINIMUM: Final = 64 * 1024
"""From this length on (bytes) a run of an image file is cheaper to send by `sendfile` than to read."""

GATHER_MAXIMUM: Final = 256 * 1024
"""A Gather never holds more bytes than this, so a sender's buffer can be of this fixed size."""

LAYOUT_VERSION: Final = 1
"""Counted up when the bytes of any exported format change while the disk's bytes don't: it is in the ETag."""


@dataclass(frozen=True, slots=True)
class DiskRange:
    """A part of a Layout: `length` bytes of a disk from `offset` on."""

    disk: Disk
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DiskBlocks:
    """A part of a Layout: many blocks of a disk, in the order of their numbers, each behind the same bytes.

    What the last block of a disk has beyond the disk's end is sent as zeroes.
    """

    disk: Disk
    blocks: "array[int]"
    block_size: int
    prefix: bytes = b""

    @property
    def length(self) -> int:
        """Return the number of bytes."""
        return len(self.blocks) * (len(self.prefix) + self.block_size)


@dataclass(frozen=True, slots=True)
class Computed:
    """A part of a Layout: bytes that are made when they are sent, because all at once they would be many.

    `make(n)` returns the bytes from `n * piece` on: `piece` of them, or what is left of `length`.
    """

    length: int
    piece: int
    make: Callable[[int], bytes]


Part = Literal | DiskRange | DiskBlocks | Computed


@dataclass(frozen=True, slots=True)
class Gather:
    """Short neighbouring pieces that are best read into one buffer: at most GATHER_MAXIMUM bytes."""

    pieces: tuple[Segment, ...]
    length: int

    def read_into(self, buffer: memoryview) -> None:
        """Fill the first `length` bytes of `buffer`. Raises OSError; EIO if an image file was cut."""
        position = 0
        for piece in self.pieces:
            view = buffer[position : position + piece.length]
            match piece:
                case FileRange():
                    _pread_all(piece, view)
                case Literal():
                    view[:] = piece.data
                case Hole():
                    view[:] = bytes(piece.length)
            position += piece.length


class Layout:
    """What is sent for one export. `size` is its length in bytes."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(part.length for part in parts)]
        self.size = self._starts[-1]

    def segments(self, start: int, stop: int) -> Iterator[Segment | Gather]:
        """Yield the bytes from `start` up to `stop` (not included), in order, as few large segments.

        Raises ValueError for a range that isn't inside of the Layout, and while it is iterated OSError and
        CorruptImage as the disks do.
        """
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"bytes {start} to {stop} of a layout of {self.size} bytes")
        return _gathered(_joined(self._raw_segments(start, stop)))

    def _raw_segments(self, start: int, stop: int) -> Iterator[Segment]:
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            part, part_start = self._parts[index], self._starts[index]
            first, last = start - part_start, min(stop - part_start, part.length)
            if last > first:
                match part:
                    case Literal():
                        yield Literal(part.data[first:last]) if last - first < part.length else part
                    case DiskRange():
                        yield from part.disk.segments(part.offset + first, last - first)
                    case DiskBlocks():
                        yield from _of_blocks(part, first, last)
                    case Computed():
                        yield from _computed(part, first, last)
            start = part_start + last
            index += 1


def raw_layout(disk: Disk) -> Layout:
    """The disk's bytes as they are."""
    return Layout([DiskRange(disk, 0, disk.size)])


def entity_tag(content_ids: Iterable[str], image_format: str) -> str:
    """The strong ETag (RFC 9110, section 8.8.3, quotes included) of an export in `image_format`.

    `content_ids` name all that went into it, in its order: the content of a whole disk, the two of a delta,
    and what else has a say in the bytes.
    """
    text = "\0".join((str(LAYOUT_VERSION), image_format, *content_ids))
    return f'"{sha256(text.encode()).hexdigest()[:32]}"'


def _of_blocks(part: DiskBlocks, first: int, last: int) -> Iterator[Segment]:
    prefix = len(part.prefix)
    stride = prefix + part.block_size
    for index in range(first // stride, -(-last // stride)):
        begin = max(0, first - index * stride)
        end = min(stride, last - index * stride)
        if begin < prefix:
            yield Literal(part.prefix[begin:end])
        position = part.blocks[index] * part.block_size + max(0, begin - prefix)
        stop = part.blocks[index] * part.block_size + end - prefix
        there = min(stop, part.disk.size)
        if position < there:
            yield from part.disk.segments(position, there - position)
            position = there
        if position < stop:
            yield Hole(stop - position)


def _computed(part: Computed, first: int, last: int) -> Iterator[Segment]:
    for number in range(first // part.piece, -(-last // part.piece)):
        start = number * part.piece
        data = part.make(number)
        if first > start or last < start + len(data):
            data = data[max(0, first - start) : last - start]
        yield Literal(data)


def _joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Join neighbours that continue each other: holes, and ranges that lie one after another in one file."""
    held: Segment | None = None
    for segment in segments:
        match held, segment:
            case Hole(), Hole():
                held = Hole(held.length + segment.length)
            case FileRange(), FileRange() if (held.fd, held.offset + held.length) == (
                segment.fd,
                segment.offset,
            ):
                held = FileRange(held.fd, held.offset, held.length + segment.length)
            case _:
                if held is not None:
                    yield held
                held = segment
    if held is not None:
        yield held


def _gathered(segments: Iterable[Segment]) -> Iterator[Segment | Gather]:
    pieces: list[Segment] = []
    length = 0
    for segment in segments:
        short = segment.length < SENDFILE_MINIMUM
        if pieces and (not short or length + segment.length > GATHER_MAXIMUM):
            yield _gather(pieces, length)
            pieces, length = [], 0
        if short:
            pieces.append(segment)
            length += segment.length
        else:
            yield segment
    if pieces:
        yield _gather(pieces, length)


def _gather(pieces: list[Segment], length: int) -> Segment | Gather:
    # Alone, literal bytes and a hole are no reading at all.
    if len(pieces) == 1 and not isinstance(pieces[0], FileRange):
        return pieces[0]
    return Gather(tuple(pieces), length)


def _pread_all(source: FileRange, view: memoryview) -> None:
    done = 0
    while done < source.length:
        count = os.preadv(source.fd, [view[done:]], source.offset + done)
        if count == 0:
            text = f"an image file ends before byte {source.offset + source.length}; it was cut meanwhile"
            raise OSError(errno.EIO, text)
        done += count
