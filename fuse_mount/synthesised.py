"""disk.vhd and disk.qcow2: the files that an export over HTTP would be, made where they are read.

Tables are made for each read, and the blocks come from the image files. The same layout with the same content
id gives the same bytes; so the id must be that of the bytes under the lease, for which the gateway is asked
after the lease was granted, and told which file it was of.
"""

import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

from fuse_mount.reading import DiskReads, Pace, begin_to_read
from gateway.access.client import AccessDisk
from gateway.images.allocation import stored_blocks
from gateway.images.disk import FileRange, Hole, Literal
from gateway.images.errors import CorruptImage, ImageError
from gateway.images.export_layout import SparseFormat, sparse_layout
from gateway.images.files import Buffer
from gateway.images.layout import Gather, Layout

_ZEROES: Final = bytes(1 << 20)


class SynthesisedFile:
    """An open file that a layout over an open disk is. See OpenFile."""

    def __init__(
        self,
        disk: AccessDisk,
        layout: Layout,
        reads: DiskReads,
        close: Callable[[], Awaitable[None]],
        content: object = None,
    ) -> None:
        self.size: Final = layout.size
        self.content: Final = content
        self._disk = disk
        self._layout = layout
        self._reads = reads
        self._close: Callable[[], Awaitable[None]] | None = close
        self._pace = Pace()

    async def read(self, offset: int, length: int) -> memoryview:
        """The bytes at `offset`, from a worker thread."""
        length = max(0, min(length, self.size - offset))
        if not length:
            return memoryview(b"")
        # Each is in a thread, and so is what is fetched ahead.
        ahead = self._pace.passed(offset, length) or (0, 0)
        self._pace.next = offset + length
        return await self._reads.in_thread(length, partial(self._fill, offset, ahead))

    async def write(self, offset: int, data: Buffer) -> int:
        """Never."""
        raise OSError(errno.EROFS, "this file is made of the disk when it is read")

    async def flush(self) -> None:
        """There is nothing to do."""

    async def close(self) -> None:
        """Let go of the disk."""
        close, self._close = self._close, None
        if close is not None:
            await close()

    def end(self) -> None:
        """Nothing is read any more; reads in threads are refused already."""

    def _fill(self, offset: int, ahead: tuple[int, int], buffer: memoryview) -> None:
        def read(_: object) -> None:
            with suppress(OSError, ImageError):  # nobody has asked for that
                _fetch(self._layout, *ahead)
            read_layout(self._layout, buffer, offset)

        self._disk.look(read)
        self._disk.bytes_read += len(buffer)


def layout_of(disk: AccessDisk, content_id: str, sparse_format: SparseFormat) -> Layout:
    """The file that a whole disk is in another format. Blocking. Raises ImageError, OSError."""
    blocks = disk.look(stored_blocks)
    return sparse_layout(disk, blocks, content_id, sparse_format)


def read_layout(layout: Layout, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with what the layout has at `offset`. Raises ImageError, OSError."""
    done = 0
    for segment in layout.segments(offset, offset + len(buffer)):
        part = buffer[done : done + segment.length]
        match segment:
            case FileRange():
                _read_file(segment, part)
            case Hole():
                for start in range(0, len(part), len(_ZEROES)):
                    piece = part[start : start + len(_ZEROES)]
                    piece[:] = _ZEROES[: len(piece)]
            case Literal():
                part[:] = segment.data
            case Gather():
                try:
                    segment.read_into(part)
                except EOFError as error:
                    raise OSError(errno.EIO, str(error)) from error
        done += segment.length


def _fetch(layout: Layout, start: int, stop: int) -> None:
    for segment in layout.segments(min(start, layout.size), min(stop, layout.size)):
        match segment:
            case FileRange():
                begin_to_read(segment)
            case Gather():
                for piece in segment.pieces:
                    if isinstance(piece, FileRange):
                        begin_to_read(piece)
            case _:
                pass


def _read_file(segment: FileRange, part: memoryview) -> None:
    done = 0
    while done < segment.length:
        count = os.preadv(segment.fd, [part[done:]], segment.offset + done)
        if count == 0:
            raise CorruptImage(f"descriptor {segment.fd}", "the file was cut shorter while it was open")
        done += count
