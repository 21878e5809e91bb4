"""One open file of the mount whose bytes are those of a disk, or of a part of one.

As of a block device: a read ends at the end, a write ends there, too, and beyond it is ENOSPC; sectors may be
written in part. A read that finds its bytes in memory never leaves the loop's thread: nothing is awaited,
nothing allocated, and what it costs beside the copy is a few look-ups. So what is said here of each read is
said in the shortest way.
"""

import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

from fuse_mount.reading import Buffers, DiskReads, Pace
from gateway.images.files import Buffer


class OpenFile(Protocol):
    """An open file of the mount. All failures are OSError or ImageError; `errno_of` knows their numbers."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def content(self) -> object:
        """The same for all files of a VDI that are open on the same disk."""
        ...

    async def read(self, offset: int, length: int) -> bytes | memoryview:
        """The bytes at `offset`: fewer at the end, none behind it.

        A memoryview is good until the next await.
        """
        ...

    async def write(self, offset: int, data: Buffer) -> int:
        """Write what lies before the end, and say how much that is. ENOSPC from the end on."""
        ...

    async def flush(self) -> None:
        """Make every completed write durable."""
        ...

    async def close(self) -> None:
        """Nothing is read or written any more. With a VDI's last file its lease ends; twice is allowed.

        Raises what a writer's last flush does.
        """
        ...


class WritableDisk(Protocol):
    """What is needed of an AccessDisk."""

    def pwrite(self, buf: Buffer, offset: int) -> None: ...

    def flush(self) -> None: ...


class DiskFile:
    """`length` bytes of a disk from `start` on.

    `disk` is None unless this mount writes to it; who only reads may sync, too, what others have written.
    """

    __slots__ = (
        "_buffers",
        "_close",
        "_disk",
        "_length",
        "_now",
        "_pace",
        "_reads",
        "_start",
        "_view",
        "_write",
        "content",
        "size",
    )

    def __init__(
        self,
        reads: DiskReads,
        buffers: Buffers,
        disk: WritableDisk | None,
        *,
        write: bool,
        start: int,
        length: int,
        content: object,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        self.size: Final = length
        self.content: Final = content
        self._start = start
        self._reads = reads
        self._buffers = buffers
        self._disk = disk
        self._write = write
        self._close: Callable[[], Awaitable[None]] | None = close
        self._pace = Pace()
        self._now = reads.now
        # Most requests are as long as the one before.
        self._length = 0
        self._view = buffers.now(0)

    async def read(self, offset: int, length: int) -> memoryview:
        """The bytes at `offset`; see OpenFile."""
        if length != self._length or offset + length > self.size:
            length = max(0, min(length, self.size - offset))
            if not length:
                return self._buffers.now(0)  # no disk is asked for places that no file can have
            self._view = self._buffers.now(length)
            self._length = length
        view = self._view
        offset += self._start
        try:
            self._now(view, offset)
        except BlockingIOError:
            self._read_on(offset, length)
            return await self._reads.fetch(offset, length)
        pace = self._pace
        if offset + length > pace.marker:
            self._read_on(offset, length)
        pace.next = offset + length
        return view

    def _read_on(self, offset: int, length: int) -> None:
        ahead = self._pace.passed(offset, length)
        self._pace.next = offset + length
        if ahead is not None:
            self._reads.fetch_ahead(*ahead)

    async def write(self, offset: int, data: Buffer) -> int:
        """Write `data` at `offset`; see OpenFile."""
        if self._disk is None or not self._write:
            raise OSError(errno.EBADF, "the file is open for reading only")
        if not data:
            return 0
        if offset >= self.size:
            raise OSError(errno.ENOSPC, "this is the end of the disk")
        view = memoryview(data)[: self.size - offset]
        await self._reads.work(partial(self._disk.pwrite, view, self._start + offset))
        return len(view)

    async def flush(self) -> None:
        """Make every completed write durable."""
        if self._disk is not None:
            await self._reads.work(self._disk.flush)

    async def close(self) -> None:
        """Let go of the disk; see OpenFile."""
        close, self._close = self._close, None
        if close is not None:
            self.end()
            await close()

    def end(self) -> None:
        """Nothing is read any more, because the disk is about to be closed."""
        self._now = _closed


def _closed(buf: bytearray | memoryview, offset: int) -> None:
    raise OSError(errno.ESHUTDOWN, "the file is closed")
