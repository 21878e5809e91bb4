"""The block allocation table of an image that is only read: a piece at a time, when it is asked for.

At 2 TiB a table has 4 MiB, and a chain has one for each file; a request needs a few entries of each. Most
pieces of most tables are empty: they are told by one comparison and share their memory.
The trap: pieces are read at different times, so nobody may write to the file meanwhile.
"""

import re
import sys
from array import array
from typing import Final

from gateway.images.errors import CorruptImage
from gateway.images.files import pread_exactly
from gateway.images.vhd.format import UNUSED

_SHIFT: Final = 14
_PIECE: Final = 1 << _SHIFT  # entries: 64 KiB, or 32 GiB of a disk in blocks of 2 MiB
_EMPTY_BYTES: Final = b"\xff" * (4 * _PIECE)
_EMPTY: Final = array("I", _EMPTY_BYTES)
_USED: Final = re.compile(rb"[^\xff]")


class BlockTable:
    """The entries of a table of `blocks` entries that begins at `offset` of the file, in host order."""

    def __init__(self, fd: int, path: str, offset: int, blocks: int) -> None:
        self._fd = fd
        self._path = path
        self._offset = offset
        self._blocks = blocks
        self._pieces: list[array[int] | None] = [None] * -(-blocks // _PIECE)

    def __getitem__(self, block: int) -> int:
        piece = self._pieces[block >> _SHIFT] or self._load(block >> _SHIFT)
        return piece[block & (_PIECE - 1)]

    def next_used(self, block: int) -> int:
        """Return the first block from `block` on that has an entry, or the number of blocks."""
        while block < self._blocks:
            number = block >> _SHIFT
            piece = self._pieces[number] or self._load(number)
            if piece is not _EMPTY:
                found = _next_used(memoryview(piece).cast("B"), block & (_PIECE - 1))
                if found is not None:
                    return (number << _SHIFT) + found
            block = number + 1 << _SHIFT
        return self._blocks

    def _load(self, number: int) -> "array[int]":
        first = number << _SHIFT
        length = 4 * min(_PIECE, self._blocks - first)
        data = pread_exactly(self._fd, length, self._offset + 4 * first)
        if len(data) < length:
            raise CorruptImage(self._path, "the file ends within its block allocation table")
        data = data.ljust(len(_EMPTY_BYTES), b"\xff")
        if data == _EMPTY_BYTES:
            piece = _EMPTY
        else:
            piece = array("I", data)
            if sys.byteorder == "little":
                piece.byteswap()
        self._pieces[number] = piece
        return piece


def next_used(table: "array[int]", block: int) -> int:
    """Return the first block from `block` on that has an entry in a whole table, or the length of it."""
    view = memoryview(table).cast("B")
    while block < len(table):
        stop = min((block | (_PIECE - 1)) + 1, len(table))
        if table[block] != UNUSED:
            return block
        piece = view[4 * block : 4 * stop]
        if bytes(piece) != _EMPTY_BYTES[: len(piece)]:
            found = _next_used(piece, 0)
            if found is not None:
                return block + found
        block = stop
    return len(table)


def _next_used(entries: memoryview, first: int) -> int | None:
    match = _USED.search(entries, 4 * first)
    return match.start() // 4 if match else None
