"""What is read inline, what in threads, how much around it, and for how many at once."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from fuse_mount.disk_file import DiskFile
from fuse_mount.reading import (
    LARGEST_READ,
    LARGEST_WINDOW,
    NEVER,
    WINDOW_BYTES,
    Buffers,
    DiskReads,
    Pace,
)
from gateway.images.at_hand import AtHand
from gateway.images.disk import FileRange, Hole, Reader

MIB = 1 << 20
SIZE = 8 * MIB + 700


class SlowDisk:
    """A disk whose bytes are in memory once they were read. Threads that read wait for the test's permission.

    `asked` are the ranges that a thread has read, `announced` those whose segments it has asked for.
    """

    def __init__(self, path: Path) -> None:
        self.size = SIZE
        self.content = random.Random(5).randbytes(SIZE)
        path.write_bytes(self.content)
        self.fd = os.open(path, os.O_RDONLY)
        self.there: set[int] = set()
        self.asked: list[tuple[int, int]] = []
        self.announced: list[tuple[int, int]] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.failure: Exception | None = None

    def reader(self, *, nowait: bool = False) -> Reader:
        return self._now if nowait else self._wait

    def _now(self, buf: bytearray | memoryview, offset: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        if not self._pages(offset, len(buf)) <= self.there:
            raise BlockingIOError(errno.EAGAIN, "not at hand")
        self._fill(buf, offset)

    def _wait(self, buf: bytearray | memoryview, offset: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.asked.append((offset, len(buf)))
            assert self.may_read.wait(20)
            if self.failure is not None:
                raise self.failure
            self.there |= self._pages(offset, len(buf))
        self._fill(buf, offset)

    def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        self.announced.append((offset, length))
        self.there |= self._pages(offset, length)
        yield FileRange(self.fd, offset, length // 2)
        yield Hole(7)
        yield FileRange(self.fd, offset + length // 2 + 7, length - length // 2 - 7)

    def _fill(self, buf: bytearray | memoryview, offset: int) -> None:
        assert 0 <= offset <= offset + len(buf) <= SIZE
        buf[:] = self.content[offset : offset + len(buf)]

    @staticmethod
    def _pages(offset: int, length: int) -> set[int]:
        return set(range(offset // 4096, -(-(offset + length) // 4096)))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    disk = SlowDisk(tmp_path / "disk")
    yield disk
    disk.may_read.set()
    os.close(disk.fd)


class Opened:
    def __init__(self, disk: SlowDisk, at_hand: AtHand = AtHand.ASKED, threads: int = 4) -> None:
        self.disk = disk
        self.buffers = Buffers()
        self.reads = DiskReads(disk, at_hand, self.buffers, trio.CapacityLimiter(threads))

    def file(self) -> DiskFile:
        async def close() -> None:
            pass

        return DiskFile(
            self.reads, self.buffers, None, write=False, start=0, length=SIZE, content=None, close=close
        )

    async def check(self, file: DiskFile, offset: int, length: int) -> None:
        assert bytes(await file.read(offset, length)) == self.disk.content[offset : offset + length]


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.001)


@pytest.mark.parametrize("at_hand", AtHand)
async def test_every_read_has_its_bytes(disk: SlowDisk, at_hand: AtHand) -> None:
    opened = Opened(disk, at_hand)
    files, choose = [opened.file() for _ in range(3)], random.Random(at_hand.value)
    for _ in range(300):
        length = choose.choice([0, 1, 512, 4096, 65_536, 100_000, MIB, 3 * MIB])
        await opened.check(choose.choice(files), choose.randrange(SIZE + 1000), length)


@pytest.mark.parametrize("at_hand", AtHand)
async def test_readers_at_the_same_time_each_have_their_bytes(disk: SlowDisk, at_hand: AtHand) -> None:
    opened = Opened(disk, at_hand)

    async def read(seed: int) -> None:
        file, choose = opened.file(), random.Random(seed)
        for _ in range(40):
            await opened.check(file, choose.randrange(SIZE), choose.choice([512, 4096, 70_000, MIB]))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for seed in range(12):
            nursery.start_soon(read, seed)


async def test_what_is_at_hand_is_read_without_a_thread_and_without_waiting(disk: SlowDisk) -> None:
    opened = Opened(disk)
    file = opened.file()
    disk.there = SlowDisk._pages(0, SIZE)
    with trio.testing.assert_no_checkpoints():
        await opened.check(file, 0, 4096)
        await opened.check(file, 5 * MIB + 3, MIB)
        await opened.check(file, SIZE - 3, 4096)
    assert disk.asked == disk.announced == []


async def test_a_small_read_brings_its_window_and_neighbours_find_it(disk: SlowDisk) -> None:
    opened = Opened(disk)
    file = opened.file()
    await opened.check(file, 3 * MIB + 5000, 4096)
    assert disk.asked == [(3 * MIB + 5000, 4096)]
    assert disk.announced == [(3 * MIB, WINDOW_BYTES)]
    with trio.testing.assert_no_checkpoints():
        for offset in range(3 * MIB, 3 * MIB + WINDOW_BYTES, 4096):
            await opened.check(opened.file(), offset, 4096)
    assert len(disk.asked) == 1


async def test_all_who_wait_for_one_window_have_it_read_once(disk: SlowDisk) -> None:
    opened = Opened(disk)
    disk.may_read.clear()
    async with trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(opened.check, opened.file(), 3 * MIB + 4096 * number, 4096)
        await until(lambda: disk.asked)
        await trio.testing.wait_all_tasks_blocked(0.02)
        disk.may_read.set()
    assert len(disk.asked) == 1


async def test_a_reader_whose_window_failed_for_another_reads_for_himself(disk: SlowDisk) -> None:
    opened = Opened(disk)
    disk.may_read.clear()
    disk.failure = OSError(errno.EIO, "a bad sector")
    disk.segments = lambda offset, length: iter(())  # type: ignore[method-assign]

    async def fails() -> None:
        with pytest.raises(OSError, match="bad sector"):
            await opened.file().read(0, 512)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails)
        await until(lambda: disk.asked)
        nursery.start_soon(fails)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert len(disk.asked) == 1
        disk.may_read.set()
    assert len(disk.asked) == 2


async def test_a_damaged_place_beside_what_is_read_is_nobodys_failure(disk: SlowDisk) -> None:
    opened = Opened(disk)

    def segments(offset: int, length: int) -> Iterator[FileRange | Hole]:
        raise OSError(errno.EIO, "a bad sector beside")

    disk.segments = segments  # type: ignore[method-assign]
    await opened.check(opened.file(), 3 * MIB, 4096)


async def test_who_reads_in_order_is_read_ahead_for_and_waits_for_few_reads(disk: SlowDisk) -> None:
    opened = Opened(disk)
    file = opened.file()
    for offset in range(0, SIZE, 4096):
        await opened.check(file, offset, 4096)
        await trio.lowlevel.checkpoint()  # what is to be fetched ahead begins
        await until(lambda: not opened.reads._working)
    assert len(disk.asked) <= 3
    fetched = sum(length for _, length in disk.announced)
    assert fetched <= 1.1 * SIZE
    assert max(length for _, length in disk.announced) <= LARGEST_WINDOW


async def test_who_reads_here_and_there_has_no_more_than_a_window_read(disk: SlowDisk) -> None:
    opened = Opened(disk)
    file = opened.file()
    for offset in (6 * MIB, 2 * MIB, 7 * MIB, 4 * MIB):
        await opened.check(file, offset, 4096)
    assert {length for _, length in disk.announced} == {WINDOW_BYTES}


async def test_no_thread_reads_ahead_when_all_are_busy(disk: SlowDisk) -> None:
    opened = Opened(disk, threads=1)
    disk.may_read.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opened.check, opened.file(), 0, MIB)
        await until(lambda: disk.asked)
        opened.reads.fetch_ahead(4 * MIB, 5 * MIB)
        await trio.testing.wait_all_tasks_blocked(0.02)
        disk.may_read.set()
    assert (4 * MIB, MIB) not in disk.announced


async def test_where_the_kernel_says_nothing_what_was_read_lately_is_read_inline(disk: SlowDisk) -> None:
    opened = Opened(disk, AtHand.LATELY)
    file = opened.file()
    await opened.check(file, 3 * MIB, 4096)
    assert len(disk.asked) == 1
    with trio.testing.assert_no_checkpoints():
        await opened.check(file, 3 * MIB + 4096, 8192)
    await opened.check(file, 3 * MIB - 100, 200)
    assert len(disk.asked) == 2


async def test_the_end_waits_for_reads_and_lets_no_more_begin(disk: SlowDisk) -> None:
    opened = Opened(disk)
    file, other = opened.file(), opened.file()
    disk.may_read.clear()
    ended = trio.Event()

    async def end() -> None:
        await opened.reads.end()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(opened.check, file, 0, 4096)
        await until(lambda: disk.asked)
        opened.reads.fetch_ahead(4 * MIB, 5 * MIB)
        nursery.start_soon(end)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not ended.is_set()
        with pytest.raises(OSError, match="closed"):
            await other.read(2 * MIB, 4096)
        disk.may_read.set()
    assert ended.is_set()
    opened.reads.fetch_ahead(0, MIB)
    await trio.testing.wait_all_tasks_blocked(0.02)
    assert (0, MIB) not in disk.announced


async def test_answers_of_threads_are_in_buffers_of_their_own(disk: SlowDisk) -> None:
    opened = Opened(disk)
    disk.may_read.clear()
    async with trio.open_nursery() as nursery:
        for offset in (0, 2 * MIB, 4 * MIB, 6 * MIB):
            nursery.start_soon(opened.check, opened.file(), offset, MIB)
        await until(lambda: len(disk.asked) == 4)
        disk.may_read.set()
    assert len(opened.buffers._idle) == 4


async def test_a_request_that_is_larger_than_the_kernels_is_answered_whole(disk: SlowDisk) -> None:
    opened = Opened(disk)
    await opened.check(opened.file(), 0, 4 * LARGEST_READ)
    await opened.check(opened.file(), 0, 4 * LARGEST_READ)


def test_a_pace_begins_with_the_second_read_and_ends_with_a_jump() -> None:
    pace = Pace()

    def read(offset: int, length: int) -> tuple[int, int] | None:
        ahead = pace.passed(offset, length)
        pace.next = offset + length
        return ahead

    assert read(0, MIB) is None
    assert pace.marker == NEVER
    assert read(MIB, MIB) == (2 * MIB, 4 * MIB)
    assert pace.marker == 3 * MIB
    assert read(2 * MIB, MIB) == (4 * MIB, 8 * MIB)
    assert read(3 * MIB, MIB) is None  # enough is on its way
    assert read(500 * MIB, MIB) is None
    assert pace.marker == NEVER
    assert read(501 * MIB, 4096) == (501 * MIB + 4096, 501 * MIB + 4096 + WINDOW_BYTES)
