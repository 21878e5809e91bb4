"""A disk becoming another disk: all of its bytes, through all its chain, into a VDI that stands on nothing.

One worker thread reads and writes, one buffer is all it needs. Only what the files hold is read, and of that
runs of zeroes aren't written, so the copy is often smaller than the chain. The source is leased for reading
as long as it takes: others read it too, nobody writes.

The trap: a content id says more than that the bytes are the same. Exports in a format with blocks have a
block wherever any file of the chain has one, so the copy gets the source's content id only if it has the
same blocks, or a download begun before and gone on with after would be glued together from two files.
"""

import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI, ImageFormat
from gateway.core.refs import NULL_REF, new_ref, new_uuid
from gateway.core.threads import in_thread
from gateway.images.chain import ChainFiles, NodeKind
from gateway.images.disk import Disk, Extent, ExtentKind
from gateway.images.files import FILES, FileCalls
from gateway.images.vhd.format import (
    BLOCK_SIZE,
    MAX_VIRTUAL_SIZE,
    UNUSED,
    round_up_to_sector,
    round_up_virtual_size,
)
from gateway.images.vhd.image import open_vhd
from gateway.transfers.import_raw import (
    BUFFER_BYTES,
    PIECE_BYTES,
    WRITEBACK_BYTES,
    runs,
    start_writeback,
)
from gateway.transfers.publications import Publications

if TYPE_CHECKING:
    from gateway.core.leases import Lease
    from gateway.core.tasks import Operation
    from gateway.repository.inventory import Inventory
    from gateway.repository.repository import Repository
    from gateway.repository.staging import Staging

# So much of a disk is looked through for data at once (a multiple of PIECE_BYTES).
_WINDOW_BYTES: Final = 64 << 20
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Readable(Protocol):
    """As much of a Disk as a copy needs of its source."""

    @property
    def size(self) -> int:
        """As Disk.size."""
        ...

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        """As Disk.pread_into."""
        ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """As Disk.extents."""
        ...


@dataclass(slots=True)
class Copied:
    """How far a copy is, in bytes of the disk; written by its thread, read by whoever asks for the progress.

    `blocks` has a 1 for each 2 MiB of the copy in which something was written.
    """

    expected: int
    count: int = 0
    blocks: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = bytearray(-(-self.expected // BLOCK_SIZE))

    def note_written(self, start: int, stop: int) -> None:
        """Bytes from `start` up to `stop` were written."""
        for block in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)):
            self.blocks[block] = 1

    def fraction(self) -> float:
        """From 0.0 to 1.0."""
        return self.count / self.expected if self.expected else 1.0


async def copy_disk(
    inventory: "Inventory",
    publications: Publications,
    operation: "Operation",
    *,
    vdi: str,
    sr: str = NULL_REF,
    into: str = NULL_REF,
    who: str,
    turns: trio.CapacityLimiter,
    wait: float | None = None,
) -> str:
    """Copy `vdi` into a new VDI of the SR `sr`, or over the VDI `into`, for `who`; the copy's reference.

    All or nothing. The new VDI is a VHD, its size a multiple of 2 MiB; a raw image if the source is larger
    than a VHD can be. What is larger than the source reads as zeroes there. As many copies as `turns` has
    tokens run at once, the others wait before they hold anything.

    Raises VALUE_NOT_SUPPORTED, OPERATION_NOT_ALLOWED, VDI_IN_USE while somebody writes to the source or uses
    the target, VDI_TOO_SMALL, VDI_READONLY, SR_FULL, SR_NOT_ATTACHED, VDI_MISSING, ImageError, OSError.
    """
    source = inventory.records.vdis.get(vdi)
    if not source.managed:
        raise XenAPIError("OPERATION_NOT_ALLOWED", "it is the hidden parent of other VDIs")
    sr = _target_sr(inventory, vdi, sr, into)
    holder = Holder(who, "copy", vdi, operation.task)
    async with turns, _reading(inventory, holder, wait) as reading:
        copied = Copied(reading.disk.size)
        operation.progress = copied.fraction
        filling = _Filling(reading, copied, inventory.repository(sr).files)
        if into != NULL_REF:
            await _copy_over(inventory, publications, filling, replace(holder, vdi=into), wait)
            return into
        return await _copy_new(inventory, filling, sr, holder)


@dataclass(frozen=True, slots=True)
class _Reading:
    """The source under its lease. `blocks` are those that any of its files has, if they can be compared."""

    vdi: VDI
    disk: Disk
    blocks: int | None


@asynccontextmanager
async def _reading(inventory: "Inventory", holder: Holder, wait: float | None) -> AsyncIterator[_Reading]:
    lease = await inventory.lease(holder.vdi, LeaseMode.READ, holder, wait)
    try:
        vdi = await inventory.vdi_under(holder.vdi, lease)
        blocks = await in_thread(stored_blocks, lease.chain)
        disk = await in_thread(lease.open_disk)
        try:
            yield _Reading(vdi, disk, blocks)
        finally:
            with trio.CancelScope(shield=True):
                await in_thread(disk.close)
    finally:
        await _end(lease)


async def _end(lease: "Lease") -> None:
    lease.release()
    with trio.CancelScope(shield=True):
        await lease.released()


def _target_sr(inventory: "Inventory", vdi: str, sr: str, into: str) -> str:
    if into == NULL_REF:
        if sr == NULL_REF:
            raise XenAPIError("VALUE_NOT_SUPPORTED", "sr", sr, "an SR or a VDI has to be named for the copy")
        return inventory.records.srs.get(sr).ref
    target = inventory.records.vdis.get(into)
    if into == vdi:
        raise XenAPIError("VALUE_NOT_SUPPORTED", "into_vdi", into, "it is the VDI that is to be copied")
    if sr not in (NULL_REF, target.sr):
        raise XenAPIError("VALUE_NOT_SUPPORTED", "sr", sr, f"the VDI {into} is in another SR")
    return target.sr


async def _copy_new(inventory: "Inventory", filling: "_Filling", sr: str, holder: Holder) -> str:
    source = filling.source.vdi
    size, image_format = shape_of_copy(filling.source.disk.size)
    # What XenServer carries over; tags and sm_config it doesn't.
    vdi = VDI(
        ref=new_ref(),
        uuid=new_uuid(),
        sr=sr,
        name_label=source.name_label,
        name_description=source.name_description,
        virtual_size=size,
        type=source.type,
        sharable=source.sharable,
        other_config=source.other_config,
        xenstore_data=source.xenstore_data,
        allow_caching=source.allow_caching,
        on_boot=source.on_boot,
        image_format=image_format,
    )
    async with _room(inventory.repository(sr), size), inventory.vdi_new(vdi, holder) as new:
        await filling.run(new.staging)
        new.vdi = replace(vdi, content_id=filling.content_id(size, image_format))
        # From here on nothing stops the copy: a commit is short and happens or doesn't.
        with trio.CancelScope(shield=True):
            await new.staging.commit()
    return vdi.ref


async def _copy_over(
    inventory: "Inventory",
    publications: Publications,
    filling: "_Filling",
    holder: Holder,
    wait: float | None,
) -> None:
    repository = inventory.repository_of(holder.vdi)
    lease = await inventory.lease(holder.vdi, LeaseMode.REPLACE, holder, wait)
    try:
        replaced = lease.chain.nodes[0].identity
        target = inventory.records.vdis.get(holder.vdi)
        async with (
            _room(repository, filling.source.disk.size),
            repository.staging(lease, whole=True) as staging,
        ):
            size = staging.disk.size
            if size < filling.source.disk.size:
                raise XenAPIError("VDI_TOO_SMALL", target.ref, str(size))
            await filling.run(staging)
            content_id = filling.content_id(size, target.image_format)
            with trio.CancelScope(shield=True), publications.publishing(target.ref, replaced):
                try:
                    await staging.commit()
                finally:
                    # After a rename the content is new, even if making it durable failed.
                    if staging.committed is not None:
                        await inventory.vdi_changed(target.ref, content_id)
    finally:
        await _end(lease)


@asynccontextmanager
async def _room(repository: "Repository", size: int) -> AsyncIterator[None]:
    """Says what a full SR or a file too large for its file system means."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            total, used = await repository.space()
            raise XenAPIError("SR_FULL", str(size), str(max(0, total - used))) from error
        if error.errno == errno.EFBIG:
            raise XenAPIError("VDI_TOO_LARGE", str(size), "what its file system holds") from error
        raise


@dataclass(frozen=True, slots=True)
class _Filling:
    """The thread's part, and what it means for the content id."""

    source: _Reading
    copied: Copied
    files: FileCalls

    async def run(self, staging: "Staging") -> None:
        """Fill the staged disk. A cancellation ends it within a buffer's length."""

        def work() -> None:
            check = trio.from_thread.check_cancelled
            fill(self.source.disk, staging.disk, self.copied, check=check, files=self.files)

        # A thread of its own: those that serve everybody are not for hours of work.
        await in_thread(work, limiter=trio.CapacityLimiter(1))

    def content_id(self, size: int, image_format: ImageFormat) -> str:
        """The source's if the copy has the same bytes in the same blocks, else a new one."""
        same = (
            image_format == "vhd"
            and size == self.source.disk.size
            and self.source.blocks == int.from_bytes(self.copied.blocks, "little")
        )
        return self.source.vdi.content_id if same else new_uuid()


def shape_of_copy(size: int) -> tuple[int, ImageFormat]:
    """The size in bytes and the format of a new VDI for the content of a disk of `size` bytes."""
    rounded = round_up_virtual_size(size)
    return (rounded, "vhd") if rounded <= MAX_VIRTUAL_SIZE else (round_up_to_sector(size), "raw")


def stored_blocks(chain: ChainFiles) -> int | None:
    """The blocks of 2 MiB that any file of the chain has, whatever is in them: block n is the byte n.

    None where there are other blocks, or none at all, in the chain. Blocks. Raises ImageError, OSError.
    """
    stored, blocks = 0, 0
    for level, node in enumerate(chain.nodes):
        if node.kind is NodeKind.RAW:
            return None
        image = open_vhd(node.fd, node.path)
        if image.header is None or image.block_size != BLOCK_SIZE:
            return None
        if not level:
            blocks = image.blocks
        stored |= int.from_bytes(bytes(map(UNUSED.__ne__, image.bat[:blocks])), "little")
    return stored


def fill(
    source: Readable,
    target: Disk,
    copied: Copied,
    *,
    check: Callable[[], None],
    files: FileCalls = FILES,
) -> None:
    """Write what `source` holds to `target`, which reads as zeroes all over and is as large at least.

    `check` is asked before each buffer and may raise. Blocks. Raises ImageError, OSError.
    """
    buffer = bytearray(min(BUFFER_BYTES, source.size))
    begun = 0
    with memoryview(buffer) as view:
        for offset, length in _pieces(source, copied, check):
            source.pread_into(view[:length], offset)
            for start, stop, is_zero in runs(buffer, length):
                if not is_zero:
                    target.pwrite(view[start:stop], offset + start)
                    copied.note_written(offset + start, offset + stop)
            copied.count = end = offset + length
            if end - begun >= WRITEBACK_BYTES:
                start_writeback(target, begun, end - begun, files)
                begun = end
    copied.count = copied.expected


def _pieces(source: Readable, copied: Copied, check: Callable[[], None]) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what fits into a buffer, as long as there is something to read."""
    for window in range(0, source.size, _WINDOW_BYTES):
        copied.count = window
        check()
        for start, stop in data_ranges(source, window, min(window + _WINDOW_BYTES, source.size)):
            for offset in range(start, stop, BUFFER_BYTES):
                check()
                yield offset, min(BUFFER_BYTES, stop - offset)


def data_ranges(disk: Readable, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of what is not known to be zeroes between `begin` and `end`.

    Starts are multiples of 64 KiB away from `begin`, stops too or `end`: shorter ranges cost more than they
    save.
    """
    first = last = begin
    for extent in disk.extents(begin, end - begin):
        if extent.kind is not ExtentKind.DATA:
            continue
        start = begin + (extent.offset - begin) // PIECE_BYTES * PIECE_BYTES
        stop = extent.offset + extent.length
        if start > last:
            if last > first:
                yield first, last
            first = start
        last = min(end, begin - (begin - stop) // PIECE_BYTES * PIECE_BYTES)
    if last > first:
        yield first, last
