"""Changes in which memory runs out, at each place where Python asks for some: who is told that all is durable
finds all of it, and nobody waits for ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gateway.images.disk import Disk
from gateway.images.vhd.create import create_dynamic
from tests.images.disks import content, make_child, open_leaf, pattern, put, read_all

BLOCK = 4096
SIZE = 6 * BLOCK
OLD = pattern(SIZE, 1)
NEW = pattern(SIZE, 2)
FLUSHED = range(BLOCK)
CALLS = 70  # none of the changes asks for memory more often

Change = Callable[[Disk, int, int], None]


def write(disk: Disk, start: int, stop: int) -> None:
    disk.pwrite(NEW[start:stop], start)


def trim(disk: Disk, start: int, stop: int) -> None:
    disk.zero(start, stop - start, trim=True)


def zero(disk: Disk, start: int, stop: int) -> None:
    disk.zero(start, stop - start, trim=False)


def flush(disk: Disk, start: int, stop: int) -> None:
    disk.flush()


# Each with the bytes it is about.
CHANGES: tuple[tuple[Change, int, int], ...] = (
    (write, BLOCK, BLOCK + 1024),  # a new block
    (write, BLOCK + 1024, 2 * BLOCK),  # which is full now
    (flush, 0, 0),
    (write, BLOCK + 512, BLOCK + 1536),  # and written to without a lock
    (write, 2 * BLOCK - 100, 2 * BLOCK + 700),  # two new blocks' edges
    (trim, 3 * BLOCK, 4 * BLOCK),  # hides the parent's
    (zero, 4 * BLOCK + 10, 5 * BLOCK - 10),
)
_C_API: Any = import_module("_testcapi")


@contextmanager
def memory_fails(at: int) -> Iterator[None]:
    """Let the `at`th time from now that Python asks for memory be in vain."""
    _C_API.set_nomemory(at, at + 1)
    try:
        yield
    finally:
        _C_API.remove_mem_hooks()


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    parent, leaf = tmp_path / "parent.vhd", tmp_path / "leaf.vhd"
    create_dynamic(str(parent), SIZE, block_size=BLOCK)
    put(parent, (0, OLD))
    make_child(leaf, parent, block_size=BLOCK)
    put(leaf, (FLUSHED.start, NEW[: FLUSHED.stop]))
    return leaf


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("failing", range(len(CHANGES)))
def test_what_is_told_to_be_durable_is_there(leaf: Path, failing: int) -> None:
    before = leaf.read_bytes()
    failures = 0
    for at in range(CALLS):
        leaf.write_bytes(before)
        failures += run_short(leaf, failing, at)
    assert failures > 5


def run_short(leaf: Path, failing: int, at: int) -> bool:
    """Make all changes, in one of which memory runs out. Returns whether it failed."""
    disk = open_leaf(leaf, writable=True)
    expected = bytearray(NEW[: FLUSHED.stop] + OLD[FLUSHED.stop :])
    perhaps = bytearray(expected)
    failed = False
    for number, (change, start, stop) in enumerate(CHANGES):
        try:
            if number == failing:
                with memory_fails(at):
                    change(disk, start, stop)
            else:
                change(disk, start, stop)
        except (MemoryError, OSError, SystemError, ValueError, TypeError):
            # Python itself has some other words for it.
            failed = True
        else:
            expected[start:stop] = NEW[start:stop] if change is write else bytes(stop - start)
        perhaps[start:stop] = NEW[start:stop] if change is write else bytes(stop - start)
    assert_has(read_all(disk), expected, perhaps)
    try:
        disk.close()
    except OSError:
        assert failed
        expected[FLUSHED.stop :] = OLD[FLUSHED.stop :]
    else:
        assert_has(content(leaf), expected, perhaps)
    return failed


def assert_has(found: bytes, expected: bytearray, perhaps: bytearray) -> None:
    """Every byte is the expected one, or that of a change that failed."""
    for block in range(0, SIZE, 512):
        part = slice(block, block + 512)
        if found[part] != expected[part]:
            assert all(
                byte in pair for byte, *pair in zip(found[part], expected[part], perhaps[part], strict=True)
            ), block
