"""The inner loop of an import: bytes from a body to a disk, whatever the pieces they come in."""

import os
import random
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.wire import ThreadWire, Wire
from gateway.images.disk import Extent, FileRange, Hole
from gateway.images.files import Buffer, FileCalls
from gateway.images.raw import RawDisk
from gateway.transfers.body import BodyReset, BodyStalled, TransferAborted
from gateway.transfers.import_raw import PIECE_BYTES, Received, receive, runs
from gateway.transfers.thread import run_abortable

KIB = 1 << 10


class Pieces:
    """A body that gives pieces of the lengths it is told, and then ends."""

    def __init__(self, data: bytes, lengths: Iterator[int], *, reset: bool = False) -> None:
        self.rest = data
        self.lengths = lengths
        self.reset = reset

    def recv_into(self, view: memoryview) -> int:
        if not self.rest and self.reset:
            raise BodyReset("reset")
        count = min(next(self.lengths), len(view), len(self.rest))
        view[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count

    def more_within(self, _seconds: float) -> bool:
        return bool(self.rest)

    def abort(self) -> None:
        raise AssertionError


class Memory:
    """A disk in memory that remembers how it was called."""

    read_only = False

    def __init__(self, size: int, fill: bytes = b"\0") -> None:
        self.data = bytearray(fill * size)
        self.size = size
        self.writes: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def pwrite(self, buf: Buffer, offset: int) -> None:
        self.writes.append((offset, len(buf)))
        self.data[offset : offset + len(buf)] = buf

    def zero(self, offset: int, length: int, *, trim: bool) -> None:
        self.zeroed.append((offset, length))
        self.data[offset : offset + length] = bytes(length)

    def flush(self) -> None: ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        raise AssertionError

    def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        yield Hole(length)

    def close(self) -> None: ...


def image(pieces: list[tuple[int, bool]]) -> bytes:
    return b"".join(bytes(length) if zero else b"\x01" * length for length, zero in pieces)


PIECES = st.lists(st.tuples(st.integers(1, 3 * PIECE_BYTES), st.booleans()), max_size=6)


@given(PIECES, st.sampled_from([PIECE_BYTES, 4 * PIECE_BYTES]), st.booleans(), st.integers(0, 1000))
def test_any_body_in_any_pieces_is_what_the_disk_holds(
    pieces: list[tuple[int, bool]], buffer: int, fresh: bool, seed: int
) -> None:
    data = image(pieces)
    disk = Memory(len(data) + 10, b"\0" if fresh else b"\xee")
    chance = random.Random(seed)
    lengths = iter(lambda: chance.randint(1, 2 * PIECE_BYTES), None)
    received = Received(len(data))
    receive(Pieces(data, lengths), disk, received, fresh=fresh, buffer_bytes=buffer)
    assert received.count == len(data)
    assert received.fraction() == 1.0
    assert bytes(disk.data[: len(data)]) == data
    assert bytes(disk.data[len(data) :]) == (b"\0" if fresh else b"\xee") * 10


@given(PIECES)
def test_runs_cover_the_buffer_in_order_and_alternate(pieces: list[tuple[int, bool]]) -> None:
    data = bytearray(image(pieces))
    found = list(runs(data, len(data)))
    assert b"".join(bytes(data[start:stop]) for start, stop, _ in found) == data
    assert all(one[2] is not other[2] for one, other in pairwise(found))
    for start, stop, is_zero in found:
        assert start % PIECE_BYTES == 0
        assert not is_zero or not any(data[start:stop])


def test_a_fresh_disk_is_not_bothered_with_zeroes_and_another_is_told_of_them() -> None:
    data = bytes(2 * PIECE_BYTES) + b"\x01" * PIECE_BYTES + bytes(PIECE_BYTES + 5)
    for fresh, zeroed in ((True, []), (False, [(0, 2 * PIECE_BYTES), (3 * PIECE_BYTES, PIECE_BYTES + 5)])):
        disk = Memory(len(data), b"\0" if fresh else b"\xee")
        receive(Pieces(data, iter([len(data), 0])), disk, Received(len(data)), fresh=fresh)
        assert disk.writes == [(2 * PIECE_BYTES, PIECE_BYTES)]
        assert disk.zeroed == zeroed


@pytest.mark.parametrize("reset", [False, True])
def test_what_came_before_the_end_or_a_reset_is_counted(reset: bool) -> None:
    disk, received = Memory(1000), Received(1000)
    receive(Pieces(b"\x07" * 300, iter([100] * 10), reset=reset), disk, received, fresh=True)
    assert received.count == 300
    assert received.fraction() == 0.3
    assert bytes(disk.data) == b"\x07" * 300 + bytes(700)


def test_an_empty_body_of_an_empty_disk() -> None:
    received = Received(0)
    receive(Pieces(b"", iter([])), Memory(0), received, fresh=True)
    assert received.fraction() == 1.0


def test_writing_back_begins_before_the_end(tmp_path: Path) -> None:
    class Hints(FileCalls):
        def __init__(self) -> None:
            self.ranges: list[tuple[int, int]] = []

        def start_writeback(self, fd: int, offset: int, length: int) -> None:
            self.ranges.append((offset, length))

    path, hints, data = tmp_path / "x.raw", Hints(), os.urandom(20 << 20)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, len(data))
    disk = RawDisk(fd, len(data), read_only=False, path=str(path), files=hints)
    receive(Pieces(data, iter([1 << 20] * 30)), disk, Received(len(data)), fresh=True, files=hints)
    disk.close()
    assert path.read_bytes() == data
    assert hints.ranges[0][0] == 0
    assert sum(length for _, length in hints.ranges) >= 16 << 20


@pytest.fixture
async def pair() -> "tuple[socket.socket, ThreadWire]":
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    listener.close()
    return client, Wire(accepted).for_thread(0.3, b"first")


def received_all(wire: ThreadWire, count: int) -> bytes:
    data, view = b"", memoryview(bytearray(count))
    while len(data) < count:
        got = wire.recv_into(view[: count - len(data)])
        if not got:
            break
        data += view[:got]
    return data


async def test_a_wire_gives_what_came_before_and_then_the_rest(
    pair: tuple[socket.socket, ThreadWire],
) -> None:
    client, wire = pair
    data = os.urandom(3 << 20)

    def send() -> None:
        with client:
            client.sendall(data)

    sender = threading.Thread(target=send)
    sender.start()
    assert received_all(wire, 10 << 20) == b"first" + data
    sender.join()
    assert not wire.more_within(1)
    wire.close()
    wire._socket.close()


async def test_a_slow_client_below_the_low_water_mark_is_no_stalled_one(
    pair: tuple[socket.socket, ThreadWire],
) -> None:
    client, wire = pair
    assert received_all(wire, 5) == b"first"
    got: list[int] = []
    view = memoryview(bytearray(1 << 20))

    def read() -> None:
        with pytest.raises(BodyStalled):
            while True:
                got.append(wire.recv_into(view))

    client.send(b"x" * 1000)
    reader = threading.Thread(target=read)
    reader.start()
    reader.join()
    assert sum(got) == 1000
    wire.close()
    wire._socket.close()
    client.close()


async def test_abort_wakes_a_waiting_thread_and_lasts(pair: tuple[socket.socket, ThreadWire]) -> None:
    client, wire = pair
    assert received_all(wire, 5) == b"first"
    view = memoryview(bytearray(10))
    object.__setattr__(wire, "_idle", 60.0)
    with trio.move_on_after(0.1) as scope:
        await run_abortable(lambda: wire.recv_into(view), wire)
    assert scope.cancelled_caught
    with pytest.raises(TransferAborted):
        wire.recv_into(view)
    with pytest.raises(TransferAborted):
        wire.send(bytes(100 << 20))
    wire.close()
    wire.abort()
    wire._socket.close()
    client.close()


async def test_what_the_thread_returns_or_raises_comes_through() -> None:
    class Nothing:
        def abort(self) -> None:
            raise AssertionError

    assert await run_abortable(lambda: 7, Nothing()) == 7
    with pytest.raises(ZeroDivisionError):
        await run_abortable(lambda: 1 // 0, Nothing())
