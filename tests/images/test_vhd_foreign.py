"""Images that others made: the size is the footer's current_size, whatever the geometry says."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.images.errors import UnsupportedImage
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.format import DynamicHeader, Footer, ParentLocator, Platform
from tests.images.disks import inspect, make_child, open_leaf, pattern, read, read_all, read_by_segments

MIB = 1 << 20
ODD_SIZE = 5 * MIB + 3 * 512  # no multiple of any block size, as disk2vhd and Virtual PC make them


def rewrite_footers(path: Path, **changes: object) -> None:
    image = inspect(path)
    footer = replace(image.footer, **changes).pack()  # type: ignore[arg-type]  # any field of the dataclass
    with path.open("r+b") as file:
        if image.header is not None:
            file.write(footer)
        assert image.footer_offset is not None
        file.seek(image.footer_offset)
        file.write(footer)


def rewrite_header(path: Path, header: DynamicHeader) -> None:
    with path.open("r+b") as file:
        file.seek(512)
        file.write(header.pack())


@pytest.mark.parametrize(
    "creator", [b"vpc ", b"vs  ", b"win ", b"d2v ", b"qemu", b"qem2", b"CTXS", b"caml", b"xo  "]
)
def test_the_size_is_current_size_for_every_creator(tmp_path: Path, creator: bytes) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), ODD_SIZE)
    data = pattern(ODD_SIZE)
    disk = open_leaf(path, writable=True)
    disk.pwrite(data, 0)
    disk.close()
    rewrite_footers(path, creator=creator, geometry=(7, 4, 17), creator_version=0x50003, creator_os=b"Wi2k")
    disk = open_leaf(path)
    assert disk.size == ODD_SIZE
    assert read_all(disk) == data
    disk.close()


@pytest.mark.parametrize("block_size", [4096, 512 << 10, 4 << 20, 32 << 20])
def test_other_block_sizes_grow_and_read(tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), ODD_SIZE, block_size=block_size)
    data = pattern(MIB)
    disk = open_leaf(path, writable=True)
    disk.pwrite(data, ODD_SIZE - MIB)
    disk.close()
    disk = open_leaf(path)
    assert read_all(disk) == bytes(ODD_SIZE - MIB) + data
    assert read_by_segments(disk, 0, ODD_SIZE) == bytes(ODD_SIZE - MIB) + data
    disk.close()


def test_a_footer_of_511_bytes_is_found_and_replaced_when_the_image_grows(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 4 * MIB)
    disk = open_leaf(path, writable=True)
    disk.pwrite(b"a" * 512, 0)
    disk.close()
    os.truncate(path, path.stat().st_size - 1)
    assert inspect(path).footer_offset == path.stat().st_size - 511
    disk = open_leaf(path, writable=True)
    assert read(disk, 0, 512) == b"a" * 512
    disk.pwrite(b"b" * 512, 3 * MIB)
    disk.close()
    assert Footer.unpack(path.read_bytes()[-512:], "x").current_size == 4 * MIB
    disk = open_leaf(path)
    assert read(disk, 0, 512) + read(disk, 3 * MIB, 512) == b"a" * 512 + b"b" * 512
    disk.close()


@pytest.mark.parametrize("damage", [b"conectiX", b""])
def test_the_copy_of_the_footer_serves_when_the_end_is_broken(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 4 * MIB)
    disk = open_leaf(path, writable=True)
    disk.pwrite(b"a" * 512, 0)
    disk.close()
    end = path.stat().st_size
    os.truncate(path, end - 512)
    with path.open("ab") as file:
        file.write(damage)
    disk = open_leaf(path)
    assert read(disk, 0, 1024) == b"a" * 512 + bytes(512)
    disk.close()


def test_a_table_with_room_for_growth_is_read_as_far_as_the_disk_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 64 * MIB)
    rewrite_footers(path, current_size=4 * MIB)
    disk = open_leaf(path, writable=True)
    assert disk.size == 4 * MIB
    disk.pwrite(b"a", 4 * MIB - 1)
    disk.close()
    disk = open_leaf(path)
    assert read_all(disk) == bytes(4 * MIB - 1) + b"a"
    disk.close()


def test_bitmaps_of_the_first_tapdisk_are_little_endian_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 4 * MIB)
    disk = open_leaf(path, writable=True)
    disk.pwrite(b"a" * 512, 0)
    disk.pwrite(b"c" * 512, 1024)
    disk.close()
    image = inspect(path)
    first_block = -(-(image.data_end - 2 * MIB) // 512) * 512 - 512
    with path.open("r+b") as file:
        file.seek(first_block)
        file.write(b"\x05")
    rewrite_footers(path, creator_version=1)
    disk = open_leaf(path)
    assert read(disk, 0, 2048) == b"a" * 512 + bytes(512) + b"c" * 512 + bytes(512)
    disk.close()
    with pytest.raises(UnsupportedImage, match=r"tapdisk 0\.1"):
        open_leaf(path, writable=True)


def test_a_parent_named_as_hyper_v_does_is_found_in_the_same_directory(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    create_dynamic(str(base), 4 * MIB)
    disk = open_leaf(base, writable=True)
    disk.pwrite(b"base", 0)
    disk.close()
    make_child(child, base)
    header = inspect(child).header
    assert header is not None
    place = header.locators[1].data_offset
    absolute = "C:\\Virtual Machines\\base.vhd".encode("utf-16-le")
    with child.open("r+b") as file:
        file.seek(place)
        file.write(absolute.ljust(512, b"\0"))
    only = ParentLocator(Platform.W2KU, 1, len(absolute), place)  # the space counted in sectors
    rewrite_header(child, replace(header, parent_name=bytes(512), locators=(only,) + (ParentLocator(),) * 7))
    disk = open_leaf(child)
    assert read(disk, 0, 6) == b"base\0\0"
    disk.close()


def test_a_fixed_image_is_written_without_touching_its_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_fixed(str(path), ODD_SIZE)
    footer = path.read_bytes()[-512:]
    disk = open_leaf(path, writable=True)
    assert disk.size == ODD_SIZE
    disk.pwrite(b"z" * 512, ODD_SIZE - 512)
    disk.zero(0, ODD_SIZE - 256, trim=True)
    disk.close()
    assert path.read_bytes() == bytes(ODD_SIZE - 256) + b"z" * 256 + footer
