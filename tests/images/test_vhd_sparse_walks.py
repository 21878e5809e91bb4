"""Extents and segments of thin disks: stretches without blocks are passed over, with the same answers."""

import itertools
import os
import tempfile
from array import array
from contextlib import AbstractContextManager, closing
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.images.disk import Extent, ExtentKind, Hole
from gateway.images.errors import CorruptImage
from gateway.images.vhd import block_map as map_module
from gateway.images.vhd import table as table_module
from gateway.images.vhd.chain import VhdChain
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.image import VhdFile, open_vhd
from tests.images.disks import make_child, make_next, open_leaf, pattern, put, read, read_all

SECTOR = 512
TIB = 1 << 40
LARGEST = 2040 << 30
NOISE = pattern(1 << 15)
WRITES = st.lists(
    st.tuples(st.sampled_from(["write", "write", "trim"]), st.integers(0, 1023), st.integers(1, 24)),
    max_size=5,
)
LEVELS = st.tuples(st.integers(1, 1500), st.sampled_from([4096, 4096, 8192, 32768]), WRITES)


def walk(path: Path, ranges: list[tuple[int, int]], *, writable: bool) -> list[object]:
    disk = open_leaf(path, writable=writable)
    try:
        names = {int(entry.name): _target(entry.path) for entry in os.scandir("/proc/self/fd")}
        answers: list[object] = []
        for offset, length in ranges:
            answers.append(list(disk.extents(offset, length)))
            segments = disk.segments(offset, length)
            answers.append(
                [s if isinstance(s, Hole) else (names[s.fd], s.offset, s.length) for s in segments]
            )
        answers.append(read_all(disk))
        return answers
    finally:
        disk.close()


def _target(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except FileNotFoundError:
        return ""


@settings(max_examples=150)
@given(
    root=st.sampled_from(["dynamic", "fixed", "raw"]),
    levels=st.lists(LEVELS, min_size=2, max_size=4),
    odd=st.sampled_from([0, 0, 1, 300]),
    cuts=st.lists(st.tuples(st.integers(0, 1024), st.integers(0, 1024)), max_size=4),
    opening=st.tuples(st.booleans(), st.sampled_from([4, 14])),
)
def test_passing_over_what_nobody_has_changes_no_answer(
    root: str,
    levels: list[tuple[int, int, list[tuple[str, int, int]]]],
    odd: int,
    cuts: list[tuple[int, int]],
    opening: tuple[bool, int],
) -> None:
    writable, piece = opening
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory, small_pieces(piece):
        paths: list[Path] = []
        for sectors, block_size, writes in levels:
            path = make_next(paths, directory, root, sectors * SECTOR, block_size=block_size, odd=odd)
            disk = open_leaf(path, writable=True)
            size = disk.size
            for what, where, count in writes:
                offset = size // SECTOR * where // 1024 * SECTOR
                length = min(count * SECTOR, size - offset)
                if what == "write":
                    disk.pwrite(NOISE[:length], offset)
                else:
                    disk.zero(offset, length, trim=True)
            disk.close()
        size = levels[-1][0] * SECTOR
        places = [tuple(sorted((size * a // 1024, size * b // 1024))) for a, b in cuts]
        ranges = [(0, size), *((first, last - first) for first, last in places)]
        with mock.patch.object(map_module, "_WORTH_SKIPPING", 1 << 40):
            one_by_one = walk(paths[-1], ranges, writable=writable)
        with mock.patch.object(map_module, "_WORTH_SKIPPING", 0):
            assert walk(paths[-1], ranges, writable=writable) == one_by_one
        assert walk(paths[-1], ranges, writable=writable) == one_by_one


def small_pieces(shift: int) -> AbstractContextManager[object]:
    """Tables are read in pieces of this many bits of a block number, so that small ones have several."""
    entries = 1 << shift
    empty = b"\xff" * (4 * entries)
    return mock.patch.multiple(
        table_module,
        _SHIFT=shift,
        _PIECE=entries,
        _EMPTY_BYTES=empty,
        _EMPTY=array("I", empty),
    )


def look_ups(disk: VhdChain) -> int:
    """How many granules were looked up in the files."""
    return sum(place != 0 for place in disk._map.places)


@pytest.mark.parametrize("writable", [False, True])
def test_an_empty_disk_of_2_tib_is_one_hole_found_by_one_look_up(tmp_path: Path, writable: bool) -> None:
    paths = [tmp_path / f"{level}.vhd" for level in range(3)]
    create_dynamic(str(paths[0]), LARGEST)
    for parent, child in itertools.pairwise(paths):
        make_child(child, parent)
    disk = open_leaf(paths[-1], writable=writable)
    assert isinstance(disk, VhdChain)
    assert list(disk.extents(0, LARGEST)) == [Extent(0, LARGEST, ExtentKind.HOLE)]
    assert list(disk.segments(0, LARGEST)) == [Hole(LARGEST)]
    assert look_ups(disk) == 1
    if writable:
        disk.pwrite(b"x" * SECTOR, TIB)
        assert [extent.kind for extent in disk.extents(0, LARGEST)] == [
            ExtentKind.HOLE,
            ExtentKind.DATA,
            ExtentKind.HOLE,
        ]
        assert look_ups(disk) < 8
    disk.close()


def test_a_large_raw_parent_is_one_stretch(tmp_path: Path) -> None:
    raw, child = tmp_path / "r.raw", tmp_path / "c.vhd"
    raw.touch()
    os.truncate(raw, TIB)
    with raw.open("r+b") as out:
        out.seek(TIB // 2)
        out.write(b"x" * 4096)
    make_child(child, raw)
    disk = open_leaf(child)
    assert isinstance(disk, VhdChain)
    assert [(extent.offset, extent.kind) for extent in disk.extents(0, TIB)] == [
        (0, ExtentKind.HOLE),
        (TIB // 2, ExtentKind.DATA),
        (TIB // 2 + 4096, ExtentKind.HOLE),
    ]
    assert look_ups(disk) == 1
    disk.close()


def test_a_table_that_was_cut_while_the_file_was_open_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 64 << 30)
    make_child(child, parent)
    disk = open_leaf(child)
    os.truncate(parent, 4096)
    with pytest.raises(CorruptImage, match="ends within its block allocation table"):
        list(disk.extents(0, disk.size))
    disk.close()


def test_the_whole_table_and_its_pieces_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 200 * 4096 + SECTOR, block_size=4096)
    disk = open_leaf(path, writable=True)
    for block in (0, 1, 15, 16, 100, 200):
        disk.pwrite(NOISE[:SECTOR], block * 4096)
    disk.close()
    with small_pieces(4), path.open("rb") as file:
        image = open_vhd(file.fileno(), str(path))
        assert [image.table[block] for block in range(image.blocks)] == list(image.bat)
        used = [block for block in range(image.blocks) if image.bat[block] != 0xFFFFFFFF]
        for block in range(image.blocks + 1):
            expected = min((number for number in used if number >= block), default=image.blocks)
            assert image.table.next_used(block) == expected
            assert table_module.next_used(image.bat, block) == expected


@pytest.mark.parametrize("kind", ["vhd", "raw"])
def test_where_the_data_of_a_file_ends_is_looked_for_once(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"disk.{kind}"
    blocks = 16
    if kind == "vhd":
        create_dynamic(str(path), blocks << 15, block_size=1 << 15)
        disk = open_leaf(path, writable=True)
        disk.pwrite(NOISE * blocks, 0)
        disk.close()
    else:
        path.write_bytes(NOISE * blocks)
    asked = []
    seek = os.lseek

    def counting(fd: int, offset: int, whence: int) -> int:
        asked.append(whence)
        return seek(fd, offset, whence)

    disk = open_leaf(path)
    try:
        monkeypatch.setattr(os, "lseek", counting)
        for offset in range(0, blocks << 15, 1 << 15):
            assert list(disk.extents(offset, 1 << 15)) == [Extent(offset, 1 << 15, ExtentKind.DATA)]
        assert asked.count(os.SEEK_HOLE) == 1
    finally:
        disk.close()


def test_a_hole_that_a_writer_makes_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(NOISE * 16)
    disk = open_leaf(path, writable=True)
    try:
        whole = [Extent(0, 1 << 19, ExtentKind.DATA)]
        assert list(disk.extents(0, 1 << 19)) == whole
        disk.zero(1 << 16, 1 << 16, trim=True)
        assert list(disk.extents(1 << 16, 1 << 16)) == [Extent(1 << 16, 1 << 16, ExtentKind.HOLE)]
    finally:
        disk.close()


def test_runs_that_others_have_driven_out_of_memory_come_back_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a disk that was once read as a whole would be slow in most places for as long as it is open."""
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    create_dynamic(str(parent), 8 << 20)
    put(parent, *((block << 21, NOISE) for block in range(4)))
    make_child(child, parent)
    put(child, *((block << 21, NOISE[:4096]) for block in range(4)))
    monkeypatch.setattr(map_module, "_CACHED_RUNS", 1)
    looked_up = []
    read_bitmap = VhdFile.read_bitmap

    def noted(image: VhdFile, offset: int) -> bytes:
        looked_up.append(offset)
        return read_bitmap(image, offset)

    with closing(open_leaf(child)) as disk:
        whole = read_all(disk)
        assert whole == b"".join(NOISE.ljust(2 << 20, b"\0") for _ in range(4))
        monkeypatch.setattr(VhdFile, "read_bitmap", noted)
        assert [read(disk, 0, 8192) for _ in range(3)] == [whole[:8192]] * 3
    assert len(looked_up) == 2  # in the child and in its parent, once
