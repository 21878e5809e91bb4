"""A disk becoming a body in any format, or any range of it, sent by one worker thread.

Long runs of an image file go by sendfile, short ones are gathered into one buffer, holes are sent without
being read. The trap: an image file that ends too early must break the answer off, never shorten it silently.

Another trap: sendfile hands out the file's own pages. A client on the same machine finds in them what
somebody has written to the file since, also after the last byte was sent and the lease has ended. So the end
of a body, as much as may be on its way then, is copied out of the file.
"""

from pathlib import Path
from typing import Final

import trio

from gateway.images.disk import FileRange, Hole, Literal
from gateway.images.layout import GATHER_MAXIMUM, Gather, Layout
from gateway.transfers.body import Sink
from gateway.transfers.thread import run_abortable

# A run of a file or a hole may be terabytes: it is sent in pieces, so that the progress moves.
_PIECE: Final = 16 << 20
_SYSCTL: Final = Path("/proc/sys/net")
# Where the kernel says nothing: more than it allows by itself.
_DEFAULT_WINDOW: Final = 64 << 20


def _most_on_its_way() -> int:
    """How many bytes one connection's two sockets hold at most, of what was sent and not read yet."""
    most = 0
    for name in ("wmem", "rmem"):
        try:
            grown = int((_SYSCTL / "ipv4" / f"tcp_{name}").read_text().split()[2])
            # What a program asks for by setsockopt is doubled.
            asked = 2 * int((_SYSCTL / "core" / f"{name}_max").read_text())
        except (OSError, ValueError, IndexError):
            return _DEFAULT_WINDOW
        most += max(grown, asked)
    return most


COPIED_BYTES: Final = _most_on_its_way()
"""So many bytes at the end of a body are copied: then nobody waits for pages of a file any more."""


class DiskExport:
    """The bytes of a layout on their way. `size` in bytes."""

    def __init__(self, layout: Layout) -> None:
        self._layout: Final = layout
        self.size: Final = layout.size
        self.sent = 0
        self._buffer: memoryview | None = None

    def send(self, sink: Sink, start: int, stop: int) -> None:
        """Send the bytes from `start` up to `stop`; `sent` counts them as they go. Blocking.

        Raises SinkClosed, SinkStalled, TransferAborted; OSError and ImageError when the disk can't be read.
        """
        copied_from = self.sent + stop - start - COPIED_BYTES
        for segment in self._layout.segments(start, stop):
            match segment:
                case FileRange():
                    self._send_file(sink, segment, copied_from)
                case Hole():
                    self._send_hole(sink, segment.length)
                case Literal():
                    sink.send(segment.data)
                    self.sent += segment.length
                case Gather():
                    self._send_copied(sink, segment)

    def _send_file(self, sink: Sink, run: FileRange, copied_from: int) -> None:
        """By sendfile until `sent` is `copied_from`."""
        done = 0
        while done < run.length:
            if self.sent < copied_from:
                piece = min(run.length - done, _PIECE, copied_from - self.sent)
                sink.sendfile(run.fd, run.offset + done, piece)
                self.sent += piece
            else:
                piece = min(run.length - done, GATHER_MAXIMUM)
                self._send_copied(sink, Gather((FileRange(run.fd, run.offset + done, piece),), piece))
            done += piece

    def _send_copied(self, sink: Sink, pieces: Gather) -> None:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(GATHER_MAXIMUM))
        pieces.read_into(self._buffer)
        sink.send(self._buffer[: pieces.length])
        self.sent += pieces.length

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
