"""The formats that a VDI goes out in: how its leased chain becomes a layout, and what the ETag of that says.

A sparse format has the blocks that any file of the chain has, a delta those that a file has which only one of
two chains has. A delta names what it stands on by the id and the file name that a full export of the base
has, so that deltas of deltas fit together.

The trap: the bytes of an export follow from more than the content. A hole that somebody made in a raw image
changes no byte of the disk, but its blocks; so the ETag is of the blocks' numbers, too, and a download that
was begun before isn't gone on with.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import trio

from gateway.core.threads import in_thread
from gateway.images.allocation import differing_blocks
from gateway.images.export_layout import SparseFormat, sparse_layout
from gateway.images.layout import Layout, entity_tag, raw_layout
from gateway.transfers.export_disk import DiskExport
from gateway.transfers.known_blocks import Blocks, KnownBlocks

if TYPE_CHECKING:
    from array import array

    from gateway.core.leases import Lease
    from gateway.images.disk import Disk


class ExportFormat(Enum):
    """A format, by the name that requests and file names have for it."""

    RAW = "raw"
    VHD = "vhd"
    QCOW2 = "qcow2"

    @property
    def content_type(self) -> str:
        """What xapi calls it in its answers (importexport.ml)."""
        return _CONTENT_TYPES[self]


_CONTENT_TYPES = {
    ExportFormat.RAW: "application/octet-stream",
    ExportFormat.VHD: "application/vhd",
    ExportFormat.QCOW2: "application/x-qemu-disk",
}


@dataclass(frozen=True, slots=True)
class Base:
    """What a delta stands on: a VDI, its content, and the blocks in which it may differ."""

    uuid: str
    content_id: str
    differing: "array[int]"


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: the content under a lease, as a whole or as what differs from `base`."""

    lease: "Lease"
    content_id: str
    image_format: ExportFormat
    base: Base | None = None


@dataclass(frozen=True, slots=True)
class OpenExport:
    """An export that can begin, and its ETag."""

    body: DiskExport
    tag: str


def raw_entity_tag(content_id: str) -> str:
    """The strong ETag of the raw bytes of a VDI whose content is `content_id`."""
    return entity_tag([content_id], ExportFormat.RAW.value)


@asynccontextmanager
async def open_export(
    source: Source, known: KnownBlocks, threads: trio.CapacityLimiter | None = None
) -> AsyncIterator[OpenExport]:
    """The disk of a read lease, opened in its format for as long as the block lasts.

    `known` spares looking again for the blocks of a chain that was exported lately. Raises ImageTooLarge for
    what the format can't hold, ImageError, OSError.
    """
    disk, opened = await in_thread(_open, source, known, limiter=threads)
    try:
        yield opened
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(disk.close, limiter=threads)


async def base_of(lease: "Lease", base: "Lease", uuid: str, content_id: str) -> Base:
    """The VDI `uuid` with this content, leased as `base`, as what a delta of the leased VDI stands on.

    Raises UnrelatedChains, ImageError, OSError. Only `lease` is needed from then on.
    """
    blocks = await in_thread(differing_blocks, lease.chain, base.chain)
    return Base(uuid, content_id, blocks)


def _open(source: Source, known: KnownBlocks) -> "tuple[Disk, OpenExport]":
    base, image_format = source.base, source.image_format
    blocks: Blocks | None = None
    if base is not None:
        blocks = Blocks.of(base.differing)
    elif image_format is not ExportFormat.RAW:
        blocks = known.stored(source.content_id, source.lease.chain)
    disk = source.lease.open_disk()
    try:
        layout, tag = _layout(disk, blocks, source)
    except BaseException:
        disk.close()
        raise
    return disk, OpenExport(DiskExport(layout), tag)


def _layout(disk: "Disk", blocks: Blocks | None, source: Source) -> tuple[Layout, str]:
    if blocks is None:
        return raw_layout(disk), raw_entity_tag(source.content_id)
    base = source.base
    named = [source.content_id, blocks.digest]
    if base is not None:
        named += [base.content_id, base.uuid]
    tag = entity_tag(named, source.image_format.value)
    stands_on = None if base is None else (base.uuid, base.content_id)
    sparse_format = SparseFormat(source.image_format.value)
    return sparse_layout(disk, blocks.numbers, source.content_id, sparse_format, stands_on), tag
