"""A disk as a qcow2 image on its way out: of its own, or as an overlay over the image of another content.

The file is header, refcount table, refcount blocks, L1 table, all L2 tables, then the data in the order of
the disk, because xapi and Xen Orchestra read forward only. Nothing is compressed. Clusters have 64 KiB, as
everybody's have, but what is stored are the disk's blocks of 2 MiB, 32 clusters each; of the last block only
the clusters that the disk reaches. Source: QEMU's docs/interop/qcow2.txt.

The trap: at 2 TiB the L2 tables have 256 MiB, so they and the refcounts are made when they are sent; only
their number has to be known before.
"""

import struct
import sys
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

from gateway.images.disk import Disk, Literal
from gateway.images.errors import ImageTooLarge
from gateway.images.layout import Computed, DiskBlocks, DiskRange, Layout, Part

BLOCK_SIZE: Final = 2 << 20
CLUSTER: Final = 64 << 10

_MAGIC: Final = b"QFI\xfb"
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION: Final = struct.Struct(">II")
_CLUSTER_BITS: Final = 16
_REFCOUNT_ORDER: Final = 4  # of 2**4 bits
_BACKING_FORMAT: Final = 0xE2792ACA
_COPIED: Final = 1 << 63  # the refcount is 1: may be written in place
_LONGEST_NAME: Final = 1023  # bytes
_LARGEST_L1: Final = 32 << 20  # bytes; QEMU opens no image with a larger table

_PER_BLOCK: Final = BLOCK_SIZE // CLUSTER
_ENTRIES: Final = CLUSTER // 8  # of an L1, L2 or refcount table
_REFCOUNTS: Final = CLUSTER // 2  # of a refcount block
_SPAN_BLOCKS: Final = _ENTRIES // _PER_BLOCK  # of an L2 table: 512 MiB


@dataclass(frozen=True, slots=True)
class Backing:
    """What an overlay stands on: the name of a file beside it, and that file's format in QEMU's words."""

    name: str
    image_format: str = "qcow2"


def qcow2_layout(disk: Disk, blocks: "array[int]", backing: Backing | None = None) -> Layout:
    """The qcow2 image with these `blocks` of 2 MiB (ascending) of `disk`.

    The size is the disk's, rounded up to 512 bytes. Raises ImageTooLarge over 2 PiB.
    """
    size = -(-disk.size // 512) * 512
    spans = _spans(blocks)
    l1_entries = -(-size // (CLUSTER * _ENTRIES))
    if 8 * l1_entries > _LARGEST_L1:
        raise ImageTooLarge(
            "qcow2", f"QEMU opens disks of up to {_LARGEST_L1 // 8 * CLUSTER * _ENTRIES} bytes"
        )
    l1_clusters = max(1, -(-l1_entries // _ENTRIES))
    data, cut = _data(disk, blocks)
    data_clusters = sum(part.length for part in data) // CLUSTER
    table_clusters, block_clusters = _refcount_clusters(1 + l1_clusters + len(spans) + data_clusters)
    l1_at = 1 + table_clusters + block_clusters
    l2_at = l1_at + l1_clusters
    data_at = l2_at + len(spans)
    header = _header(size, l1_entries, l1_at * CLUSTER, table_clusters, backing)
    refcount_blocks = array("Q", range((1 + table_clusters) * CLUSTER, l1_at * CLUSTER, CLUSTER))
    l1 = array("Q", bytes(8 * l1_entries))
    for number, span in enumerate(spans):
        l1[span] = (l2_at + number) * CLUSTER | _COPIED
    tables = _Tables(blocks, spans, data_at, cut)
    refcounts = _Refcounts(data_at + data_clusters)
    parts: list[Part] = [
        Literal(header.ljust(CLUSTER, b"\0")),
        Literal(_big_endian(refcount_blocks).ljust(table_clusters * CLUSTER, b"\0")),
        Computed(block_clusters * CLUSTER, CLUSTER, refcounts.block),
        Literal(_big_endian(l1).ljust(l1_clusters * CLUSTER, b"\0")),
        Computed(len(spans) * CLUSTER, CLUSTER, tables.l2),
        *data,
    ]
    return Layout(parts)


def _spans(blocks: "array[int]") -> "array[int]":
    """Return the numbers of the L2 tables that the blocks need, ascending."""
    spans = array("I")
    position = 0
    while position < len(blocks):
        span = blocks[position] // _SPAN_BLOCKS
        spans.append(span)
        position = bisect_left(blocks, (span + 1) * _SPAN_BLOCKS, position)
    return spans


def _data(disk: Disk, blocks: "array[int]") -> tuple[list[Part], int]:
    """Return the parts with the data, and how many clusters the disk's last block has less than others."""
    if not blocks or (blocks[-1] + 1) * BLOCK_SIZE <= disk.size:
        return [DiskBlocks(disk, blocks, BLOCK_SIZE)], 0
    start = blocks[-1] * BLOCK_SIZE
    rest = disk.size - start
    padding = -rest % CLUSTER
    parts: list[Part] = [DiskBlocks(disk, blocks[:-1], BLOCK_SIZE), DiskRange(disk, start, rest)]
    if padding:
        parts.append(Literal(bytes(padding)))
    return parts, _PER_BLOCK - (rest + padding) // CLUSTER


def _refcount_clusters(others: int) -> tuple[int, int]:
    """Return how many clusters refcount table and refcount blocks take, for them and so many others."""
    table = blocks = 1
    while True:
        wanted = -(-(others + table + blocks) // _REFCOUNTS)
        wanted_table = -(-wanted // _ENTRIES)
        if (wanted_table, wanted) == (table, blocks):
            return table, blocks
        table, blocks = wanted_table, wanted


def _header(size: int, l1_entries: int, l1_at: int, table_clusters: int, backing: Backing | None) -> bytes:
    name = b"" if backing is None else backing.name.encode()
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a backing file's name has at most {_LONGEST_NAME} bytes")
    extensions = b""
    if backing is not None:
        text = backing.image_format.encode()
        extensions += _EXTENSION.pack(_BACKING_FORMAT, len(text)) + text.ljust(-(-len(text) // 8) * 8, b"\0")
    extensions += _EXTENSION.pack(0, 0)
    fixed = _HEADER.pack(
        _MAGIC,
        3,
        _HEADER.size + len(extensions) if name else 0,
        len(name),
        _CLUSTER_BITS,
        size,
        0,  # not encrypted
        l1_entries,
        l1_at,
        CLUSTER,
        table_clusters,
        0,  # no snapshots
        0,
        0,  # incompatible, compatible and autoclear features: none
        0,
        0,
        _REFCOUNT_ORDER,
        _HEADER.size,
    )
    return fixed + extensions + name


@dataclass(frozen=True, slots=True)
class _Refcounts:
    """Refcount blocks that say 1 of each of the first `clusters` clusters."""

    clusters: int

    def block(self, number: int) -> bytes:
        """Return one of them."""
        used = min(self.clusters - number * _REFCOUNTS, _REFCOUNTS)
        return (b"\0\1" * max(0, used)).ljust(CLUSTER, b"\0")


@dataclass(frozen=True, slots=True)
class _Tables:
    """L2 tables; the data begins with the cluster `data_at`, the last block has `cut` clusters less."""

    blocks: "array[int]"
    spans: "array[int]"
    data_at: int
    cut: int

    def l2(self, number: int) -> bytes:
        """Return the table of `spans[number]`."""
        begin = self.spans[number] * _SPAN_BLOCKS
        first = bisect_left(self.blocks, begin)
        last = bisect_left(self.blocks, begin + _SPAN_BLOCKS, first)
        table = array("Q", bytes(CLUSTER))
        start = (self.data_at + first * _PER_BLOCK) * CLUSTER | _COPIED
        for block in self.blocks[first:last]:
            entry = (block - begin) * _PER_BLOCK
            table[entry : entry + _PER_BLOCK] = array("Q", range(start, start + BLOCK_SIZE, CLUSTER))
            start += BLOCK_SIZE
        if self.cut and last == len(self.blocks):
            stop = (self.blocks[-1] - begin + 1) * _PER_BLOCK
            table[stop - self.cut : stop] = array("Q", bytes(8 * self.cut))
        return _big_endian(table)


def _big_endian(table: "array[int]") -> bytes:
    if sys.byteorder == "little":
        table.byteswap()
    return table.tobytes()
