"""What two disks can differ in, against their bytes."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.images.chain import OpenNode, open_chain_files
from gateway.images.changes import Changes
from gateway.images.errors import ImageError
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.resize import grow_vhd
from tests.images.disks import content, inspect, make_child, put

MIB = 1 << 20
GRAIN = 1 << 16


@contextmanager
def nodes(path: Path) -> Iterator[list[OpenNode]]:
    chain = open_chain_files(str(path), writable=False)
    try:
        yield chain.nodes
    finally:
        chain.close()


def virtual_size(path: Path) -> int:
    return path.stat().st_size if path.suffix == ".raw" else inspect(path).size


def marked(bits: bytes) -> set[int]:
    return {block for block in range(8 * len(bits)) if bits[block >> 3] & 0x80 >> (block & 7)}


def differing(one: bytes, other: bytes) -> set[int]:
    length = max(len(one), len(other))
    one, other = one.ljust(length, b"\0"), other.ljust(length, b"\0")
    return {
        start // GRAIN
        for start in range(0, length, GRAIN)
        if one[start : start + GRAIN] != other[start : start + GRAIN]
    }


def difference(one: Path, other: Path, exact: int = 1000) -> set[int]:
    with nodes(one) as first, nodes(other) as second:
        changes = Changes(max(virtual_size(one), virtual_size(other)), exact)
        changes.add_difference(first, second)
    return marked(bytes(changes.bits))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "00000001-0000-4000-8000-000000000000.vhd"
    create_dynamic(str(path), 8 * MIB)
    put(path, (0, b"\x11" * 3 * MIB))
    return path


def child(base: Path, number: int, block_size: int = 2 * MIB) -> Path:
    path = base.with_name(f"{number:08d}-0000-4000-8000-000000000000.vhd")
    make_child(path, base, block_size=block_size)
    return path


def test_two_children_differ_where_one_of_them_was_written_to(base: Path) -> None:
    one, other = child(base, 2), child(base, 3)
    put(one, (GRAIN, b"a" * 512), (5 * MIB, b"b" * GRAIN))
    put(other, (3 * GRAIN - 512, b"c" * 1024))
    assert difference(one, other) == {1, 80, 2, 3}
    assert difference(one, base) == {1, 80}
    assert difference(one, one) == set()


def test_whole_blocks_are_told_when_there_are_too_many_to_look_at(base: Path) -> None:
    one, other = child(base, 2), child(base, 3)
    put(one, (GRAIN, b"a" * 512), (5 * MIB, b"b" * 512))
    assert difference(one, other, exact=1) == {*range(32), *range(64, 96)}
    assert difference(one, other, exact=2) == {1, 80}


@pytest.mark.parametrize("block_size", [1 << 15, 1 << 16, 1 << 17, 4 << 20])
def test_blocks_of_another_size_count_as_well(base: Path, block_size: int) -> None:
    one, other = child(base, 2, block_size), child(base, 3)
    put(one, (GRAIN + 512, b"a" * 512), (5 * MIB - 512, b"b" * 1024))
    assert difference(one, other) == {1, 79, 80}
    assert difference(one, other, exact=0) >= {1, 79, 80}


def test_disks_that_share_no_file_differ_where_either_has_something(base: Path, tmp_path: Path) -> None:
    flat = tmp_path / "00000009-0000-4000-8000-000000000000.raw"
    flat.write_bytes(b"\0" * 4 * MIB)
    assert difference(base, flat) == set(range(64))
    fixed = tmp_path / "00000008-0000-4000-8000-000000000000.vhd"
    create_fixed(str(fixed), 6 * MIB)
    assert difference(base, fixed) == set(range(96))


def test_nothing_beyond_the_disk_has_changed() -> None:
    changes = Changes(5 * MIB)
    changes.mark(MIB, 100 * MIB)
    assert changes.bits == b"\0\0" + b"\xff" * 8 + b"\0\0"


def test_what_a_smaller_node_hides_has_changed(base: Path) -> None:
    put(base, (6 * MIB, b"\x22" * GRAIN))
    small = base.with_name("00000002-0000-4000-8000-000000000000.vhd")
    make_child(small, base, size=4 * MIB)
    large = child(small, 3)
    fd = os.open(large, os.O_RDWR)
    grow_vhd(fd, str(large), 8 * MIB)
    os.close(fd)
    plain = child(base, 4)
    found = difference(plain, large)
    assert found >= differing(content(plain), content(large))
    assert 96 in found


def test_no_bit_is_missing_in_random_trees(tmp_path: Path) -> None:
    rng = random.Random(20)
    for round_ in range(3):
        (tmp_path / str(round_)).mkdir()
        root = tmp_path / str(round_) / "00000001-0000-4000-8000-000000000000.vhd"
        create_dynamic(str(root), 6 * MIB)
        images, written = [root], {root: set[int]()}
        for number in range(2, 9):
            parent = rng.choice(images)
            image = child(parent, number, rng.choice((1 << 17, 2 << 20)))
            pieces = [
                (512 * rng.randrange(6 * MIB // 512 - 300), rng.randbytes(512 * rng.randrange(1, 300)))
                for _ in range(rng.randrange(4))
            ]
            put(image, *pieces)
            touched = {
                block
                for offset, data in pieces
                for block in range(offset // GRAIN, (offset + len(data) - 1) // GRAIN + 1)
            }
            written[image] = touched
            images.append(image)
        bytes_of = {image: content(image) for image in images}
        for one in images[1:]:
            for other in images[1:]:
                with nodes(one) as first, nodes(other) as second:
                    ids = {node.identity for node in first} ^ {node.identity for node in second}
                    apart = {Path(node.path) for node in (*first, *second) if node.identity in ids}
                exact = difference(one, other)
                assert exact >= differing(bytes_of[one], bytes_of[other])
                assert exact == set().union(*(written[image] for image in apart))
                assert difference(one, other, exact=0) >= exact


def test_a_table_that_leads_nowhere_is_a_known_error(base: Path) -> None:
    one = child(base, 2)
    put(one, (0, b"a" * 512))
    data = bytearray(one.read_bytes())
    offset = 1536
    data[offset : offset + 4] = b"\x7f\xff\xff\xff"
    one.write_bytes(data)
    with pytest.raises(ImageError):
        difference(one, base)
