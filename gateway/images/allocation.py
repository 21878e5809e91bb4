"""Which blocks of 2 MiB the files of a chain have, whatever is in them: what sparse exports are made of.

A VHD says it by its block allocation table alone; of a raw image or a fixed VHD a block counts that isn't a
hole all over. A block is in a chain if any of its files has it, and in the difference of two chains if a file
has it that only one of them has: so merging a file into its parent changes nothing.

The traps: a small file hides what its parents have beyond its end, so the same file may show more of itself
in one chain than in another; and the holes of a raw image may change while its bytes don't.
"""

import os
from array import array
from dataclasses import dataclass
from itertools import compress
from typing import Final

from gateway.images.chain import ChainFiles, NodeKind
from gateway.images.errors import CorruptImage
from gateway.images.files import FileIdentity, next_data, next_hole, pread_exactly
from gateway.images.vhd.format import BLOCK_SIZE
from gateway.images.vhd.image import VhdFile, open_vhd

_PIECE_BYTES: Final = 256 << 10
_EMPTY: Final = b"\xff" * _PIECE_BYTES
_IS_USED: Final = b"\1" * 255 + b"\0"


class UnrelatedChains(Exception):  # noqa: N818 - what they are
    """The chains have no file in common, so nobody knows what is the same in both but by reading all."""


def stored_blocks(chain: ChainFiles) -> "array[int]":
    """Return the numbers of all blocks that a leased chain has, ascending. Blocks. ImageError, OSError."""
    stored = 0
    for node in _nodes(chain):
        stored |= node.between(0, node.visible)
    return _numbers(stored)


def differing_blocks(chain: ChainFiles, base: ChainFiles) -> "array[int]":
    """Return the numbers of all blocks that may differ from what `base` has there, ascending.

    Both chains are leased. Only the tables of files that one of them has alone are read. Blocks. Raises
    UnrelatedChains, ImageError, OSError.
    """
    nodes = _nodes(chain)
    ours = {node.identity: node for node in nodes}
    theirs = {node.identity: node for node in _nodes(base)}
    if not ours.keys() & theirs.keys():
        raise UnrelatedChains
    differing = 0
    for identity in ours.keys() | theirs.keys():
        one, other = ours.get(identity), theirs.get(identity)
        if one is not None and other is not None:
            seen, unseen = sorted((one.visible, other.visible))
            if seen < unseen:
                differing |= one.between(seen, unseen)
        else:
            node = one or other
            assert node is not None
            differing |= node.between(0, node.visible)
    blocks = -(-nodes[0].visible // BLOCK_SIZE)
    return _numbers(differing & ((1 << 8 * blocks) - 1))


@dataclass(frozen=True, slots=True)
class _Node:
    """A file of a chain; no more than `visible` bytes of its disk may show. `image` is None for a raw one."""

    fd: int
    identity: FileIdentity
    image: VhdFile | None
    size: int
    visible: int

    def between(self, start: int, stop: int) -> int:
        """The flags of the bytes [start, stop): a number whose lowest byte is 1 if the file has block 0."""
        first, last = start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)
        flags = _of_data(self.fd, self.size) if self.image is None else _of_table(self.image)
        return int.from_bytes(flags[first:last], "little") << 8 * first


def _nodes(chain: ChainFiles) -> list[_Node]:
    nodes: list[_Node] = []
    for node in chain.nodes:
        image: VhdFile | None = None
        if node.kind is NodeKind.RAW:
            size = os.fstat(node.fd).st_size
        else:
            image = open_vhd(node.fd, node.path)
            size = image.size
            if image.header is None:
                image = None
        visible = min(nodes[-1].visible, size) if nodes else size
        nodes.append(_Node(node.fd, node.identity, image, size, visible))
    return nodes


def _numbers(flags: int) -> "array[int]":
    listed = flags.to_bytes(-(-flags.bit_length() // 8), "little")
    return array("I", compress(range(len(listed)), listed))


def _of_data(fd: int, size: int) -> bytes:
    flags = bytearray(-(-size // BLOCK_SIZE))
    position = 0
    while position < size:
        start = next_data(fd, position, size)
        if start >= size:
            break
        stop = max(next_hole(fd, start, size), start + 1)
        first, last = start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)
        flags[first:last] = b"\1" * (last - first)
        position = last * BLOCK_SIZE
    return bytes(flags)


def _of_table(image: VhdFile) -> bytes:
    assert image.header is not None
    length, offset = 4 * image.blocks, image.header.table_offset
    flags = bytearray(image.blocks)
    for start in range(0, length, _PIECE_BYTES):
        piece = pread_exactly(image.fd, min(_PIECE_BYTES, length - start), offset + start)
        if len(piece) < min(_PIECE_BYTES, length - start):
            raise CorruptImage(image.path, "the file ends within its block allocation table")
        if piece == _EMPTY:
            continue
        first = start // 4
        flags[first : first + len(piece) // 4] = _used(piece)
    if image.block_size < BLOCK_SIZE:
        return _joined(flags, BLOCK_SIZE // image.block_size)
    if image.block_size > BLOCK_SIZE:
        return _spread(flags, image.block_size // BLOCK_SIZE)
    return bytes(flags)


def _used(entries: bytes) -> bytes:
    """Return a 1 for each entry of four bytes that isn't all ones."""
    highest = entries[::4]
    if b"\xff" not in highest:
        return b"\1" * len(highest)
    used = int.from_bytes(highest.translate(_IS_USED), "little")
    for place in range(1, 4):
        used |= int.from_bytes(entries[place::4].translate(_IS_USED), "little")
    return used.to_bytes(len(entries) // 4, "little")


def _joined(flags: bytearray, count: int) -> bytes:
    """Return a 1 for each `count` flags of which one is 1."""
    flags += bytes(-len(flags) % count)
    any_used = 0
    for place in range(count):
        any_used |= int.from_bytes(flags[place::count], "little")
    return any_used.to_bytes(len(flags) // count, "little")


def _spread(flags: bytearray, count: int) -> bytes:
    """Return each flag `count` times."""
    spread = bytearray(len(flags) * count)
    for place in range(count):
        spread[place::count] = flags
    return bytes(spread)
