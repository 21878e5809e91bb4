import itertools
import os
import struct
import subprocess
import tracemalloc
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pyvhdi

from gateway.images.chain import open_chain_files, open_disk
from gateway.images.file_locks import FileInUse, FileUse, lock_file
from gateway.images.files import FileCalls
from gateway.images.vhd.check import (
    CheckReport,
    ProblemKind,
    check_directory,
    check_vhd,
    repair_vhd,
)
from gateway.images.vhd.create import create_differencing, create_dynamic, create_fixed, set_hidden
from gateway.images.vhd.format import (
    LOCATORS,
    SECTOR,
    UNUSED,
    BatmapHeader,
    DynamicHeader,
    Footer,
    ParentLocator,
    Platform,
    checksum,
)
from gateway.images.vhd.image import VhdFile, open_vhd

MEBIBYTE = 1 << 20
SIZE = 6 * MEBIBYTE  # three blocks
BLOCK = 2 * MEBIBYTE


def kinds(report: CheckReport) -> set[ProblemKind]:
    return {problem.kind for problem in report.problems}


def write(path: Path, offset: int, data: bytes) -> None:
    disk = open_disk(open_chain_files(str(path), writable=True), read_only=False)
    disk.pwrite(data, offset)
    disk.close()


def read(path: Path) -> bytes:
    disk = open_disk(open_chain_files(str(path), writable=False))
    content = bytearray(disk.size)
    disk.pread_into(content, 0)
    disk.close()
    return bytes(content)


class Vhd:
    """A file that is damaged by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def length(self) -> int:
        return self.path.stat().st_size

    def image(self) -> VhdFile:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            image = open_vhd(fd, str(self.path))
            if image.header is not None:
                len(image.bat)
                image.metadata  # noqa: B018 - read while the file is open
            return image
        finally:
            os.close(fd)

    def header(self) -> DynamicHeader:
        header = self.image().header
        assert header is not None
        return header

    def put(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as out:
            out.seek(offset if offset >= 0 else self.length + offset)
            out.write(data)

    def get(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as source:
            source.seek(offset if offset >= 0 else self.length + offset)
            return source.read(length)

    def truncate(self, size: int) -> None:
        os.truncate(self.path, size)

    def set_entry(self, block: int, entry: int) -> None:
        self.put(self.header().table_offset + 4 * block, struct.pack(">I", entry))

    def set_footers(self, **fields: object) -> None:
        footer = replace(self.image().footer, **fields)  # type: ignore[arg-type]
        if self.image().header is not None:
            self.put(0, footer.pack())
        self.put(-512, footer.pack())

    def set_header(self, **fields: object) -> None:
        header = replace(self.header(), **fields)  # type: ignore[arg-type]
        self.put(512, header.pack())


@pytest.fixture
def dynamic(tmp_path: Path) -> Vhd:
    path = tmp_path / "dynamic.vhd"
    create_dynamic(str(path), SIZE)
    write(path, 0, b"\x11" * BLOCK)
    write(path, BLOCK + 4096, b"\x22" * 65536)
    return Vhd(path)


@pytest.fixture
def fixed(tmp_path: Path) -> Vhd:
    path = tmp_path / "fixed.vhd"
    create_fixed(str(path), SIZE)
    write(path, 4096, b"\x33" * 65536)
    return Vhd(path)


@pytest.fixture
def child(tmp_path: Path, dynamic: Vhd) -> Vhd:
    path = tmp_path / "child.vhd"
    create_differencing(str(path), str(dynamic.path), dynamic.image())
    write(path, 2 * BLOCK, b"\x44" * 4096)
    return Vhd(path)


def oracles_agree(path: Path) -> None:
    """A repaired image is whole for qemu and libvhdi too, and both read what our reader reads."""
    content = read(path)
    theirs = pyvhdi.file()
    theirs.open(str(path))
    assert theirs.read_buffer_at_offset(len(content), 0) == content
    theirs.close()
    raw = path.with_suffix(".expected")
    raw.write_bytes(content)
    command = ["qemu-img", "compare", "-f", "vpc", "-F", "raw", str(path), str(raw)]
    compared = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    raw.unlink()
    assert compared.returncode == 0, compared.stdout + compared.stderr


# Healthy images


@pytest.mark.parametrize("options", ["force_size=on", "subformat=fixed,force_size=on", "subformat=dynamic"])
def test_images_made_by_qemu_are_healthy(tmp_path: Path, options: str) -> None:
    path = tmp_path / "qemu.vhd"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vpc", "-o", options, path, "5M"], check=True, timeout=60
    )
    subprocess.run(
        ["qemu-io", "-f", "vpc", "-c", "write -P 7 1M 3M", str(path)],
        check=True,
        timeout=60,
        capture_output=True,
    )
    report = check_vhd(str(path))
    assert report.errors == ()
    assert kinds(report) <= {ProblemKind.BITS_BEYOND_DISK}


def test_our_own_images_are_healthy(tmp_path: Path, dynamic: Vhd, fixed: Vhd, child: Vhd) -> None:
    grandchild = tmp_path / "grandchild.vhd"
    create_differencing(str(grandchild), str(child.path), child.image())
    for path in (dynamic.path, fixed.path, child.path, grandchild):
        assert check_vhd(str(path)).problems == ()


def test_a_child_of_a_raw_image_is_healthy(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    create_differencing(str(tmp_path / "child.vhd"), str(tmp_path / "base.raw"), None)
    assert check_vhd(str(tmp_path / "child.vhd")).problems == ()


def test_blocks_of_any_order_and_a_short_last_block_are_healthy(tmp_path: Path) -> None:
    path = tmp_path / "small.vhd"
    create_dynamic(str(path), 10 * 4096 + 512, block_size=4096)
    for block in (10, 3, 7, 0, 9):
        write(path, block * 4096, b"x" * 512)
    assert check_vhd(str(path)).problems == ()


# Damage: each problem is made by hand, found, and repaired where it can be.

Damage = Callable[[Vhd], None]


def damage_footer(vhd: Vhd) -> None:
    vhd.put(-512 + 48, b"\xff")


def remove_footer(vhd: Vhd) -> None:
    vhd.truncate(vhd.length - 512)


def add_trailing_bytes(vhd: Vhd) -> None:
    vhd.put(vhd.length, b"garbage" * 300)


def damage_copy(vhd: Vhd) -> None:
    vhd.put(0, bytes(512))


def change_id_at_end(vhd: Vhd) -> None:
    vhd.put(-512, replace(vhd.image().footer, unique_id=uuid.uuid4()).pack())


def hide_at_end(vhd: Vhd) -> None:
    vhd.put(-512, vhd.image().footer.with_hidden(True).pack())


def lose_block(vhd: Vhd) -> None:
    vhd.set_entry(2, (vhd.length + 3 * MEBIBYTE) // SECTOR)


def cut_last_block(vhd: Vhd) -> None:
    footer = vhd.get(-512, 512)
    vhd.truncate(vhd.length - 512 - 64 * 1024)
    vhd.put(vhd.length, footer)


def cut_file(vhd: Vhd) -> None:
    vhd.truncate(vhd.length - 512 - 1000)


def claim_full(vhd: Vhd) -> None:
    table_end = vhd.header().table_end
    batmap = BatmapHeader.unpack(vhd.get(table_end, 512), "")
    vhd.put(batmap.map_offset, b"\xe0")
    marks = vhd.get(batmap.map_offset, batmap.map_sectors * SECTOR)
    vhd.put(table_end, replace(batmap, map_checksum=~sum(marks) & 0xFFFFFFFF).pack())


def damage_batmap_checksum(vhd: Vhd) -> None:
    table_end = vhd.header().table_end
    batmap = BatmapHeader.unpack(vhd.get(table_end, 512), "")
    vhd.put(table_end, replace(batmap, map_checksum=1).pack())


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_footer, {ProblemKind.FOOTER_DAMAGED}),
        (remove_footer, {ProblemKind.FOOTER_NOT_AT_END}),
        (add_trailing_bytes, {ProblemKind.FOOTER_NOT_AT_END}),
        (damage_copy, {ProblemKind.FOOTER_COPY_DAMAGED}),
        (change_id_at_end, {ProblemKind.FOOTERS_DIFFER}),
        (hide_at_end, {ProblemKind.FLAGS_DIFFER}),
        (lose_block, {ProblemKind.BLOCK_BEYOND_END}),
        (cut_last_block, {ProblemKind.BLOCK_CUT}),
        (cut_file, {ProblemKind.BLOCK_CUT, ProblemKind.FOOTER_NOT_AT_END}),
        (claim_full, {ProblemKind.BATMAP_WRONG}),
        (damage_batmap_checksum, {ProblemKind.BATMAP_DAMAGED}),
    ],
)
def test_damage_that_can_be_repaired(dynamic: Vhd, damage: Damage, expected: set[ProblemKind]) -> None:
    before = read(dynamic.path)
    damage(dynamic)
    found = check_vhd(str(dynamic.path))
    assert kinds(found) == expected
    assert found.repairable
    assert found.problems == check_vhd(str(dynamic.path)).problems  # looking changes nothing

    repaired = repair_vhd(str(dynamic.path))
    assert repaired.problems == ()
    assert repaired.repaired
    after = read(dynamic.path)
    intact = len(before) if ProblemKind.BLOCK_CUT not in expected else 2 * BLOCK - 65 * 1024
    assert after[:intact] == before[:intact]
    oracles_agree(dynamic.path)


def test_a_fixed_disk_with_bytes_behind_its_footer_is_cut_to_it(fixed: Vhd) -> None:
    before = read(fixed.path)
    add_trailing_bytes(fixed)
    assert kinds(check_vhd(str(fixed.path))) == {ProblemKind.FOOTER_NOT_AT_END}
    repaired = repair_vhd(str(fixed.path))
    assert (repaired.problems, len(repaired.repaired)) == ((), 1)
    assert read(fixed.path) == before
    oracles_agree(fixed.path)


def test_two_damages_at_once_are_repaired_together(dynamic: Vhd) -> None:
    before = read(dynamic.path)
    lose_block(dynamic)
    claim_full(dynamic)
    damage_footer(dynamic)
    assert repair_vhd(str(dynamic.path)).problems == ()
    assert read(dynamic.path) == before


def test_trailing_bytes_and_a_damaged_copy_together_are_repaired(dynamic: Vhd) -> None:
    before = read(dynamic.path)
    add_trailing_bytes(dynamic)
    damage_copy(dynamic)
    assert kinds(check_vhd(str(dynamic.path))) == {ProblemKind.FOOTER_NOT_AT_END}
    assert repair_vhd(str(dynamic.path)).problems == ()
    assert read(dynamic.path) == before


def test_a_healthy_image_is_not_touched_by_a_repair(child: Vhd) -> None:
    before = child.path.read_bytes()
    repaired = repair_vhd(str(child.path))
    assert (repaired.problems, repaired.repaired) == ((), ())
    assert child.path.read_bytes() == before


# Damage that can only be told


def overlap_blocks(vhd: Vhd) -> None:
    vhd.set_entry(2, vhd.image().bat[0] + 8)


def duplicate_block(vhd: Vhd) -> None:
    vhd.set_entry(2, vhd.image().bat[1])


def block_over_header(vhd: Vhd) -> None:
    vhd.set_entry(0, UNUSED)
    vhd.set_entry(1, UNUSED)
    vhd.set_entry(2, 2)


def damage_header(vhd: Vhd) -> None:
    vhd.put(512 + 100, b"\xff")


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
        write(vhd.path, block * 4096, b"x" * 4096 if block < 20 else b"x" * 512)
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
    write(vhd.path, BLOCK, b"x" * 4096)
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


def test_checking_a_full_table_needs_little_memory(tmp_path: Path) -> None:
    vhd = Vhd(tmp_path / "large.vhd")
    blocks = 50_000
    create_dynamic(str(vhd.path), blocks * BLOCK)
    stride = (BLOCK + 512) // SECTOR
    first = (vhd.length + 4096) // SECTOR
    vhd.put(vhd.header().table_offset, b"".join(struct.pack(">I", first + i * stride) for i in range(blocks)))
    footer = vhd.get(-512, 512)
    vhd.put((first + blocks * stride) * SECTOR, footer)
    tracemalloc.start()
    try:
        report = check_vhd(str(vhd.path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.problems == ()
    assert peak < 10 * 4 * blocks + 4 * MEBIBYTE


# Parents


def parent_text(name: str) -> bytes:
    return f".\\{name}".encode("utf-16-le")


def remove_locators(vhd: Vhd) -> None:
    vhd.set_header(locators=(ParentLocator(),) * LOCATORS, parent_name=bytes(512))


def remove_one_locator(vhd: Vhd) -> None:
    locators = list(vhd.header().locators)
    locators[2] = ParentLocator()
    vhd.set_header(locators=tuple(locators))


def absolute_locator(vhd: Vhd) -> None:
    locators = list(vhd.header().locators)
    text = "C:\\images\\dynamic.vhd".encode("utf-16-le")
    vhd.put(locators[1].data_offset, text)
    locators[1] = replace(locators[1], data_length=len(text))
    vhd.set_header(locators=tuple(locators))


def other_name_in_locator(vhd: Vhd) -> None:
    locators = list(vhd.header().locators)
    text = parent_text("somebody.vhd")
    vhd.put(locators[1].data_offset, text.ljust(512, b"\0"))
    locators[1] = replace(locators[1], data_length=len(text))
    vhd.set_header(locators=tuple(locators))


def locator_outside(vhd: Vhd) -> None:
    locators = list(vhd.header().locators)
    locators[1] = replace(locators[1], data_offset=1 << 40)
    vhd.set_header(locators=tuple(locators))


def other_name_in_header(vhd: Vhd) -> None:
    vhd.set_header(parent_name="somebody.vhd".encode("utf-16-be").ljust(512, b"\0"))


def rename_parent(vhd: Vhd) -> None:
    (vhd.path.parent / "dynamic.vhd").rename(vhd.path.parent / "renamed.vhd")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_locators, {ProblemKind.PARENT_UNNAMED}),
        (remove_one_locator, {ProblemKind.LOCATOR_MISSING}),
        (absolute_locator, {ProblemKind.LOCATOR_ABSOLUTE}),
        (other_name_in_locator, {ProblemKind.LOCATOR_WRONG}),
        (locator_outside, {ProblemKind.LOCATOR_OUTSIDE}),
        (other_name_in_header, {ProblemKind.PARENT_NAME_WRONG}),
        (rename_parent, {ProblemKind.PARENT_MISSING}),
    ],
)
def test_locators_are_written_anew_from_the_known_parent(
    child: Vhd, damage: Damage, expected: set[ProblemKind]
) -> None:
    before = read(child.path)
    damage(child)
    found = check_vhd(str(child.path))
    assert kinds(found) == expected
    assert found.repairable
    repaired = repair_vhd(str(child.path))
    assert repaired.problems == ()
    assert read(child.path) == before
    header = child.header()
    parent = "renamed.vhd" if damage is rename_parent else "dynamic.vhd"
    texts = {
        loc.platform: child.get(loc.data_offset, loc.data_length) for loc in header.locators if loc.platform
    }
    assert texts == {
        Platform.MACX: f"file://./{parent}".encode(),
        Platform.W2KU: parent_text(parent),
        Platform.W2RU: parent_text(parent),
    }


def remove_parent(vhd: Vhd) -> None:
    (vhd.path.parent / "dynamic.vhd").unlink()


def replace_parent(vhd: Vhd) -> None:
    remove_parent(vhd)
    create_dynamic(str(vhd.path.parent / "dynamic.vhd"), SIZE)


def damage_parent(vhd: Vhd) -> None:
    damage_header(Vhd(vhd.path.parent / "dynamic.vhd"))


def enlarge_parent(vhd: Vhd) -> None:
    vhd.set_footers(current_size=SIZE - BLOCK)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_parent, ProblemKind.PARENT_MISSING),
        (replace_parent, ProblemKind.PARENT_ID_WRONG),
        (damage_parent, ProblemKind.PARENT_UNREADABLE),
    ],
)
def test_a_lost_parent_is_told(child: Vhd, damage: Damage, expected: ProblemKind) -> None:
    damage(child)
    report = check_vhd(str(child.path))
    assert kinds(report) == {expected}
    assert "dynamic.vhd" in str(report.problems[0])
    assert not report.repairable


def test_a_larger_parent_is_a_warning(tmp_path: Path, dynamic: Vhd) -> None:
    path = tmp_path / "small.vhd"
    create_differencing(str(path), str(dynamic.path), dynamic.image(), virtual_size=BLOCK)
    report = check_vhd(str(path))
    assert (kinds(report), report.errors) == ({ProblemKind.PARENT_LARGER}, ())


def test_a_lost_grandparent_is_told(tmp_path: Path, dynamic: Vhd, child: Vhd) -> None:
    grandchild = tmp_path / "grandchild.vhd"
    create_differencing(str(grandchild), str(child.path), child.image())
    dynamic.path.unlink()
    (problem,) = check_vhd(str(grandchild)).problems
    assert problem.kind is ProblemKind.PARENT_MISSING
    assert "its ancestor child.vhd" in problem.detail


def test_a_loop_of_parents_is_told(tmp_path: Path) -> None:
    ids = [uuid.uuid4(), uuid.uuid4()]
    first, second = Vhd(tmp_path / "first.vhd"), Vhd(tmp_path / "second.vhd")
    create_dynamic(str(second.path), SIZE, unique_id=ids[1])
    create_differencing(str(first.path), str(second.path), second.image(), unique_id=ids[0])
    second.path.unlink()
    create_differencing(str(second.path), str(first.path), first.image(), unique_id=ids[1])
    assert ProblemKind.PARENT_LOOP in kinds(check_vhd(str(first.path)))
    assert len(check_directory(str(tmp_path))) == 3


# Files in use, other files


def test_a_file_that_is_written_to_is_not_checked(dynamic: Vhd) -> None:
    writer = os.open(dynamic.path, os.O_RDWR)
    lock_file(writer, FileUse.WRITE, str(dynamic.path))
    assert kinds(check_vhd(str(dynamic.path))) == {ProblemKind.IN_USE}
    with pytest.raises(FileInUse):
        repair_vhd(str(dynamic.path))
    os.close(writer)
    assert check_vhd(str(dynamic.path)).problems == ()


def test_a_repair_is_refused_while_somebody_reads(dynamic: Vhd) -> None:
    damage_footer(dynamic)
    reader = os.open(dynamic.path, os.O_RDONLY)
    lock_file(reader, FileUse.READ, str(dynamic.path))
    with pytest.raises(FileInUse):
        repair_vhd(str(dynamic.path))
    os.close(reader)


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


# Directories


def name() -> str:
    return f"{uuid.uuid4()}.vhd"


def repository_kinds(path: Path) -> set[ProblemKind]:
    return kinds(check_directory(str(path))[0])


def test_a_healthy_repository_has_no_problems(tmp_path: Path) -> None:
    base, leaf, raw = tmp_path / name(), tmp_path / name(), tmp_path / f"{uuid.uuid4()}.raw"
    create_dynamic(str(base), SIZE)
    create_differencing(str(leaf), str(base), Vhd(base).image())
    set_hidden(str(base), True)
    raw.write_bytes(bytes(4096))
    (tmp_path / f"{uuid.uuid4()}.cbtlog").touch()
    (tmp_path / "filelog.txt").touch()
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".vdi-gateway").mkdir()
    reports = check_directory(str(tmp_path))
    assert [report.problems for report in reports] == [(), (), ()]
    assert [report.path for report in reports] == [str(tmp_path), *sorted(map(str, (base, leaf)))]


def test_orphans_visible_parents_and_copies_are_told(tmp_path: Path) -> None:
    base, leaf = tmp_path / name(), tmp_path / name()
    create_dynamic(str(base), SIZE)
    create_differencing(str(leaf), str(base), Vhd(base).image())
    assert repository_kinds(tmp_path) == {ProblemKind.VISIBLE_PARENT}
    set_hidden(str(base), True)
    set_hidden(str(leaf), True)
    assert repository_kinds(tmp_path) == {ProblemKind.ORPHAN}
    set_hidden(str(leaf), False)
    (tmp_path / name()).write_bytes(leaf.read_bytes())
    assert repository_kinds(tmp_path) == {ProblemKind.SAME_ID}


def test_a_chain_deeper_than_xenserver_makes_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / name()
    create_dynamic(str(path), 4096, block_size=4096)
    for _ in range(30):
        above, path = path, tmp_path / name()
        create_differencing(str(path), str(above), Vhd(above).image(), block_size=4096)
        set_hidden(str(above), True)
    reports = check_directory(str(tmp_path))
    assert [problem.path for problem in reports[0].problems] == [str(path)]
    assert kinds(reports[0]) == {ProblemKind.CHAIN_TOO_DEEP}


# One for all runs: parallel workers must collect the same names of tests.
SOME_ID = "0f4c2d6e-6a51-4f0e-9d0b-5b8c7e1a2f3a"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("backup.raw", ProblemKind.STRANGE_NAME),
        (f"{SOME_ID.upper()}.raw", ProblemKind.STRANGE_NAME),
        ("coalesce", ProblemKind.STRANGE_NAME),
        ("relink_me", ProblemKind.STRANGE_NAME),
        (f"coalesce_{SOME_ID}", ProblemKind.INTERRUPTED),
        (f"OLD_{SOME_ID}.raw", ProblemKind.INTERRUPTED),
        (f"{SOME_ID}.vhd.new", ProblemKind.INTERRUPTED),
    ],
)
def test_names_that_trouble_the_storage_manager_are_told(
    tmp_path: Path, file: str, expected: ProblemKind
) -> None:
    (tmp_path / file).touch()
    assert repository_kinds(tmp_path) == {expected}


def test_a_broken_image_does_not_stop_the_check_of_the_others(tmp_path: Path) -> None:
    good, bad = tmp_path / name(), tmp_path / name()
    create_dynamic(str(good), SIZE)
    bad.write_bytes(b"nothing")
    by_path = {report.path: report for report in check_directory(str(tmp_path))}
    assert by_path[str(good)].problems == ()
    assert kinds(by_path[str(bad)]) == {ProblemKind.NO_FOOTER}


def test_a_repair_changes_files_only_through_the_seam(dynamic: Vhd) -> None:
    damage_footer(dynamic)
    written: list[int] = []

    class Watching(FileCalls):
        def pwrite(self, fd: int, data: "bytes | bytearray | memoryview", offset: int) -> None:
            written.append(offset)

    repair_vhd(str(dynamic.path), Watching())
    assert written == [dynamic.length - 512]
    assert kinds(check_vhd(str(dynamic.path))) == {ProblemKind.FOOTER_DAMAGED}


def test_unused_entries_stay_as_they_are(dynamic: Vhd) -> None:
    assert dynamic.image().bat[2] == UNUSED
    assert Footer.unpack(dynamic.get(0, 512), "") == Footer.unpack(dynamic.get(-512, 512), "")
