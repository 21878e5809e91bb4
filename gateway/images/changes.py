"""In which blocks of 64 KiB two disks can differ, from the tables of the files that they stand on.

Two disks that stand on common files differ at most where a file that is under one of them alone has a block.
So this needs no log, costs a writer nothing, and holds after whatever has been done to the two. What is said
is never too little; it may be too much, as where the same bytes were written again.

An entry of a VHD's table has four bytes and stands for 2 MiB, whose bits have four bytes too: so many
entries become bits at once by whole-number arithmetic. The bitmaps of sectors say it more finely, but each
is a read of its own: they are looked at for so many blocks only as a caller's patience allows.
The traps: nobody may write to the files meanwhile; a node that is smaller than its parent hides what lies
beyond its end, which is a difference without a block.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.images.cbtlog import CHANGE_SHIFT, CHANGE_SIZE
from gateway.images.chain import NodeKind, OpenNode
from gateway.images.errors import CorruptImage
from gateway.images.files import pread_exactly
from gateway.images.vhd.format import BLOCK_SIZE, SECTOR
from gateway.images.vhd.image import VhdFile, open_vhd

_PIECE: Final = 1 << 14  # entries
_EMPTY: Final = b"\xff" * (4 * _PIECE)
_ONES: Final = int.from_bytes(_EMPTY, "big")
_LOW_BITS: Final = int.from_bytes(b"\x7f\xff\xff\xff" * _PIECE, "big")
_HIGH_BITS: Final = int.from_bytes(b"\x80\0\0\0" * _PIECE, "big")
_BITMAP_BYTES: Final = CHANGE_SIZE // SECTOR // 8  # of a sector bitmap, for one bit of ours
_NONE_SET: Final = bytes(_BITMAP_BYTES)

EXACT_BLOCKS: Final = 4096
"""Of so many blocks the sectors are looked at when a client waits: a tenth of a second at most."""


@dataclass(frozen=True, slots=True)
class _Level:
    """One file of a chain. `image` is None for a raw file."""

    node: OpenNode
    image: VhdFile | None
    size: int


class Changes:
    """Bits of a disk of `size` bytes, the highest of a byte first, whole groups of four bytes.

    `exact` blocks more may be looked at sector by sector.
    """

    def __init__(self, size: int, exact: int = EXACT_BLOCKS) -> None:
        self.bits: Final = bytearray(4 * -(-size // BLOCK_SIZE))
        self._size = size
        self._exact = exact

    def add_difference(self, one: Sequence[OpenNode], other: Sequence[OpenNode]) -> None:
        """Where the disks of two chains (leaf to root) can differ. Raises ImageError, OSError."""
        shared = {node.identity for node in one} & {node.identity for node in other}
        for chain in (one, other):
            levels = [_level(node) for node in chain]
            for number, level in enumerate(levels):
                if level.node.identity in shared:
                    break
                self._add(level)
                if number + 1 < len(levels):
                    self.mark(level.size, levels[number + 1].size)

    def add_own(self, node: OpenNode) -> None:
        """What one file has by itself. Raises ImageError, OSError."""
        self._add(_level(node))

    def mark(self, start: int, stop: int) -> None:
        """Everything from byte `start` to `stop` has changed; nothing if there is nothing between them."""
        stop = min(stop, self._size)
        if start >= stop:
            return
        first, last = start >> CHANGE_SHIFT, (stop - 1 >> CHANGE_SHIFT) + 1
        while first < last and (first & 7 or last - first < 8):
            self.bits[first >> 3] |= 0x80 >> (first & 7)
            first += 1
        whole = (last - first) >> 3
        self.bits[first >> 3 : (first >> 3) + whole] = b"\xff" * whole
        for block in range(first + 8 * whole, last):
            self.bits[block >> 3] |= 0x80 >> (block & 7)

    def _add(self, level: _Level) -> None:
        image = level.image
        if image is None or image.header is None:
            self.mark(0, level.size)
        elif image.block_size == BLOCK_SIZE:
            self._add_table(image)
        else:
            self._add_odd_table(image)

    def _add_table(self, image: VhdFile) -> None:
        assert image.header is not None
        blocks = min(image.blocks, len(self.bits) // 4)
        for first in range(0, blocks, _PIECE):
            length = 4 * min(_PIECE, blocks - first)
            piece = pread_exactly(image.fd, length, image.header.table_offset + 4 * first)
            if len(piece) < length:
                raise CorruptImage(image.path, "the file ends within its block allocation table")
            if piece == _EMPTY[:length]:
                continue
            beyond = 8 * (len(_EMPTY) - length)
            entries = int.from_bytes(piece, "big") ^ _ONES >> beyond
            low, high = _LOW_BITS >> beyond, _HIGH_BITS >> beyond
            # One for each entry that isn't UNUSED, which adding to its lower bits carries into the highest.
            used = ((entries & low) + low | entries) & high
            used >>= 31
            count = used.bit_count()
            if count <= self._exact:
                self._exact -= count
                self._add_sectors(image, first, used.to_bytes(length, "big"))
                continue
            whole = (used << 32) - used
            place = slice(4 * first, 4 * first + length)
            whole |= int.from_bytes(self.bits[place], "big")
            self.bits[place] = whole.to_bytes(length, "big")

    def _add_sectors(self, image: VhdFile, first: int, used: bytes) -> None:
        """Look into the blocks from `first` on whose four bytes of `used` end in a one."""
        place = used.find(1)
        while place >= 0:
            block = first + (place >> 2)
            offset = image.block_offset(block)
            if offset is None:
                raise CorruptImage(image.path, "its block allocation table was changed meanwhile")
            there = slice(4 * block, 4 * block + 4)
            found = _groups(image.read_bitmap(offset)) | int.from_bytes(self.bits[there], "big")
            self.bits[there] = found.to_bytes(4, "big")
            place = used.find(1, place + 1)

    def _add_odd_table(self, image: VhdFile) -> None:
        """Blocks of another size than everybody's: one by one."""
        block = image.table.next_used(0)
        while block < image.blocks:
            start = block * image.block_size
            offset = image.block_offset(block)
            if self._exact and offset is not None:
                self._exact -= 1
                bitmap = image.read_bitmap(offset)
                for within in range(0, len(bitmap), _BITMAP_BYTES):
                    if any(bitmap[within : within + _BITMAP_BYTES]):
                        begin = start + within * 8 * SECTOR
                        self.mark(begin, min(begin + CHANGE_SIZE, start + image.block_size, image.size))
            else:
                self.mark(start, min(start + image.block_size, image.size))
            block = image.table.next_used(block + 1)


def _groups(bitmap: bytes) -> int:
    """The 32 bits of a block of 2 MiB, from the 4,096 of its sectors."""
    if bitmap.count(0xFF) == len(bitmap):
        return 0xFFFFFFFF
    found = 0
    for start in range(0, len(bitmap), _BITMAP_BYTES):
        found = found << 1 | (bitmap[start : start + _BITMAP_BYTES] != _NONE_SET)
    return found


def _level(node: OpenNode) -> _Level:
    if node.kind is NodeKind.RAW:
        return _Level(node, None, os.fstat(node.fd).st_size)
    image = open_vhd(node.fd, node.path)
    return _Level(node, image, image.size)
