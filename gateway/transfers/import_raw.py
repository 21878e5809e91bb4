"""A raw body becoming a disk: received, looked through for zeroes, written into a staging file, committed.

One worker thread and one buffer for each import: bytes go from the socket into the buffer and from there into
the image file, nothing is copied in between and trio is not asked. Zeroes are looked for in pieces of 64 KiB,
because a shorter comparison costs more than it saves.

The traps: a memoryview compares twenty times slower than bytearray.startswith, so the test never sees a
view; and what the page cache has not begun to write when the body ends, the commit's fsync waits for, so
writing back is started on the way.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from gateway.core.errors import XenAPIError
from gateway.images.disk import Disk, FileRange
from gateway.images.files import FILES, FileCalls
from gateway.transfers.body import Body, BodyReset, BodyStalled
from gateway.transfers.publications import Publications
from gateway.transfers.thread import run_abortable

if TYPE_CHECKING:
    from gateway.core.leases import Lease
    from gateway.core.records import VDI
    from gateway.core.tasks import Task, Tasks
    from gateway.repository.inventory import Inventory

# From here on a Content-Length is no length: Xen Orchestra sends 2^50 when it doesn't know it.
UNKNOWN_LENGTH: Final = 1 << 50
BUFFER_BYTES: Final = 1 << 20
PIECE_BYTES: Final = 64 << 10
WRITEBACK_BYTES: Final = 8 << 20
_ZEROES: Final = bytes(PIECE_BYTES)
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(slots=True)
class Received:
    """How far an import is; written by its thread, read by whoever asks for the progress."""

    expected: int
    count: int = 0

    def fraction(self) -> float:
        """From 0.0 to 1.0."""
        return self.count / self.expected if self.expected else 1.0


async def import_raw(
    inventory: "Inventory",
    tasks: "Tasks",
    task: "Task",
    *,
    vdi: "VDI",
    lease: "Lease",
    body: Body,
    length: int | None,
    publications: Publications,
    excess_wait: float = 1.0,
    threads: trio.CapacityLimiter | None = None,
) -> None:
    """Replace the content of `vdi` by `body`, under `task`; all or nothing.

    `length` is the body's Content-Length in bytes. None, or UNKNOWN_LENGTH and more, means that the body has
    to be exactly as long as the disk; whether it goes on then is waited for `excess_wait` seconds. A shorter
    length leaves the rest of the disk as it was. Returns when the new content is durable and the task is a
    success. When it is a failure, raises XenAPIError (VDI_TOO_SMALL, IMPORT_ERROR_*, SR_FULL, TASK_CANCELLED)
    or what the storage raised. The lease stays the caller's to release.
    """
    if length is not None and length >= UNKNOWN_LENGTH:
        length = None
    cancellation = trio.CancelScope()
    async with tasks.operation(task, cancellation.cancel) as operation:
        if length is not None and length > vdi.virtual_size:
            raise XenAPIError("VDI_TOO_SMALL", vdi.ref, str(vdi.virtual_size))
        received = Received(vdi.virtual_size if length is None else length)
        operation.progress = received.fraction
        with cancellation:
            repository = inventory.repository_of(vdi)
            whole = length is None or length == vdi.virtual_size
            try:
                async with repository.staging(lease, whole=whole) as staging:
                    receiver = _Receiver(vdi, body, staging.disk, received, length, excess_wait, whole)
                    await run_abortable(receiver.run, body, threads)
                    replaced = lease.chain.nodes[0].identity
                    # From here on nothing stops the import: a commit is short and happens or doesn't.
                    with trio.CancelScope(shield=True), publications.publishing(vdi.ref, replaced):
                        try:
                            await staging.commit()
                        finally:
                            # After a rename the content is new, even if making it durable failed.
                            if staging.committed is not None:
                                await inventory.vdi_changed(vdi.ref)
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
                total, used = await repository.space()
                free = str(max(0, total - used))
                raise XenAPIError("SR_FULL", str(received.expected), free) from error
        if cancellation.cancelled_caught:
            raise XenAPIError("TASK_CANCELLED", task.ref)
        operation.result = f"<value>{vdi.ref}</value>"


@dataclass(slots=True)
class _Receiver:
    """The thread's part: receive the body, and judge how it ended."""

    vdi: "VDI"
    body: Body
    disk: Disk
    received: Received
    length: int | None
    excess_wait: float
    fresh: bool

    def run(self) -> None:
        """Blocking. Raises XenAPIError for everything but a body of the right length."""
        received = self.received
        try:
            receive(self.body, self.disk, received, fresh=self.fresh)
        except BodyStalled as stalled:
            if self.length is not None:
                raise XenAPIError("IMPORT_ERROR_CLIENT_STALLED", f"{stalled.seconds:g}") from stalled
        if received.count < received.expected:
            code = "LENGTH_REQUIRED" if self.length is None else "PREMATURE_EOF"
            raise XenAPIError(f"IMPORT_ERROR_{code}", str(received.expected), str(received.count))
        if self.length is None and self.body.more_within(self.excess_wait):
            raise XenAPIError("VDI_TOO_SMALL", self.vdi.ref, str(self.vdi.virtual_size))


def receive(
    body: Body,
    disk: Disk,
    received: Received,
    *,
    fresh: bool,
    buffer_bytes: int = BUFFER_BYTES,
    files: FileCalls = FILES,
) -> None:
    """Write `received.expected` bytes, or as many as come, to the beginning of `disk`.

    `fresh` says that the disk reads as zeroes all over, so that zeroes need no call. A reset ends the body as
    the end of file does: in both cases the count tells what is missing. Blocking; raises BodyStalled,
    TransferAborted, OSError.
    """
    buffer = bytearray(min(buffer_bytes, received.expected))
    offset = written_back = 0
    with memoryview(buffer) as view:
        ended = False
        while offset < received.expected and not ended:
            wanted = min(len(buffer), received.expected - offset)
            filled = 0
            while filled < wanted:
                try:
                    got = body.recv_into(view[filled:wanted])
                except BodyReset:
                    got = 0
                if not got:
                    ended = True
                    break
                filled += got
                received.count += got
            store(disk, buffer, view, filled, offset, fresh=fresh)
            offset += filled
            if offset - written_back >= WRITEBACK_BYTES:
                start_writeback(disk, written_back, offset - written_back, files)
                written_back = offset


def store(disk: Disk, buffer: bytearray, view: memoryview, filled: int, offset: int, *, fresh: bool) -> None:
    """Write the first `filled` bytes of the buffer at `offset`, zero runs as zeroes."""
    for start, stop, is_zero in runs(buffer, filled):
        if not is_zero:
            disk.pwrite(view[start:stop], offset + start)
        elif not fresh:
            disk.zero(offset + start, stop - start, trim=True)


def runs(buffer: bytearray, filled: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, stop, is zero) over the first `filled` bytes; neighbours differ."""
    begin = 0
    current: bool | None = None
    for start in range(0, filled, PIECE_BYTES):
        left = filled - start
        zeroes = _ZEROES if left >= PIECE_BYTES else _ZEROES[:left]
        is_zero = buffer.startswith(zeroes, start)
        if is_zero is not current:
            if current is not None:
                yield begin, start, current
            begin, current = start, is_zero
    if current is not None:
        yield begin, filled, current


def start_writeback(disk: Disk, offset: int, length: int, files: FileCalls) -> None:
    """Let the kernel begin to write the range out, so that the sync of the commit finds little left to do."""
    for segment in disk.segments(offset, length):
        if isinstance(segment, FileRange):
            files.start_writeback(segment.fd, segment.offset, segment.length)
