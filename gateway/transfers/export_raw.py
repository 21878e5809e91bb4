"""A disk becoming a raw body: any range of it, sent by one worker thread.

Long runs of an image file go by sendfile, short ones are gathered into one buffer, holes are sent without
being read. The trap: an image file that ends too early must break the answer off, never shorten it silently.
"""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from gateway.images.disk import Disk, FileRange, Hole, Literal
from gateway.images.layout import GATHER_MAXIMUM, Gather, entity_tag, raw_layout
from gateway.transfers.body import Sink
from gateway.transfers.thread import run_abortable

if TYPE_CHECKING:
    from gateway.core.leases import Lease

# A run of a file or a hole may be terabytes: it is sent in pieces, so that the progress moves.
_PIECE: Final = 16 << 20


def raw_entity_tag(content_id: str) -> str:
    """The strong ETag of the raw bytes of a VDI whose content is `content_id`."""
    return entity_tag([content_id], "raw")


class RawExport:
    """An open disk as raw bytes. `size` in bytes."""

    def __init__(self, disk: Disk) -> None:
        self._layout: Final = raw_layout(disk)
        self.size: Final = self._layout.size
        self.sent = 0

    def send(self, sink: Sink, start: int, stop: int) -> None:
        """Send the bytes from `start` up to `stop`; `sent` counts them as they go. Blocking.

        Raises SinkClosed, SinkStalled, TransferAborted; OSError and ImageError when the disk can't be read.
        """
        buffer: memoryview | None = None
        for segment in self._layout.segments(start, stop):
            match segment:
                case FileRange():
                    self._send_file(sink, segment)
                case Hole():
                    self._send_hole(sink, segment.length)
                case Literal():
                    sink.send(segment.data)
                    self.sent += segment.length
                case Gather():
                    if buffer is None:
                        buffer = memoryview(bytearray(GATHER_MAXIMUM))
                    try:
                        segment.read_into(buffer)
                    except EOFError as error:
                        raise OSError(errno.EIO, str(error)) from error
                    sink.send(buffer[: segment.length])
                    self.sent += segment.length

    def _send_file(self, sink: Sink, run: FileRange) -> None:
        for done in range(0, run.length, _PIECE):
            piece = min(run.length - done, _PIECE)
            sink.sendfile(run.fd, run.offset + done, piece)
            self.sent += piece

    def _send_hole(self, sink: Sink, length: int) -> None:
        while length:
            piece = min(length, _PIECE)
            sink.zeroes(piece)
            self.sent += piece
            length -= piece

    async def transfer(
        self, sink: Sink, start: int, stop: int, threads: trio.CapacityLimiter | None = None
    ) -> None:
        """`send` in a worker thread; cancellation ends it at once."""
        await run_abortable(lambda: self.send(sink, start, stop), sink, threads)


@asynccontextmanager
async def open_raw_export(
    lease: "Lease", threads: trio.CapacityLimiter | None = None
) -> AsyncIterator[RawExport]:
    """The disk of a read lease, opened for as long as the block lasts. Raises ImageError, OSError."""
    disk = await trio.to_thread.run_sync(lease.open_disk, limiter=threads)
    try:
        yield RawExport(disk)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(disk.close, limiter=threads)
