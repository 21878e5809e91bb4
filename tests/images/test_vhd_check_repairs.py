"""Damage, made by hand, that a check finds and a repair mends: foreign readers then see what we do."""

import os
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.images.file_locks import FileInUse, FileUse, lock_file
from gateway.images.files import FileCalls
from gateway.images.vhd.check import ProblemKind, check_vhd, repair_vhd
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import SECTOR, BatmapHeader
from tests.images.damaged import BLOCK, MEBIBYTE, Damage, Vhd, damage_footer, kinds
from tests.images.disks import content, libvhdi_reads, put, qemu_compare


def oracles_agree(path: Path) -> None:
    """A repaired image is whole for qemu and libvhdi too, and both read what our reader reads."""
    assert libvhdi_reads([path]) == content(path)
    raw = path.with_suffix(".expected")
    raw.write_bytes(content(path))
    qemu_compare(path, "vpc", raw, "raw")
    raw.unlink()


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


def cut_less_than_a_sector(vhd: Vhd) -> None:
    footer = vhd.get(-512, 512)
    vhd.truncate(vhd.length - 512 - 100)
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
        (cut_less_than_a_sector, {ProblemKind.BLOCK_CUT}),
        (cut_file, {ProblemKind.BLOCK_CUT, ProblemKind.FOOTER_NOT_AT_END}),
        (claim_full, {ProblemKind.BATMAP_WRONG}),
        (damage_batmap_checksum, {ProblemKind.BATMAP_DAMAGED}),
    ],
)
def test_damage_that_can_be_repaired(dynamic: Vhd, damage: Damage, expected: set[ProblemKind]) -> None:
    before = content(dynamic.path)
    damage(dynamic)
    found = check_vhd(str(dynamic.path))
    assert kinds(found) == expected
    assert found.repairable
    assert found.problems == check_vhd(str(dynamic.path)).problems  # looking changes nothing

    repaired = repair_vhd(str(dynamic.path))
    assert repaired.problems == ()
    assert repaired.repaired
    after = content(dynamic.path)
    intact = len(before) if ProblemKind.BLOCK_CUT not in expected else 2 * BLOCK - 65 * 1024
    assert after[:intact] == before[:intact]
    oracles_agree(dynamic.path)


@pytest.mark.parametrize("lost", [-512, 0, 1000])
def test_the_last_block_is_whole_again_although_the_disk_ends_in_it(tmp_path: Path, lost: int) -> None:
    """A program that was killed may leave a file that ends where the disk does; `lost` bytes are missing."""
    odd = Vhd(tmp_path / "odd.vhd")
    create_dynamic(str(odd.path), BLOCK + MEBIBYTE)
    put(odd.path, (0, b"\x11" * (BLOCK + MEBIBYTE)))
    odd.truncate(odd.length - 512 - MEBIBYTE - lost)
    assert repair_vhd(str(odd.path)).problems == ()
    assert content(odd.path) == b"\x11" * (BLOCK + MEBIBYTE - max(lost, 0)) + bytes(max(lost, 0))
    oracles_agree(odd.path)


def test_a_fixed_disk_with_bytes_behind_its_footer_is_cut_to_it(fixed: Vhd) -> None:
    before = content(fixed.path)
    add_trailing_bytes(fixed)
    assert kinds(check_vhd(str(fixed.path))) == {ProblemKind.FOOTER_NOT_AT_END}
    repaired = repair_vhd(str(fixed.path))
    assert (repaired.problems, len(repaired.repaired)) == ((), 1)
    assert content(fixed.path) == before
    oracles_agree(fixed.path)


def test_two_damages_at_once_are_repaired_together(dynamic: Vhd) -> None:
    before = content(dynamic.path)
    lose_block(dynamic)
    claim_full(dynamic)
    damage_footer(dynamic)
    assert repair_vhd(str(dynamic.path)).problems == ()
    assert content(dynamic.path) == before


def test_trailing_bytes_and_a_damaged_copy_together_are_repaired(dynamic: Vhd) -> None:
    before = content(dynamic.path)
    add_trailing_bytes(dynamic)
    damage_copy(dynamic)
    assert kinds(check_vhd(str(dynamic.path))) == {ProblemKind.FOOTER_NOT_AT_END}
    assert repair_vhd(str(dynamic.path)).problems == ()
    assert content(dynamic.path) == before


def test_a_block_behind_the_only_footer_is_not_cut_off_with_what_lies_there(tmp_path: Path) -> None:
    small = Vhd(tmp_path / "small.vhd")
    create_dynamic(str(small.path), 2 * 4096, block_size=4096)
    put(small.path, (0, b"\x11" * 4096))
    damage_copy(small)
    small.set_entry(1, small.length // SECTOR)
    small.put(small.length, b"\x80".ljust(SECTOR, b"\0") + b"\x33" * 4096)
    assert repair_vhd(str(small.path)).problems == ()
    assert content(small.path) == b"\x11" * 4096 + b"\x33" * SECTOR + bytes(4096 - SECTOR)


def test_nothing_is_written_where_a_block_lies_in_the_metadata(dynamic: Vhd) -> None:
    dynamic.set_entry(2, dynamic.header().table_offset // SECTOR)
    damage_copy(dynamic)
    before = dynamic.path.read_bytes()
    assert repair_vhd(str(dynamic.path)).repaired == ()
    assert dynamic.path.read_bytes() == before


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


def test_a_repair_changes_files_only_through_the_seam(dynamic: Vhd) -> None:
    damage_footer(dynamic)
    written: list[int] = []

    class Watching(FileCalls):
        def pwrite(self, fd: int, data: "bytes | bytearray | memoryview", offset: int) -> None:
            written.append(offset)

    repair_vhd(str(dynamic.path), Watching())
    assert written == [dynamic.length - 512]
    assert kinds(check_vhd(str(dynamic.path))) == {ProblemKind.FOOTER_DAMAGED}
