"""Trims over a chain: what a block of the leaf hides, what costs nothing, and how much is looked up."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.images.disk import ExtentKind
from gateway.images.errors import UnsupportedImage
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import UNUSED
from gateway.images.vhd.image import VhdFile
from gateway.images.vhd.table import BlockTable
from tests.images.disks import (
    entries,
    libvhdi_reads,
    make_child,
    make_next,
    open_leaf,
    pattern,
    read,
    read_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SECTOR = 512
BLOCK = 2 << 20
LARGEST = 2040 << 30
NOISE = pattern(1 << 15)
BLOCK_SIZES = st.sampled_from([4096, 4096, 8192, 32768])
PLACES = st.tuples(st.integers(0, 1023), st.integers(1, 24))
PARENTS = st.tuples(st.integers(1, 1500), BLOCK_SIZES, st.lists(st.tuples(st.booleans(), PLACES), max_size=6))


def used(path: Path) -> set[int]:
    return {block for block, entry in enumerate(entries(path)) if entry != UNUSED}


def place(size: int, where: int, sectors: int) -> tuple[int, int]:
    offset = size // SECTOR * where // 1024 * SECTOR
    return offset, min(sectors * SECTOR, size - offset)


# What a smaller parent hides of its own one is in the same block as what it shows.
@example(
    root="dynamic",
    odd=0,
    parents=[(64, 32768, [(False, (512, 4))]), (16, 4096, [])],
    leaf_size=64,
    block_size=4096,
    trims=[(512, 1024)],
)
@settings(max_examples=120)
@given(
    root=st.sampled_from(["dynamic", "fixed", "raw"]),
    odd=st.sampled_from([0, 1, 300]),
    parents=st.lists(PARENTS, min_size=1, max_size=3),
    leaf_size=st.integers(1, 1500),
    block_size=BLOCK_SIZES,
    trims=st.lists(st.tuples(st.integers(0, 1024), st.integers(0, 1024)), min_size=1, max_size=3),
)
def test_a_trim_reads_as_zeroes_and_takes_blocks_only_where_a_parent_has_something(
    *,
    root: str,
    odd: int,
    parents: list[tuple[int, int, list[tuple[bool, tuple[int, int]]]]],
    leaf_size: int,
    block_size: int,
    trims: list[tuple[int, int]],
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        paths: list[Path] = []
        for sectors, parent_block_size, changes in parents:
            path = make_next(paths, directory, root, sectors * SECTOR, block_size=parent_block_size, odd=odd)
            disk = open_leaf(path, writable=True)
            size = disk.size
            for is_trim, (where, count) in changes:
                offset, length = place(size, where, count)
                if is_trim:
                    disk.zero(offset, length, trim=True)
                else:
                    disk.pwrite(NOISE[:length], offset)
            disk.close()
        leaf = Path(directory) / "leaf.vhd"
        size = leaf_size * SECTOR
        make_child(leaf, paths[-1], size=size, block_size=block_size)
        disk = open_leaf(leaf)
        expected = bytearray(read_all(disk))
        stored = [extent for extent in disk.extents(0, size) if extent.kind is not ExtentKind.HOLE]
        disk.close()

        disk = open_leaf(leaf, writable=True)
        assert read_all(disk) == expected  # now it knows where all of it lies
        hidden: set[int] = set()
        for ends in trims:
            start, stop = sorted(size // SECTOR * end // 1024 * SECTOR for end in ends)
            disk.zero(start, stop - start, trim=True)
            expected[start:stop] = bytes(stop - start)
            for extent in stored:
                first, last = max(start, extent.offset), min(stop, extent.offset + extent.length)
                if first < last:
                    hidden.update(range(first // block_size, -(-last // block_size)))
        assert read_all(disk) == expected
        disk.close()
        assert used(leaf) == hidden
        disk = open_leaf(leaf)
        assert read_all(disk) == expected
        disk.close()


@pytest.mark.parametrize("parent_kind", ["vhd", "raw"])
def test_trimming_a_disk_of_2_tib_looks_up_what_is_there(
    tmp_path: Path, parent_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, leaf = tmp_path / f"p.{parent_kind}", tmp_path / "l.vhd"
    places = [0, LARGEST // 2 + 3 * BLOCK, LARGEST - BLOCK]
    if parent_kind == "vhd":
        create_dynamic(str(parent), LARGEST)
    else:
        parent.touch()
        os.truncate(parent, LARGEST)
    disk = open_leaf(parent, writable=True)
    for offset in places:
        disk.pwrite(b"p" * 4096, offset)
    disk.close()
    make_child(leaf, parent)
    disk = open_leaf(leaf, writable=True)
    disk.pwrite(b"l" * 4096, LARGEST // 4)
    disk.flush()

    looked_up: list[int] = []

    def counting(of: type, name: str) -> None:
        real: Callable[..., object] = getattr(of, name)

        def count(itself: object, block: int) -> object:
            looked_up.append(block)
            return real(itself, block)

        monkeypatch.setattr(of, name, count)

    counting(VhdFile, "block_offset")
    counting(BlockTable, "next_used")
    disk.zero(0, LARGEST, trim=True)
    assert len(looked_up) < 50
    monkeypatch.undo()
    for offset in (*places, LARGEST // 4):
        assert not any(read(disk, offset, 8192))
    disk.close()
    assert used(leaf) == {offset // BLOCK for offset in (*places, LARGEST // 4)}


def test_the_tables_of_a_long_trim_are_written_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.images.vhd.writer._UNSAVED_BLOCKS", 3)
    parent, leaf = tmp_path / "p.vhd", tmp_path / "l.vhd"
    create_dynamic(str(parent), 10 * 4096, block_size=4096)
    disk = open_leaf(parent, writable=True)
    disk.pwrite(NOISE[:4096] * 10, 0)
    disk.close()
    make_child(leaf, parent, block_size=4096)
    disk = open_leaf(leaf, writable=True)
    disk.zero(0, disk.size, trim=True)
    assert len(used(leaf)) == 9
    disk.close()
    assert not any(libvhdi_reads([leaf, parent]))


def test_a_large_disk_over_a_parent_of_tiny_blocks_is_refused(tmp_path: Path) -> None:
    parent, leaf = tmp_path / "p.vhd", tmp_path / "l.vhd"
    create_dynamic(str(parent), 1 << 30, block_size=4096)
    make_child(leaf, parent, size=LARGEST)
    with pytest.raises(UnsupportedImage, match=r"l\.vhd: .* too many blocks of 4096 bytes"):
        open_leaf(leaf)
