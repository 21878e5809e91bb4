import errno
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gateway.images.at_hand import AtHand
from gateway.images.vhd import short_runs
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.short_runs import read_short_runs
from tests.images.disks import make_child, open_leaf, read

SECTOR = 512
GRANULE = 1 << 20
FILES = 4


@pytest.fixture
def fds(tmp_path: Path) -> Iterator[list[int]]:
    """Files of random bytes at indices from 1 on."""
    opened = [-1]
    for number in range(FILES):
        path = tmp_path / str(number)
        path.write_bytes(random.Random(number).randbytes(GRANULE + 4096 * number))
        opened.append(os.open(path, os.O_RDONLY))
    yield opened
    for fd in opened[1:]:
        os.close(fd)


def random_runs(chance: random.Random, length: int) -> list[tuple[int, int, int]]:
    """Runs of one granule that begins at another place of each file; neighbours differ."""
    runs: list[tuple[int, int, int]] = []
    done, last = 0, -1
    while done < length:
        index = chance.choice([each for each in range(FILES + 1) if each != last])
        size = min(chance.choice([1, 3, 8, 31, 200, 700]) * SECTOR, length - done)
        runs.append((index, 4096 * (index - 1) + done if index else 0, size))
        done += size
        last = index
    return runs


def expected(runs: list[tuple[int, int, int]], fds: list[int]) -> bytes:
    return b"".join(os.pread(fds[index], size, at) if index else bytes(size) for index, at, size in runs)


@pytest.mark.parametrize("at_hand", AtHand)
@pytest.mark.parametrize("seed", range(8))
def test_each_run_comes_from_its_file(fds: list[int], at_hand: AtHand, seed: int) -> None:
    chance = random.Random(seed)
    length = chance.randrange(1, GRANULE // SECTOR) * SECTOR
    runs = random_runs(chance, length)
    buffer = bytearray(b"\xee" * length)
    assert read_short_runs(memoryview(buffer), runs, fds, at_hand)
    assert buffer == expected(runs, fds)


@pytest.mark.parametrize("at_hand", AtHand)
def test_what_is_not_in_memory_is_waited_for(fds: list[int], at_hand: AtHand) -> None:
    runs = random_runs(random.Random(1), GRANULE)
    wanted = expected(runs, fds)
    for fd in fds[1:]:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(GRANULE)
    assert read_short_runs(memoryview(buffer), runs, fds, at_hand)
    assert buffer == wanted


@pytest.mark.parametrize("at_hand", AtHand)
@pytest.mark.parametrize("short", [1, 2])
def test_a_file_that_ends_early_is_told(fds: list[int], tmp_path: Path, at_hand: AtHand, short: int) -> None:
    """Whether it is the one that has most of the bytes, or another."""
    runs = [(1, 0, 8 * SECTOR), (2, 4096 + 8 * SECTOR, SECTOR), (1, 9 * SECTOR, 4 * SECTOR)]
    runs.append((2, 4096 + 13 * SECTOR, SECTOR))
    runs.append((1, 14 * SECTOR, SECTOR))
    os.truncate(tmp_path / str(short - 1), 4096 * (short - 1) + 13 * SECTOR)
    assert not read_short_runs(memoryview(bytearray(15 * SECTOR)), runs, fds, at_hand)


def test_only_zeroes_are_nobodys_short_runs(fds: list[int]) -> None:
    assert not read_short_runs(memoryview(bytearray(1024)), [(0, 0, 512), (0, 0, 512)], fds, AtHand.ASKED)


def test_a_bad_sector_that_a_child_hides_is_nobodys_concern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    create_dynamic(str(parent), 4 << 20)
    with closing(open_leaf(parent, writable=True)) as disk:
        disk.pwrite(b"p" * GRANULE, 0)
    make_child(child, parent)
    with closing(open_leaf(child, writable=True)) as disk:
        for place in range(4):
            disk.pwrite(b"c" * 4096, place * 65536)
    asked = []

    def fails(fd: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(map(len, buffers)))
        raise OSError(errno.EIO, "a bad sector")

    monkeypatch.setattr(short_runs, "preadv", fails)
    with closing(open_leaf(child)) as disk:
        found = read(disk, 0, GRANULE)
    assert asked == [GRANULE - 4096]  # all that the parent has behind the first run of the child
    assert found == ((b"c" * 4096 + b"p" * (65536 - 4096)) * 4).ljust(GRANULE, b"p")
