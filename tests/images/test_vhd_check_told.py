"""Damage, made by hand, that a check can only tell, warnings, and files that are no images."""

import itertools
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.images.vhd.check import ProblemKind, check_vhd, repair_vhd
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import SECTOR, UNUSED, BatmapHeader, checksum
from tests.images.damaged import BLOCK, MEBIBYTE, SIZE, Damage, Vhd, damage_header, kinds
from tests.images.disks import put


def overlap_blocks(vhd: Vhd) -> None:
    vhd.set_entry(2, vhd.image().bat[0] + 8)


def duplicate_block(vhd: Vhd) -> None:
    vhd.set_entry(2, vhd.image().bat[1])


def block_over_header(vhd: Vhd) -> None:
    vhd.set_entry(0, UNUSED)
    vhd.set_entry(1, UNUSED)
    vhd.set_entry(2, 2)


def header_of_the_future(vhd: Vhd) -> None:
    vhd.set_header(version=0x00020000)


def table_too_small(vhd: Vhd) -> None:
    vhd.set_header(max_table_entries=1)


def table_outside(vhd: Vhd) -> None:
    vhd.set_header(table_offset=1 << 40)


def odd_block_size(vhd: Vhd) -> None:
    vhd.set_header(block_size=3 * MEBIBYTE)


def table_over_batmap(vhd: Vhd) -> None:
    table_end = vhd.header().table_end
    batmap = BatmapHeader.unpack(vhd.get(table_end, 512), "")
    vhd.put(table_end, replace(batmap, map_offset=table_end + 512, map_sectors=100000).pack())


def destroy_all_footers(vhd: Vhd) -> None:
    vhd.put(0, bytes(512))
    vhd.put(-512, bytes(512))


def unknown_type(vhd: Vhd) -> None:
    for offset in (0, vhd.length - 512):
        footer = bytearray(vhd.get(offset, 512))
        struct.pack_into(">I", footer, 60, 6)
        struct.pack_into(">I", footer, 64, checksum(footer, 64))
        vhd.put(offset, bytes(footer))


def from_the_future(vhd: Vhd) -> None:
    vhd.set_footers(timestamp=0xFFFFFFF0)


def large_geometry(vhd: Vhd) -> None:
    vhd.set_footers(geometry=(1024, 16, 63))


def odd_size(vhd: Vhd) -> None:
    vhd.set_footers(current_size=SIZE - 5)


@pytest.mark.parametrize(
    ("damage", "expected", "words"),
    [
        (overlap_blocks, ProblemKind.BLOCKS_OVERLAP, "block 0 at"),
        (duplicate_block, ProblemKind.BLOCKS_OVERLAP, "block 1 at"),
        (block_over_header, ProblemKind.BLOCK_IN_METADATA, "block 2 at 1024"),
        (damage_header, ProblemKind.HEADER_WRONG, "checksum"),
        (header_of_the_future, ProblemKind.UNSUPPORTED, "version"),
        (table_too_small, ProblemKind.HEADER_WRONG, "1 of 3 blocks"),
        (table_outside, ProblemKind.HEADER_WRONG, "outside the file"),
        (odd_block_size, ProblemKind.UNSUPPORTED, "block size"),
        (table_over_batmap, ProblemKind.BATMAP_DAMAGED, "batmap"),
        (destroy_all_footers, ProblemKind.NO_FOOTER, "neither"),
        (unknown_type, ProblemKind.UNSUPPORTED, "type 6"),
        (from_the_future, ProblemKind.TIMESTAMP_IN_FUTURE, "future"),
        (large_geometry, ProblemKind.GEOMETRY_TOO_LARGE, "1024/16/63"),
        (odd_size, ProblemKind.HEADER_WRONG, "512"),
    ],
)
def test_damage_that_can_only_be_told(
    dynamic: Vhd, damage: Damage, expected: ProblemKind, words: str
) -> None:
    damage(dynamic)
    before = dynamic.path.read_bytes()
    report = check_vhd(str(dynamic.path))
    assert kinds(report) == {expected}
    assert words in str(report.problems[0])
    assert str(dynamic.path) in str(report.problems[0])
    assert not report.repairable
    assert repair_vhd(str(dynamic.path)).problems == report.problems
    assert dynamic.path.read_bytes() == before


def test_a_fixed_disk_that_was_cut_is_told(fixed: Vhd) -> None:
    footer = fixed.get(-512, 512)
    fixed.truncate(fixed.length - 4096)
    fixed.put(-512, footer)
    assert kinds(check_vhd(str(fixed.path))) == {ProblemKind.HEADER_WRONG}


def test_a_fixed_disk_with_room_before_its_footer_is_a_warning(fixed: Vhd) -> None:
    fixed.put(fixed.length, bytes(4096 - 512) + fixed.get(-512, 512))
    report = check_vhd(str(fixed.path))
    assert (kinds(report), report.errors) == ({ProblemKind.LENGTH_WRONG}, ())


def test_an_overlap_is_found_across_slots_and_with_a_short_last_block(tmp_path: Path) -> None:
    vhd = Vhd(tmp_path / "small.vhd")
    create_dynamic(str(vhd.path), 20 * 4096 + 512, block_size=4096)
    for block in range(21):
        put(vhd.path, (block * 4096, b"x" * 4096 if block < 20 else b"x" * 512))
    bat = list(vhd.image().bat)
    for block, other in itertools.permutations((0, 5, 19, 20), 2):
        for shift in (0, 1, 4):
            if bat[other] + shift + 9 > vhd.length // SECTOR - 1:
                continue
            vhd.set_entry(block, bat[other] + shift)
            assert ProblemKind.BLOCKS_OVERLAP in kinds(check_vhd(str(vhd.path))), (block, other, shift)
        vhd.set_entry(block, bat[block])
    assert check_vhd(str(vhd.path)).problems == ()


def test_bits_beyond_the_end_of_the_disk_are_a_warning(tmp_path: Path) -> None:
    vhd = Vhd(tmp_path / "odd.vhd")
    create_dynamic(str(vhd.path), BLOCK + 4096)
    put(vhd.path, (BLOCK, b"x" * 4096))
    vhd.put(vhd.image().bat[1] * SECTOR + 1, b"\x80")
    report = check_vhd(str(vhd.path))
    assert (kinds(report), report.errors) == ({ProblemKind.BITS_BEYOND_DISK}, ())


def test_many_problems_of_a_kind_are_counted_and_not_all_told(tmp_path: Path) -> None:
    vhd = Vhd(tmp_path / "many.vhd")
    create_dynamic(str(vhd.path), 200 * 4096, block_size=4096)
    vhd.put(vhd.header().table_offset, struct.pack(">I", 1 << 24) * 200)
    problems = [p for p in check_vhd(str(vhd.path)).problems if p.kind is ProblemKind.BLOCK_BEYOND_END]
    assert len(problems) == 11
    assert "190 more" in problems[-1].detail


def test_a_fifo_and_a_directory_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.vhd")
    (tmp_path / "directory.vhd").mkdir()
    assert kinds(check_vhd(str(tmp_path / "fifo.vhd"))) == {ProblemKind.NOT_REGULAR}
    assert kinds(check_vhd(str(tmp_path / "directory.vhd"))) == {ProblemKind.NOT_REGULAR}


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 4096])
def test_files_that_are_no_vhd_are_told(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file.vhd"
    path.write_bytes(b"x" * length)
    assert kinds(check_vhd(str(path))) == {ProblemKind.NO_FOOTER}
