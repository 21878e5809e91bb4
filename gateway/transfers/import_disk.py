"""A body in any format becoming the content of a VDI: the way that all formats have in common.

First the head of the image is read, as far as it says how large the disk is and whether it is one; only then
a staging file is made, filled in one worker thread, and committed. All or nothing, as for raw disks.
The trap: a body can be read once, so the thread that reads the head and the one that fills the disk share one
BodyReader, one after the other.
"""

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import structlog
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder
from gateway.core.records import VDI
from gateway.core.refs import new_ref, new_uuid
from gateway.core.threads import in_thread
from gateway.images.disk import Disk
from gateway.repository.inventory import MAX_RAW_SIZE
from gateway.repository.staging import staging_path
from gateway.transfers.body import Body, BodyEnded, BodyReader, BodyStalled
from gateway.transfers.copy_disk import shape_of_copy
from gateway.transfers.formats import MAGIC_BYTES, BodyFormat, recognise, refuse_others
from gateway.transfers.import_chunked import ChunkedDisk
from gateway.transfers.import_flat import begin_flat
from gateway.transfers.import_foreign import Spool, begin_foreign
from gateway.transfers.import_raw import UNKNOWN_LENGTH
from gateway.transfers.import_vhd import begin_vhd
from gateway.transfers.measured import measured
from gateway.transfers.thread import run_abortable

if TYPE_CHECKING:
    from gateway.core.leases import Lease
    from gateway.core.tasks import Operation, Task, Tasks
    from gateway.images.files import FileCalls
    from gateway.repository.inventory import Inventory
    from gateway.repository.repository import Repository
    from gateway.repository.staging import Staging
    from gateway.transfers.publications import Publications

log = structlog.get_logger("gateway.transfers.import")

T = TypeVar("T")

# xapi's name for a VDI that an import makes.
NEW_NAME: Final = "Imported VDI"
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Incoming(Protocol):
    """An image whose head has been read."""

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def patches(self) -> bool:
        """Whether it changes the present content of the disk; else it is all of the new content."""
        ...

    def fraction(self) -> float:
        """How far it is, from 0.0 to 1.0."""
        ...

    def receive(self, disk: Disk, *, files: "FileCalls") -> None:
        """Fill `disk`: with its present content if `patches`, else reading as zeroes. Blocks.

        Raises XenAPIError, BodyEnded, BodyStalled, TransferAborted, OSError.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sent:
    """What a client sends: `length` is the Content-Length in bytes.

    None, or UNKNOWN_LENGTH and more, means that nobody knows it; `end_is_told` says whether the protocol then
    tells the end.
    """

    body: Body
    format: BodyFormat
    length: int | None
    end_is_told: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether a disk whose size nothing tells is kept until its end does. Clients have to tell it."""
        return False

    def finish(self) -> None:
        """Called by the thread that has filled the disk; there is no commit if it raises."""

    def reader(self) -> BodyReader:
        """The body for those that parse it."""
        known = self.length is not None and self.length < UNKNOWN_LENGTH
        return BodyReader(self.body, self.length if known else None, end_is_told=self.end_is_told)


Fill = Callable[["Staging"], Awaitable[None]]


class Target(Protocol):
    """Where a disk goes."""

    @property
    def repository(self) -> "Repository":
        """The SR."""
        ...

    @property
    def room(self) -> int | None:
        """The size of the disk in bytes if it is known before the image."""
        ...

    @property
    def is_new(self) -> bool:
        """Whether a VDI is made for the disk."""
        ...

    def fits(self, size: int) -> None:
        """Raise VDI_TOO_SMALL or VDI_TOO_LARGE if there can't be so many bytes."""
        ...

    async def store(self, incoming: Incoming, fill: Fill) -> str:
        """Stage, fill and commit; the VDI's reference."""
        ...


@dataclass(frozen=True, slots=True)
class IntoVDI:
    """The VDI whose content is to be replaced or changed. The lease stays the caller's to release."""

    inventory: "Inventory"
    publications: "Publications"
    vdi: "VDI"
    lease: "Lease"
    is_new: bool = field(default=False, init=False)

    @property
    def repository(self) -> "Repository":
        """Where it is."""
        return self.inventory.repository_of(self.vdi)

    @property
    def room(self) -> int | None:
        """All bytes of it."""
        return self.vdi.virtual_size

    def fits(self, size: int) -> None:
        """Raise VDI_TOO_SMALL for a disk of more bytes than the VDI has."""
        if size > self.vdi.virtual_size:
            raise XenAPIError("VDI_TOO_SMALL", self.vdi.ref, str(self.vdi.virtual_size))

    async def store(self, incoming: Incoming, fill: Fill) -> str:
        """Stage, fill and commit; the VDI's reference."""
        async with self.repository.staging(self.lease, whole=not incoming.patches) as staging:
            await fill(staging)
            replaced = self.lease.chain.nodes[0].identity
            # From here on nothing stops the import: a commit is short and happens or doesn't.
            with trio.CancelScope(shield=True), self.publications.publishing(self.vdi.ref, replaced):
                try:
                    await staging.commit()
                finally:
                    # After a rename the content is new, even if making it durable failed.
                    if staging.committed is not None:
                        await self.inventory.vdi_changed(self.vdi.ref)
        return self.vdi.ref


@dataclass(frozen=True, slots=True)
class IntoSR:
    """The SR in which a VDI is made that is as large as the disk; nobody sees it before it is whole.

    `size` in bytes is given if it shall be larger, or if nothing else says how large it is.
    """

    inventory: "Inventory"
    sr: str
    who: str
    task: str
    size: int | None = None
    name_label: str = NEW_NAME
    known: Callable[[VDI], dict[str, str]] | None = None
    """What the VDI's other_config says of its content, asked when it is filled."""
    ref: str = field(default_factory=new_ref)
    uuid: str = field(default_factory=new_uuid)
    is_new: bool = field(default=True, init=False)

    @property
    def repository(self) -> "Repository":
        """Where it will be."""
        return self.inventory.repository(self.sr)

    @property
    def room(self) -> int | None:
        """What the request says."""
        return self.size

    def fits(self, size: int) -> None:
        """Raise VDI_TOO_SMALL beyond the given size, VDI_TOO_LARGE beyond what a VDI can have."""
        if self.size is not None and size > self.size:
            raise XenAPIError("VDI_TOO_SMALL", self.ref, str(self.size))
        if size > MAX_RAW_SIZE:
            raise XenAPIError("VDI_TOO_LARGE", str(size), str(MAX_RAW_SIZE))

    async def store(self, incoming: Incoming, fill: Fill) -> str:
        """Make the VDI and fill it; its reference."""
        size, image_format = shape_of_copy(max(incoming.virtual_size, self.size or 0))
        vdi = VDI(
            ref=self.ref,
            uuid=self.uuid,
            sr=self.sr,
            name_label=self.name_label,
            virtual_size=size,
            image_format=image_format,
            content_id=new_uuid(),
        )
        holder = Holder(self.who, "import", self.ref, self.task)
        async with self.inventory.vdi_new(vdi, holder) as new:
            await fill(new.staging)
            if self.known is not None:
                new.vdi = replace(vdi, other_config=self.known(vdi))
            with trio.CancelScope(shield=True):
                await new.staging.commit()
        return vdi.ref


async def import_disk(
    tasks: "Tasks",
    task: "Task",
    *,
    sent: Sent,
    target: Target,
    spool_bytes: int,
    threads: trio.CapacityLimiter | None = None,
) -> None:
    """Make what is sent the content of the target, or change it as that says, under `task`; all or nothing.

    A disk smaller than the VDI leaves zeroes behind it. Of an image that needs all of its file at most
    `spool_bytes` are kept. Returns when the content is durable and the task is a success; its result names
    the VDI. When it is a failure, raises XenAPIError (VDI_TOO_SMALL, IMPORT_ERROR_*, SR_FULL, TASK_CANCELLED)
    or what the storage raised.
    """
    cancellation = trio.CancelScope()
    async with tasks.operation(task, cancellation.cancel) as operation:
        with cancellation:
            ref = await fill_target(
                operation, sent=sent, target=target, spool_bytes=spool_bytes, threads=threads
            )
            operation.result = f"<value>{ref}</value>"
        if cancellation.cancelled_caught:
            raise XenAPIError("TASK_CANCELLED", task.ref)


async def fill_target(
    operation: "Operation",
    *,
    sent: Sent,
    target: Target,
    spool_bytes: int,
    threads: trio.CapacityLimiter | None = None,
) -> str:
    """As import_disk, as the work of a task that has begun; the VDI's reference."""
    repository = target.repository
    transfer = _Transfer(
        sent.reader(),
        Spool(staging_path(repository.directory, "import"), spool_bytes, repository.files),
        threads,
    )
    try:
        reader = transfer.reader
        incoming = await transfer.run(lambda: _begin(sent, transfer, target))
        is_measured = transfer.reader is not reader
        # All of a body that had to be measured has come by now: that was the first half.
        operation.progress = (lambda: 0.5 + incoming.fraction() / 2) if is_measured else incoming.fraction

        def receive(staging: "Staging") -> None:
            incoming.receive(staging.disk, files=repository.files)
            sent.finish()

        async def fill(staging: "Staging") -> None:
            await transfer.run(lambda: receive(staging))

        return await target.store(incoming, fill)
    except OSError as error:
        if error.errno in _NO_SPACE:
            total, used = await repository.space()
            raise XenAPIError("SR_FULL", "unknown", str(max(0, total - used))) from error
        if error.errno == errno.EFBIG:
            raise XenAPIError("VDI_TOO_LARGE", "unknown", "what its file system holds") from error
        raise
    finally:
        with trio.CancelScope(shield=True):
            try:
                await in_thread(transfer.spool.remove)
            except OSError as error:
                # How the import ended is known by now, and this is no part of it.
                log.warning("what an import kept could not be removed", error=str(error))


def _begin(sent: Sent, transfer: "_Transfer", target: Target) -> Incoming:
    """Read the head. Blocks."""
    reader = transfer.reader
    if not reader.peek(1):
        # What fills a pipe has failed: that is no disk of zeroes.
        raise BodyEnded(1, 0)
    wanted = name = sent.format
    if name is BodyFormat.AUTO:
        name = recognise(reader.peek(MAGIC_BYTES))
    if sent.is_kept and reader.length is None and _is_flat(reader, name):
        reader = transfer.reader = measured(reader, transfer.spool, target.fits)
    match name:
        case BodyFormat.VHD:
            incoming: Incoming = begin_vhd(reader, target.fits, room=target.room, is_new=target.is_new)
        case BodyFormat.CHUNKED:
            if target.room is None:
                raise XenAPIError("IMPORT_ERROR_SIZE_REQUIRED")
            incoming = ChunkedDisk(reader, target.room, target.fits)
        case BodyFormat.RAW:
            incoming = begin_flat(reader, target.fits, room=target.room, wanted=wanted, is_new=target.is_new)
        case _:
            refuse_others(reader.peek(MAGIC_BYTES), name)
            incoming = begin_foreign(reader, name, target.fits, transfer.spool)
    target.fits(incoming.virtual_size)
    return incoming


def _is_flat(reader: BodyReader, name: BodyFormat) -> bool:
    """Whether nothing at its beginning tells the size of the disk: raw, or a fixed VHD."""
    if name is BodyFormat.VHD:
        return recognise(reader.peek(MAGIC_BYTES)) is BodyFormat.RAW
    return name is BodyFormat.RAW


@dataclass(slots=True)
class _Transfer:
    """A body, what is kept of it, and the thread's turn."""

    reader: BodyReader
    spool: Spool
    threads: trio.CapacityLimiter | None

    def abort(self) -> None:
        self.reader.body.abort()
        self.spool.abort()

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work`, which reads the body, in a thread of its own; say what the body's end means."""
        try:
            return await run_abortable(work, self, self.threads)
        except BodyStalled as stalled:
            raise XenAPIError("IMPORT_ERROR_CLIENT_STALLED", f"{stalled.seconds:g}") from stalled
        except BodyEnded as ended:
            raise XenAPIError("IMPORT_ERROR_PREMATURE_EOF", str(ended.needed), str(ended.count)) from ended
