"""A body in any format becoming the content of a VDI: the way that all formats have in common.

First the head of the image is read, as far as it says how large the disk is and whether it is one; only then
a staging file is made, filled in one worker thread, and committed. All or nothing, as for raw disks.
The trap: a body can be read once, so the thread that reads the head and the one that fills the disk share one
BodyReader, one after the other.
"""

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import trio

from gateway.core.errors import XenAPIError
from gateway.images.disk import Disk
from gateway.transfers.body import Body, BodyEnded, BodyReader, BodyStalled
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_chunked import ChunkedDisk
from gateway.transfers.import_raw import UNKNOWN_LENGTH
from gateway.transfers.import_vhd import begin_vhd
from gateway.transfers.thread import run_abortable

if TYPE_CHECKING:
    from gateway.core.leases import Lease
    from gateway.core.records import VDI
    from gateway.core.tasks import Task, Tasks
    from gateway.images.files import FileCalls
    from gateway.repository.inventory import Inventory
    from gateway.repository.repository import Repository
    from gateway.repository.staging import Staging
    from gateway.transfers.publications import Publications

T = TypeVar("T")

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

    @property
    def expected(self) -> int:
        """Bytes of the body as far as is known, 0 if it isn't."""
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

    def reader(self) -> BodyReader:
        """The body for those that parse it."""
        known = self.length is not None and self.length < UNKNOWN_LENGTH
        return BodyReader(self.body, self.length if known else None, end_is_told=self.end_is_told)


@dataclass(frozen=True, slots=True)
class IntoVDI:
    """The VDI whose content is to be replaced or changed. The lease stays the caller's to release."""

    inventory: "Inventory"
    publications: "Publications"
    vdi: "VDI"
    lease: "Lease"

    @property
    def repository(self) -> "Repository":
        """Where it is."""
        return self.inventory.repository_of(self.vdi)

    @property
    def room(self) -> int | None:
        """The most bytes that the disk may have; None if it gets what it needs."""
        return self.vdi.virtual_size

    def fits(self, size: int) -> None:
        """Raise VDI_TOO_SMALL for a disk of more bytes than the VDI has."""
        if size > self.vdi.virtual_size:
            raise XenAPIError("VDI_TOO_SMALL", self.vdi.ref, str(self.vdi.virtual_size))

    async def store(self, incoming: Incoming, fill: "Fill") -> str:
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


Fill = Callable[["Staging"], Awaitable[None]]


async def import_disk(
    tasks: "Tasks",
    task: "Task",
    *,
    sent: Sent,
    target: IntoVDI,
    threads: trio.CapacityLimiter | None = None,
) -> None:
    """Make what is sent the content of the target, or change it as that says, under `task`; all or nothing.

    A disk smaller than the VDI leaves zeroes behind it. Returns when the content is durable and the task is a
    success; its result names the VDI. When it is a failure, raises XenAPIError (VDI_TOO_SMALL,
    IMPORT_ERROR_*, SR_FULL, TASK_CANCELLED) or what the storage raised.
    """
    cancellation = trio.CancelScope()
    reader = sent.reader()
    async with tasks.operation(task, cancellation.cancel) as operation:
        with cancellation:
            try:
                incoming = await _in_thread(lambda: _begin(sent.format, reader, target), reader, threads)
                target.fits(incoming.virtual_size)
                operation.progress = lambda: _fraction(reader, incoming)

                async def fill(staging: "Staging") -> None:
                    files = target.repository.files
                    await _in_thread(lambda: incoming.receive(staging.disk, files=files), reader, threads)

                operation.result = f"<value>{await target.store(incoming, fill)}</value>"
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
                total, used = await target.repository.space()
                raise XenAPIError("SR_FULL", "unknown", str(max(0, total - used))) from error
        if cancellation.cancelled_caught:
            raise XenAPIError("TASK_CANCELLED", task.ref)


def _begin(name: BodyFormat, reader: BodyReader, target: IntoVDI) -> Incoming:
    """Read the head. Blocks."""
    match name:
        case BodyFormat.VHD:
            return begin_vhd(reader, target.fits)
        case BodyFormat.CHUNKED:
            assert target.room is not None
            return ChunkedDisk(reader, target.room, target.fits)
        case _:
            raise AssertionError(name)


async def _in_thread(work: Callable[[], T], reader: BodyReader, threads: trio.CapacityLimiter | None) -> T:
    """Run `work`, which reads the body, in a thread of its own, and say what its end means for the client."""
    try:
        return await run_abortable(work, reader.body, threads)
    except BodyStalled as stalled:
        raise XenAPIError("IMPORT_ERROR_CLIENT_STALLED", f"{stalled.seconds:g}") from stalled
    except BodyEnded as ended:
        raise XenAPIError("IMPORT_ERROR_PREMATURE_EOF", str(ended.needed), str(ended.count)) from ended


def _fraction(reader: BodyReader, incoming: Incoming) -> float:
    expected = incoming.expected
    return min(1.0, reader.position / expected) if expected else 0.0
