"""Which blocks chains have: by tables of any block size, by raw files, and in one chain but not another."""

import os
import random
from array import array
from pathlib import Path

import pytest

from gateway.images.allocation import UnrelatedChains, stored_blocks
from gateway.images.chain import open_chain_files
from gateway.images.errors import CorruptImage
from gateway.images.vhd.create import create_dynamic, create_fixed
from tests.images.disks import make_child, open_leaf
from tests.images.exports import MIB, NOISE, blocks_of, random_chain

BLOCK = 2 * MIB


def write(path: Path, *offsets: int) -> None:
    disk = open_leaf(path, writable=True)
    for offset in offsets:
        disk.pwrite(NOISE[:512], offset)
    disk.close()


@pytest.mark.parametrize("block_size", [4096, 64 << 10, MIB, 2 * MIB, 4 * MIB, 16 * MIB])
def test_tables_of_any_block_size(tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 65 * MIB, block_size=block_size)
    places = [0, 3 * MIB, 40 * MIB - 512, 65 * MIB - 512]
    write(path, *places)
    expected = set()
    for place in places:
        start = place // block_size * block_size
        expected |= {
            offset // BLOCK
            for offset in range(start, min(start + block_size, 65 * MIB), min(BLOCK, block_size))
        }
    assert blocks_of(path) == array("I", sorted(expected))


def test_zeroes_that_hide_a_parent_are_stored_and_what_was_never_written_is_not(tmp_path: Path) -> None:
    parent, leaf = tmp_path / "parent.vhd", tmp_path / "leaf.vhd"
    create_dynamic(str(parent), 10 * BLOCK)
    write(parent, BLOCK, 5 * BLOCK)
    make_child(leaf, parent)
    disk = open_leaf(leaf, writable=True)
    disk.zero(0, 3 * BLOCK, trim=True)
    disk.close()
    assert blocks_of(leaf) == array("I", [1, 5])


@pytest.mark.parametrize("kind", ["raw", "fixed"])
def test_of_a_flat_image_a_block_counts_that_is_no_hole_all_over(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.raw" if kind == "raw" else "a.vhd")
    if kind == "raw":
        path.touch()
        os.truncate(path, 9 * BLOCK + 100)
    else:
        create_fixed(str(path), 9 * BLOCK + 512)
    with path.open("r+b") as file:
        for offset in (BLOCK - 4096, BLOCK, 4 * BLOCK + MIB, 9 * BLOCK + 99):
            file.seek(offset)
            file.write(b"x")
    assert blocks_of(path) == array("I", [0, 1, 4, 9])


def test_full_and_empty_tables_of_2040_gib(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 2040 << 30)
    assert not blocks_of(path)
    with path.open("r+b") as file:
        file.seek(1536)
        # The lowest and the highest entry there can be, and two whose first byte is that of an unused one.
        file.write(
            b"\0\0\x30\0" + b"\xff\xff\xff\xff" * 1044476 + b"\xff\0\0\0\xff\xff\xff\xfe\xff\xff\0\xff"
        )
    assert blocks_of(path) == array("I", [0, 1044477, 1044478, 1044479])


def test_a_table_that_was_cut_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 2040 << 30)
    chain = open_chain_files(str(path), writable=False)
    os.truncate(path, 1 << 20)
    with pytest.raises(CorruptImage):
        stored_blocks(chain)
    chain.close()


@pytest.mark.parametrize("seed", range(4))
def test_no_block_is_left_out_that_is_not_zero(tmp_path: Path, seed: int) -> None:
    leaf, *_ = random_chain(tmp_path, seed)
    blocks = set(blocks_of(leaf))
    disk = open_leaf(leaf)
    buffer = bytearray(disk.size)
    disk.pread_into(buffer, 0)
    disk.close()
    for block in range(-(-len(buffer) // BLOCK)):
        assert block in blocks or not any(buffer[block * BLOCK : (block + 1) * BLOCK])


def test_a_difference_is_of_the_files_that_one_chain_has_alone(tmp_path: Path) -> None:
    root, one, other = tmp_path / "root.vhd", tmp_path / "one.vhd", tmp_path / "other.vhd"
    create_dynamic(str(root), 10 * BLOCK)
    write(root, 0, BLOCK, 2 * BLOCK)
    make_child(one, root)
    make_child(other, root)
    write(one, BLOCK, 7 * BLOCK)
    write(other, 2 * BLOCK, 8 * BLOCK)
    assert blocks_of(one, other) == blocks_of(other, one) == array("I", [1, 2, 7, 8])
    assert not blocks_of(one, one)
    assert blocks_of(one, root) == array("I", [1, 7])


def test_chains_without_a_file_in_common_are_unrelated(tmp_path: Path) -> None:
    one, other = tmp_path / "one.vhd", tmp_path / "other.vhd"
    create_dynamic(str(one), BLOCK)
    create_dynamic(str(other), BLOCK)
    with pytest.raises(UnrelatedChains):
        blocks_of(one, other)


def test_what_a_small_file_hides_of_a_parent_of_both_is_different(tmp_path: Path) -> None:
    root, small, large, other = (tmp_path / f"{name}.vhd" for name in ("root", "small", "large", "other"))
    create_dynamic(str(root), 10 * BLOCK)
    write(root, 0, 6 * BLOCK, 8 * BLOCK)
    make_child(small, root, size=7 * BLOCK)
    make_child(large, small, size=10 * BLOCK)
    make_child(other, root)
    assert blocks_of(large) == array("I", [0, 6])
    assert blocks_of(large, other) == blocks_of(other, large) == array("I", [8])
    # Never more than the disk has.
    assert not blocks_of(small, other)


def test_differences_are_enough_to_make_one_disk_of_the_other(tmp_path: Path) -> None:
    choose = random.Random(7)
    root, one, other = tmp_path / "root.vhd", tmp_path / "one.vhd", tmp_path / "other.vhd"
    create_dynamic(str(root), 10 * BLOCK)
    for path in (root, one, other):
        if path != root:
            make_child(path, root)
        write(path, *(choose.randrange(10 * BLOCK // 512) * 512 for _ in range(4)))
    assert set(blocks_of(one)) ^ set(blocks_of(other)) <= set(blocks_of(one, other))
    disks = [open_leaf(path) for path in (one, other)]
    contents = [bytearray(10 * BLOCK), bytearray(10 * BLOCK)]
    for disk, buffer in zip(disks, contents, strict=True):
        disk.pread_into(buffer, 0)
        disk.close()
    for block in blocks_of(one, other):
        contents[1][block * BLOCK : (block + 1) * BLOCK] = contents[0][block * BLOCK : (block + 1) * BLOCK]
    assert contents[0] == contents[1]
