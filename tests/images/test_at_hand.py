"""Readers that never wait: what is in memory is read, and for all else somebody has to be asked who may wait.

The file system of the tests has RWF_NOWAIT or the tests are skipped: a tmpfs has not.
"""

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from gateway.images.at_hand import AtHand, how_at_hand
from gateway.images.chain import open_chain_files, open_disk
from gateway.images.disk import FileDisk
from gateway.images.vhd.create import create_dynamic
from tests.images.disks import make_child, open_leaf, put, read, read_all
from tests.images.exports import random_chain
from tests.page_cache import drop

MIB = 1 << 20
STEP = 64 << 10


@pytest.fixture(autouse=True)
def _the_kernel_tells(tmp_path: Path) -> None:
    path = tmp_path / "probe"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                pytest.skip("the file system of the temporary directory doesn't say what is in memory")


def opened(path: Path, *, writable: bool = False) -> FileDisk:
    return open_disk(open_chain_files(str(path), writable=writable), read_only=not writable)


@pytest.mark.parametrize("seed", range(12))
def test_what_was_read_is_at_hand_and_has_the_same_bytes(tmp_path: Path, seed: int) -> None:
    chain = random_chain(tmp_path, seed)
    disk = opened(chain[0])
    # Not as a whole: of long runs of a root no block is looked up.
    expected = b"".join(read(disk, at, min(STEP, disk.size - at)) for at in range(0, disk.size, STEP))
    now = disk.reader(nowait=True)
    choose = random.Random(seed)
    count = 0
    for _ in range(400):
        length = choose.choice([1, 512, 4096, 100_000, MIB])
        offset = choose.randrange(disk.size - length)
        buffer = bytearray(length)
        try:
            now(buffer, offset)
        except BlockingIOError:  # too many pieces, or the kernel was short of memory
            continue
        count += 1
        assert buffer == expected[offset : offset + length]
    assert count > 200
    disk.close()


def test_what_is_not_in_memory_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(os.urandom(32 * MIB))
    drop(path)
    disk = opened(path)
    with pytest.raises(BlockingIOError):
        disk.reader(nowait=True)(bytearray(MIB), 16 * MIB)
    disk.close()


def test_blocks_that_were_not_looked_up_are_not_at_hand_and_are_then(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 8 * MIB)
    writer = open_leaf(path, writable=True)
    writer.pwrite(b"d" * 2 * MIB, 0)
    writer.pwrite(b"p" * 4096, 2 * MIB)
    writer.close()
    disk = opened(path)
    now, places = disk.reader(nowait=True), (0, 2 * MIB, 3 * MIB, 6 * MIB)
    for offset in places:
        with pytest.raises(BlockingIOError):
            now(bytearray(4096), offset)
    list(disk.segments(0, disk.size))
    found = []
    for offset in places:
        buffer = bytearray(b"?" * 4096)
        now(buffer, offset)
        found.append(bytes(buffer))
    assert found == [b"d" * 4096, b"p" * 4096, bytes(4096), bytes(4096)]
    disk.close()


def test_a_request_over_more_pieces_than_can_be_read_in_a_moment_is_for_who_may_wait(tmp_path: Path) -> None:
    parent, leaf = tmp_path / "parent.vhd", tmp_path / "leaf.vhd"
    create_dynamic(str(parent), 2 * MIB)
    disk = open_leaf(parent, writable=True)
    disk.pwrite(b"p" * 2 * MIB, 0)
    disk.close()
    make_child(leaf, parent)
    disk = open_leaf(leaf, writable=True)
    for offset in range(0, MIB, 1024):
        disk.pwrite(b"l" * 512, offset)
    disk.close()
    reading = opened(leaf)
    assert read_all(reading)[:2048] == (b"l" * 512 + b"p" * 512) * 2
    now = reading.reader(nowait=True)
    with pytest.raises(BlockingIOError):
        now(bytearray(MIB), 0)
    buffer = bytearray(8192)
    now(buffer, 0)
    assert buffer == (b"l" * 512 + b"p" * 512) * 8
    reading.close()


def test_it_does_not_wait_for_who_looks_a_block_up(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 8 * MIB)
    disk = opened(path)
    refused = threading.Event()

    def ask() -> None:
        try:
            disk.reader(nowait=True)(bytearray(512), 0)
        except BlockingIOError:
            refused.set()

    lock = disk._lock  # type: ignore[attr-defined]
    with lock:
        reader = threading.Thread(target=ask)
        reader.start()
        assert refused.wait(20)
    reader.join()
    disk.close()


def test_what_a_writer_has_written_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 8 * MIB)
    disk = opened(path, writable=True)
    now, buffer = disk.reader(nowait=True), bytearray(4096)
    disk.pwrite(b"w" * 2 * MIB, 2 * MIB)
    now(buffer, 3 * MIB)
    assert buffer == b"w" * 4096
    disk.close()


def test_what_a_writer_has_changed_is_not_read_where_it_lay_before(tmp_path: Path) -> None:
    parent, leaf = tmp_path / "parent.vhd", tmp_path / "leaf.vhd"
    create_dynamic(str(parent), 2 * MIB)
    put(parent, (0, b"p" * 4096))
    make_child(leaf, parent)
    disk = opened(leaf, writable=True)
    disk.pwrite(b"l" * 512, 0)
    assert read(disk, 0, 1024) == b"l" * 512 + b"p" * 512
    disk.pwrite(b"l" * 512, 512)
    with pytest.raises(BlockingIOError):
        disk.reader(nowait=True)(bytearray(1024), 0)
    disk.close()


def test_of_a_run_that_is_in_memory_in_part_nothing_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 4 * MIB)
    put(path, (0, b"d" * 4 * MIB))
    disk = opened(path)
    read_all(disk)

    def half(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        return os.preadv(fd, [memoryview(buffers[0])[: len(buffers[0]) // 2]], offset, flags)

    monkeypatch.setattr("gateway.images.vhd.chain.preadv", half)
    for offset in (0, 2 * MIB - 512):
        with pytest.raises(BlockingIOError):
            disk.reader(nowait=True)(bytearray(1024), offset)
    disk.close()


def test_a_file_that_was_cut_is_left_to_who_may_wait(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"d" * MIB)
    disk = opened(path)
    os.truncate(path, MIB // 2)
    with pytest.raises(BlockingIOError):
        disk.reader(nowait=True)(bytearray(4096), MIB // 2 - 512)
    disk.close()


def test_how_one_knows_is_the_file_systems_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")

    def no_flags(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        raise OSError(errno.EOPNOTSUPP, "no such flag")

    with path.open("rb") as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", no_flags)
            assert how_at_hand(file.fileno()) in {AtHand.LATELY, AtHand.ALWAYS}
    memory = os.memfd_create("memory")
    os.write(memory, b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", no_flags)
        assert how_at_hand(memory) is AtHand.ALWAYS
    os.close(memory)
