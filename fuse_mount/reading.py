"""Reads of an open disk: inline where the bytes are in memory, in a worker thread where they aren't.

The page cache of the image files is the cache: all doors share it, and the kernel has its memory back when it
wants to. So a read that finds its bytes costs one system call into a buffer that is used again and again.
What isn't there is read in a thread, with more around it for those who read small pieces, once for all who
wait for the same; and ahead of who reads in order.

The traps: a buffer that was handed out is good until the next await, so it is free for others as soon as the
reader goes on; and a reader captures descriptors, whose numbers are somebody else's once the disk is closed.
"""

import errno
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeVar

import trio

from gateway.images.at_hand import AtHand
from gateway.images.disk import FileRange, Hole, Reader
from gateway.images.errors import ImageError

T = TypeVar("T")

LARGEST_READ: Final = 1 << 20  # bytes, what the kernel asks a file system for at most
WINDOW_BYTES: Final = 64 << 10
LARGEST_WINDOW: Final = 8 << 20
NEVER: Final = 1 << 63

_IN_ORDER: Final = 1 << 20  # bytes; several requests of one reader may overtake each other
_ADVISED_BYTES: Final = 128 << 10  # of more the kernel reads the beginning, as long as one request may be
_REMEMBERED: Final = 1024  # windows, 64 MiB


class ReadableDisk(Protocol):
    """What is needed of an AccessDisk."""

    @property
    def size(self) -> int: ...

    def reader(self, *, nowait: bool = False) -> Reader: ...

    def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]: ...


class Buffers:
    """Memory for answers; who took a buffer gives it back before the answer is awaited."""

    def __init__(self) -> None:
        self._inline: Final = _new_buffer()
        self._idle: list[memoryview] = []

    def now(self, length: int) -> memoryview:
        """`length` bytes that are good until the next await, and for the loop's own thread alone."""
        return self._inline[:length] if length <= LARGEST_READ else memoryview(bytearray(length))

    def take(self, length: int) -> memoryview:
        """A buffer of at least `length` bytes."""
        if length > LARGEST_READ:
            return memoryview(bytearray(length))
        return self._idle.pop() if self._idle else _new_buffer()

    def give(self, buffer: memoryview) -> None:
        """Let others have it."""
        if len(buffer) == LARGEST_READ:
            self._idle.append(buffer)


def _new_buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, LARGEST_READ))


class Pace:
    """How one open file is read. Who reads beyond `marker` in order has more read ahead of him.

    Reading ahead begins with the second read of an order, by twice its length, and goes as far again each
    time: who stops has had no more read than twice what he asked for.
    """

    __slots__ = ("_ahead", "_window", "marker", "next")

    def __init__(self) -> None:
        self.next = -NEVER  # where a read would begin that follows the last one; the first follows none
        self.marker = NEVER
        self._ahead = 0
        self._window = 0

    def passed(self, offset: int, length: int) -> tuple[int, int] | None:
        """A read came beyond the marker, or found nothing: the bytes [start, stop) to fetch ahead of it."""
        if not -_IN_ORDER <= offset - self.next <= _IN_ORDER:
            self.marker, self._ahead, self._window = NEVER, 0, 0
            return None
        stop = offset + length
        start = self._ahead if stop < self._ahead <= stop + LARGEST_WINDOW else stop
        if start - stop > self._window // 2:  # it is on its way
            return None
        self._window = min(max(2 * self._window, 2 * length, WINDOW_BYTES), LARGEST_WINDOW)
        self._ahead = start + self._window
        self.marker = self._ahead - self._window // 2
        return start, self._ahead


@dataclass(eq=False, slots=True)
class _Window:
    start: int
    stop: int
    done: trio.Event = field(default_factory=trio.Event)


class DiskReads:
    """The reads of one open disk, by all files that are open on it.

    `now` reads inline; BlockingIOError when the bytes aren't at hand.
    """

    def __init__(
        self, disk: ReadableDisk, at_hand: AtHand, buffers: Buffers, threads: trio.CapacityLimiter
    ) -> None:
        self.size: Final = disk.size
        self._disk = disk
        self._blocking = disk.reader()
        self._buffers = buffers
        self._threads = threads
        self._pending: list[_Window] = []
        self._lately: OrderedDict[int, None] | None = None
        self._working = 0
        self._idle: trio.Event | None = None
        self._ended = False
        self.now: Reader = self._blocking
        if at_hand is AtHand.ASKED:
            self.now = disk.reader(nowait=True)
        elif at_hand is AtHand.LATELY:
            self._lately = OrderedDict()
            self.now = self._read_lately

    async def fetch(self, offset: int, length: int) -> memoryview:
        """Read what isn't at hand. Raises OSError, ImageError. The answer is good until the next await."""
        start, stop = offset, offset + length
        if length < WINDOW_BYTES:
            start, stop = self._windows(start, stop)
        for window in self._pending:
            if window.start <= offset and offset + length <= window.stop:
                await window.done.wait()
                self._check()
                answer = self._buffers.now(length)
                with suppress(BlockingIOError):
                    self.now(answer, offset)
                    return answer
                start, stop = offset, offset + length
                break
        with self._fetching(start, stop):
            return await self.in_thread(length, partial(self._read, offset=offset, start=start, stop=stop))

    def fetch_ahead(self, start: int, stop: int) -> None:
        """Begin to read what will be asked for next, if there is a thread for it."""
        start, stop = self._windows(start, stop)
        if start < stop and self._threads.available_tokens > 0 and not self._ended:
            trio.lowlevel.spawn_system_task(self._fetch_ahead, start, stop)

    async def in_thread(self, length: int, fill: Callable[[memoryview], None]) -> memoryview:
        """`length` bytes that `fill` puts into a buffer, in a worker thread; good until the next await."""
        buffer = self._buffers.take(length)
        try:
            answer = buffer[:length]
            await self.work(partial(fill, answer))
            return answer
        finally:
            self._buffers.give(buffer)

    async def work(self, call: Callable[[], T]) -> T:
        """Do something with the disk in a worker thread; `end` waits for it."""
        self._check()
        self._working += 1
        try:
            return await trio.to_thread.run_sync(call, limiter=self._threads)
        finally:
            self._working -= 1
            if not self._working and self._idle is not None:
                self._idle.set()

    async def end(self) -> None:
        """Nothing more is read; the disk may be closed then. Not to be cancelled."""
        self._ended = True
        while self._working:
            self._idle = trio.Event()
            await self._idle.wait()

    def _check(self) -> None:
        if self._ended:
            raise OSError(errno.ESHUTDOWN, "the disk is closed")

    def _windows(self, start: int, stop: int) -> tuple[int, int]:
        """The windows that a range touches."""
        return start - start % WINDOW_BYTES, min(-(-stop // WINDOW_BYTES) * WINDOW_BYTES, self.size)

    @contextmanager
    def _fetching(self, start: int, stop: int) -> Iterator[None]:
        window = _Window(start, stop)
        self._pending.append(window)
        try:
            yield
            self._remember(start, stop)
        finally:
            self._pending.remove(window)
            window.done.set()

    async def _fetch_ahead(self, start: int, stop: int) -> None:
        # What is wrong there, the reader who comes to it is told.
        with suppress(OSError, ImageError), self._fetching(start, stop):
            await self.work(partial(self._warm, start, stop))

    # In worker threads

    def _read(self, buffer: memoryview, *, offset: int, start: int, stop: int) -> None:
        if start < offset or offset + len(buffer) < stop:
            with suppress(OSError, ImageError):  # nobody has asked for that
                self._warm(start, stop)
        self._blocking(buffer, offset)

    def _warm(self, start: int, stop: int) -> None:
        """Have the kernel read a range. Where it can't say what it has, read it to the end."""
        scratch = None if self._lately is None else memoryview(bytearray(WINDOW_BYTES))
        for segment in self._disk.segments(start, stop - start):
            if isinstance(segment, Hole):
                continue
            if scratch is None:
                begin_to_read(segment)
                continue
            for at in range(0, segment.length, WINDOW_BYTES):
                piece = min(WINDOW_BYTES, segment.length - at)
                os.preadv(segment.fd, [scratch[:piece]], segment.offset + at)

    # Where the kernel can't say what it has

    def _read_lately(self, buffer: bytearray | memoryview, offset: int) -> None:
        lately = self._lately
        assert lately is not None
        for number in range(offset // WINDOW_BYTES, -(-(offset + len(buffer)) // WINDOW_BYTES)):
            if number not in lately:
                raise BlockingIOError(errno.EAGAIN, "it was not read lately")
            lately.move_to_end(number)
        self._blocking(buffer, offset)

    def _remember(self, start: int, stop: int) -> None:
        lately = self._lately
        if lately is None:
            return
        whole = stop if stop == self.size else stop - stop % WINDOW_BYTES
        for number in range(-(-start // WINDOW_BYTES), -(-whole // WINDOW_BYTES)):
            lately[number] = None
            lately.move_to_end(number)
        while len(lately) > _REMEMBERED:
            lately.popitem(last=False)


def begin_to_read(run: FileRange) -> None:
    """Have the kernel read a part of a file, without waiting for it. Raises OSError.

    What has its last byte in memory is taken to be there: to ask for it costs more than to read a byte.
    """
    byte = bytearray(1)
    stop = run.offset + run.length
    for at in range(run.offset, stop, _ADVISED_BYTES):
        end = min(at + _ADVISED_BYTES, stop)
        try:
            os.preadv(run.fd, (byte,), end - 1, os.RWF_NOWAIT)
        except OSError:  # it isn't there, or the kernel doesn't tell
            os.posix_fadvise(run.fd, at, end - at, os.POSIX_FADV_WILLNEED)
