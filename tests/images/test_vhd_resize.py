import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.images.errors import ImageError, ImageTooLarge, UnsupportedImage
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.format import MAX_VIRTUAL_SIZE
from gateway.images.vhd.image import MAX_BLOCKS
from gateway.images.vhd.resize import grow_vhd
from tests.images.damaged import Damage, Vhd
from tests.images.disks import (
    entries,
    inspect,
    libvhdi_reads,
    make_child,
    open_leaf,
    pattern,
    qemu_compare,
    read,
    read_all,
)

MIB = 1 << 20


def fill(path: Path, size: int, places: list[tuple[int, int]]) -> bytearray:
    """Write patterns at (offset, length); what the disk then reads as."""
    expected = bytearray(size)
    disk = open_leaf(path, writable=True)
    for number, (offset, length) in enumerate(places):
        data = pattern(length, number + 1)
        disk.pwrite(data, offset)
        expected[offset : offset + length] = data
    disk.close()
    return expected


def grow(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        grow_vhd(fd, str(path), size)
    finally:
        os.close(fd)


def assert_is(path: Path, expected: bytes, *chain: Path) -> None:
    """Every reader sees these bytes, and nothing is wrong with the file."""
    assert not check_vhd(str(path)).problems
    disk = open_leaf(path)
    try:
        assert disk.size == len(expected)
        assert read_all(disk) == expected
    finally:
        disk.close()
    assert libvhdi_reads([path, *chain]) == expected


@pytest.mark.parametrize(
    ("block_size", "before", "after"),
    [
        pytest.param(2 * MIB, 4 * MIB, 8 * MIB, id="the table has room"),
        pytest.param(2 * MIB, 4 * MIB, 4 * MIB, id="nothing to do"),
        pytest.param(4096, 1 * MIB, 16 * MIB, id="many blocks move"),
        pytest.param(2 * MIB, 3 * MIB + 512, 8 * MIB, id="a last block in part"),
        pytest.param(4096, 4096 * 5 + 1536, 1 * MIB, id="a last small block in part"),
    ],
)
def test_a_dynamic_image_keeps_its_bytes_and_ends_in_zeroes(
    tmp_path: Path, block_size: int, before: int, after: int
) -> None:
    path = tmp_path / "disk.vhd"
    create_dynamic(str(path), before, block_size=block_size)
    known = inspect(path).unique_id
    places = [(0, 4096), (before - 512, 512), (before // 8192 * 4096, 1024)]
    expected = fill(path, before, places)
    grow(path, after)
    assert inspect(path).unique_id == known
    assert_is(path, bytes(expected) + bytes(after - before))
    expected += bytes(after - before)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(expected)
    if block_size == 2 * MIB:
        qemu_compare(path, "vpc", raw, "raw")


def test_what_a_cut_off_last_block_holds_beyond_the_old_end_does_not_come_to_light(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create_dynamic(str(path), 3 * MIB)
    expected = fill(path, 3 * MIB, [(2 * MIB, MIB)])
    image = inspect(path)
    with path.open("r+b") as file:
        # Another program may have set every bit and left anything behind them.
        file.seek(image.header.table_offset if image.header else 0)
        file.read(4)
        place = int.from_bytes(file.read(4), "big") * 512
        file.seek(place)
        file.write(b"\xff" * 512)
        file.seek(place + 512 + MIB)
        file.write(b"\xee" * MIB)
        file.write(image.footer.pack())
    grow(path, 6 * MIB)
    assert_is(path, bytes(expected) + bytes(3 * MIB))
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(expected) + bytes(3 * MIB))
    qemu_compare(path, "vpc", raw, "raw")  # it looks at no bit


def test_what_the_last_block_had_beyond_the_old_end_does_not_hide_the_parent(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    create_dynamic(str(parent), 6 * MIB)
    expected = fill(parent, 6 * MIB, [(2 * MIB, 4 * MIB)])
    make_child(child, parent, size=3 * MIB)
    expected[2 * MIB : 3 * MIB] = fill(child, 3 * MIB, [(2 * MIB, MIB)])[2 * MIB :]
    Vhd(child).put(entries(child)[1] * 512, b"\xff" * 512)
    grow(child, 6 * MIB)
    assert_is(child, bytes(expected), parent)


def test_a_header_that_lies_behind_the_blocks_comes_back_to_its_place(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create_dynamic(str(path), 4 * MIB)
    expected = fill(path, 4 * MIB, [(0, 4096)])
    vhd = Vhd(path)
    place, header = vhd.length - 512, vhd.header()
    footer = replace(vhd.image().footer, data_offset=place).pack()
    vhd.put(0, footer)
    vhd.put(place, header.pack() + footer)
    grow(path, 8 * MIB)
    assert_is(path, bytes(expected) + bytes(4 * MIB))


def test_a_grown_image_can_be_written_to_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create_dynamic(str(path), MIB, block_size=4096)
    expected = fill(path, MIB, [(offset, 4096) for offset in range(0, MIB, 16384)])
    grow(path, 8 * MIB)
    expected += bytes(7 * MIB)
    disk = open_leaf(path, writable=True)
    random.seed(7)
    for number in range(200):
        offset = random.randrange(0, 8 * MIB - 8192, 512)
        data = pattern(8192, number)
        disk.pwrite(data, offset)
        expected[offset : offset + 8192] = data
    disk.close()
    assert_is(path, bytes(expected))


def test_a_very_large_disk_moves_its_first_blocks_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create_dynamic(str(path), 16 * MIB)
    expected = fill(path, 16 * MIB, [(offset, 2 * MIB) for offset in range(0, 16 * MIB, 2 * MIB)])
    grow(path, MAX_VIRTUAL_SIZE)
    assert not check_vhd(str(path)).problems
    disk = open_leaf(path)
    assert disk.size == MAX_VIRTUAL_SIZE
    assert read(disk, 0, 16 * MIB) == expected
    assert read(disk, MAX_VIRTUAL_SIZE - MIB, MIB) == bytes(MIB)
    disk.close()


def test_a_fixed_image_grows_over_its_old_footer(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create_fixed(str(path), 2 * MIB)
    expected = fill(path, 2 * MIB, [(2 * MIB - 4096, 4096)])
    grow(path, 4 * MIB)
    assert_is(path, bytes(expected) + bytes(2 * MIB))


def test_a_child_keeps_its_parent_and_reads_zeroes_beyond_it(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    create_dynamic(str(parent), MIB, block_size=4096)
    expected = fill(parent, MIB, [(0, 65536), (MIB - 4096, 4096)])
    make_child(child, parent, block_size=4096)
    written = fill(child, MIB, [(4096, 8192), (512 << 10, 512)])
    for offset, length in ((4096, 8192), (512 << 10, 512)):
        expected[offset : offset + length] = written[offset : offset + length]
    grow(child, 16 * MIB)
    disk = open_leaf(child)
    assert read_all(disk) == bytes(expected) + bytes(15 * MIB)
    disk.close()
    assert not check_vhd(str(child)).problems
    # libvhdi refuses to read beyond the end of a parent, so it is no witness here.


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create_dynamic(str(path), 4 * MIB)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="smaller"):
        grow(path, 2 * MIB)
    with pytest.raises(ImageTooLarge):
        grow(path, MAX_VIRTUAL_SIZE + 2 * MIB)
    assert path.read_bytes() == before


def end_of_file_lost(vhd: Vhd) -> None:
    vhd.put(-512, bytes(512))


def made_by_the_first_tapdisk(vhd: Vhd) -> None:
    vhd.set_footers(creator=b"tap\0", creator_version=1)


@pytest.mark.parametrize("make", [end_of_file_lost, made_by_the_first_tapdisk])
def test_images_that_cannot_be_written_to_are_refused(tmp_path: Path, make: Damage) -> None:
    path = tmp_path / "disk.vhd"
    create_dynamic(str(path), 4 * MIB)
    make(Vhd(path))
    before = path.read_bytes()
    with pytest.raises(ImageError, match=r"repair it|tapdisk 0\.1"):
        grow(path, 8 * MIB)
    assert path.read_bytes() == before


def test_a_disk_of_tiny_blocks_grows_no_larger_than_it_can_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create_dynamic(str(path), MIB, block_size=4096)
    before = path.read_bytes()
    with pytest.raises(UnsupportedImage, match="too many blocks"):
        grow(path, (MAX_BLOCKS + 1) * 4096)
    assert path.read_bytes() == before
