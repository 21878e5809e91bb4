"""Where in its file an image has its disk, told by `qemu-img map`, and the disk read from there.

qcow2 and VMDK images have clusters of the disk as they are, so that nothing has to be written beside before
it goes into the VDI. What is compressed has no place in the file; then there is no map, nor where an image is
in more pieces than are kept in memory.

What is told of a hostile image is held against the file: ranges follow each other and lie in it. The trap:
two ranges of the disk may lie in one place of the file, so none of it can be given back before the end.

Source: docs/tools/qemu-img.rst of QEMU, `map`; one object of JSON to a line.
"""

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from gateway.images.disk import Extent, ExtentKind, check_range, merge_extents
from gateway.images.errors import CorruptImage

# 24 bytes of memory for each.
MOST_RANGES: Final = 1 << 20
# A file may end within its last cluster; what it lacks of that is zeroes.
_LARGEST_CLUSTER: Final = 2 << 20


class Unmapped(Exception):  # noqa: N818 - a state of the image
    """Some of the disk isn't in the file as it is, or it is in too many pieces."""


class MappedDisk:
    """The disk of an image that lies in `fd`, as far as its map was told; reads as zeroes elsewhere.

    `size` is the disk's in bytes, `end` the file's. One thread tells and reads. Whose `fd` it is closes it.
    """

    def __init__(self, fd: int, size: int, end: int, path: str) -> None:
        self.size: Final = size
        self.needed = 0
        """So many bytes the file has if nothing of the disk is missing."""
        self._fd: Final = fd
        self._end: Final = end
        self._path: Final = path
        self._told = 0
        self._starts = array("Q")
        self._stops = array("Q")
        self._places = array("Q")

    def tell(self, line: bytes) -> None:
        """The next line of what `qemu-img map` says. Raises Unmapped, CorruptImage."""
        text = line.strip(b"[], \r\n")
        if not text:
            return
        try:
            told = json.loads(text)
            start, length = told["start"], told["length"]
            is_data = told["data"] and not told["zero"]
            place = told.get("offset")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptImage(self._path, f"its map can't be read: {text[:80]!r}") from error
        if start != self._told or not 0 < length <= self.size - start:
            raise CorruptImage(self._path, f"its map has {length} bytes at {start}")
        self._told = start + length
        if not is_data:
            return
        if place is None or len(self._starts) == MOST_RANGES:
            raise Unmapped
        if not (0 <= place < self._end and place + length < self._end + _LARGEST_CLUSTER):
            raise CorruptImage(self._path, f"{length} bytes of its disk lie beyond its end, at {place}")
        self.needed = max(self.needed, place + length)
        self._starts.append(start)
        self._stops.append(start + length)
        self._places.append(place)

    def require_whole(self) -> None:
        """Raise CorruptImage unless all of the disk was told of."""
        if self._told != self.size:
            raise CorruptImage(self._path, f"its map ends at {self._told} of {self.size} bytes")

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        """Fill `buf` with the bytes at `offset`. Raises OSError."""
        view = memoryview(buf)
        check_range(offset, len(view), self.size)
        done = 0
        for place, length in self._pieces(offset, len(view)):
            part = view[done : done + length]
            got = 0 if place is None else _read(self._fd, part, place)
            part[got:] = bytes(length - got)
            done += length

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what the range is made of."""
        check_range(offset, length, self.size)
        return merge_extents(self._kinds(offset, length))

    def _kinds(self, offset: int, length: int) -> Iterator[tuple[int, int, ExtentKind]]:
        for place, size in self._pieces(offset, length):
            yield offset, size, ExtentKind.HOLE if place is None else ExtentKind.DATA
            offset += size

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int | None, int]]:
        """Yield (place in the file, length) of the range, None for what isn't there."""
        stop = offset + length
        index = max(0, bisect_right(self._starts, offset) - 1)
        while offset < stop and index < len(self._starts):
            start, end = self._starts[index], min(stop, self._stops[index])
            if start >= stop:
                break
            if offset < start:
                yield None, start - offset
                offset = start
            if offset < end:
                yield self._places[index] + offset - start, end - offset
                offset = end
            index += 1
        if offset < stop:
            yield None, stop - offset


def _read(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset`; how many bytes there were, fewer only where the file ends."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, (view[done:],), offset + done)
        if not got:
            break
        done += got
    return done
