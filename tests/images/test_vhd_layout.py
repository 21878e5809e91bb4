"""VHDs on their way out, read by qemu and libvhdi; every figure that clients compute in advance."""

import json
import os
import random
import struct
import subprocess
import uuid
from array import array
from itertools import pairwise
from pathlib import Path

import pytest
import pyvhdi

from gateway.images.disk import Hole, Literal
from gateway.images.errors import ImageTooLarge
from gateway.images.raw import RawDisk
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import DiskType
from gateway.images.vhd.image import open_vhd
from gateway.images.vhd.layout import VhdParent, vhd_id, vhd_layout
from gateway.images.vhd.problems import ProblemKind
from tests.images.disks import inspect, libvhdi_reads, make_child, open_leaf, qemu_compare
from tests.images.exports import (
    MIB,
    NOISE,
    blocks_of,
    export,
    random_chain,
    scribble,
    write_layout,
    write_raw,
)

GIB = 1 << 30
LARGEST = 2040 * GIB


def problems(path: Path) -> set[ProblemKind]:
    return {problem.kind for problem in check_vhd(str(path)).problems}


def sparse_disk(path: Path, size: int) -> RawDisk:
    path.touch()
    os.truncate(path, size)
    return RawDisk(os.open(path, os.O_RDWR), size, read_only=False, path=str(path))


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_becomes_one_dynamic_vhd(tmp_path: Path, seed: int) -> None:
    leaf, *_ = random_chain(tmp_path, seed)
    (tmp_path / "out").mkdir()
    raw = write_raw(leaf, tmp_path / "out" / "disk.img")
    image = export(leaf, tmp_path / "out" / "disk.vhd")
    qemu_compare(image, "vpc", raw, "raw")
    if not raw.stat().st_size % 4096:
        assert libvhdi_reads([image]) == raw.read_bytes()
    assert problems(image) <= {ProblemKind.BITS_BEYOND_DISK}
    assert export(leaf, tmp_path / "out" / "again.vhd").read_bytes() == image.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 300))
def test_many_chains_become_dynamic_vhds(tmp_path: Path, seed: int) -> None:
    test_a_chain_becomes_one_dynamic_vhd(tmp_path, seed)


def generations(directory: Path, root: Path, count: int, *, odd: bool) -> list[Path]:
    """Snapshots of a disk, the last one first, each beside the hidden file that both stand on."""
    choose = random.Random(count)
    create_dynamic(str(root), 9 * MIB + (3584 if odd else 0))
    scribble(root, choose)
    below = root
    snapshots: list[Path] = []
    for number in range(count):
        snapshot, node = directory / f"snapshot{number}.vhd", directory / f"node{number}.vhd"
        make_child(snapshot, below)
        make_child(node, below)
        scribble(node, choose, 2)
        if number % 2:
            scribble(snapshot, choose, 1)
        snapshots.insert(0, snapshot)
        below = node
    return snapshots


@pytest.mark.parametrize("odd", [False, True])
def test_deltas_stand_on_each_other_and_on_a_full_export(tmp_path: Path, odd: bool) -> None:
    sr, out = tmp_path / "sr", tmp_path / "out"
    sr.mkdir()
    out.mkdir()
    snapshots = generations(sr, sr / "root.vhd", 3, odd=odd)
    images = []
    for snapshot, base in pairwise(snapshots):
        images.append(export(snapshot, out / snapshot.name, base=base))
    images.append(export(snapshots[-1], out / snapshots[-1].name))
    for number, snapshot in enumerate(snapshots):
        raw = write_raw(snapshot, out / "disk.img")
        qemu_compare(export(snapshot, tmp_path / "full.vhd"), "vpc", raw, "raw")
        if not odd:
            assert libvhdi_reads(images[number:]) == raw.read_bytes()
        # Our own reader finds the parents by the names in the deltas.
        assert write_raw(images[number], tmp_path / "back.img").read_bytes() == raw.read_bytes()
        assert problems(images[number]) <= {ProblemKind.BITS_BEYOND_DISK}
        assert (
            inspect(images[number]).unique_id
            == inspect(tmp_path / "full.vhd").unique_id
            == vhd_id(snapshot.stem)
        )


def test_a_delta_has_whole_blocks_with_full_bitmaps(tmp_path: Path) -> None:
    """Some readers skip the bitmap of a block and take all of it."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.vhd"
    create_dynamic(str(base), 8 * MIB)
    disk = open_leaf(base, writable=True)
    disk.pwrite(NOISE * (8 * MIB // len(NOISE)), 0)
    disk.close()
    make_child(leaf, base)
    disk = open_leaf(leaf, writable=True)
    disk.pwrite(b"x" * 512, 5 * MIB)
    disk.close()
    other = tmp_path / "other.vhd"
    make_child(other, base)
    image = export(leaf, tmp_path / "delta.vhd", base=other).read_bytes()
    assert blocks_of(leaf, other) == array("I", [2])
    (start,) = struct.unpack_from(">I", image, inspect(tmp_path / "delta.vhd").header.table_offset + 8)  # type: ignore[union-attr]
    block = image[start * 512 : start * 512 + 512 + 2 * MIB]
    assert block[:512] == b"\xff" * 512
    expected = bytearray(NOISE * (2 * MIB // len(NOISE)))
    expected[MIB : MIB + 512] = b"x" * 512
    assert block[512:] == expected


@pytest.mark.parametrize("with_parent", [False, True])
def test_the_length_is_what_clients_compute(tmp_path: Path, with_parent: bool) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", 64 * MIB)
    disk.pwrite(b"data", 10 * MIB)
    parent = VhdParent(uuid.uuid4(), "base.vhd") if with_parent else None
    layout = vhd_layout(disk, array("I", [0, 5, 31]), uuid.uuid4(), parent)
    write_layout(layout, tmp_path / "a.vhd")
    disk.close()
    fd = os.open(tmp_path / "a.vhd", os.O_RDONLY)
    image = open_vhd(fd, "a.vhd")
    assert image.header is not None
    table = image.header.table_offset
    assert table == (3072 if with_parent else 2048)
    assert layout.size == table + 512 + 3 * (512 + 2 * MIB) + 512
    first = (table + 512) // 512
    assert [(block, entry) for block, entry in enumerate(image.bat) if entry != 0xFFFFFFFF] == [
        (0, first),
        (5, first + 4097),
        (31, first + 2 * 4097),
    ]
    assert image.footer.disk_type is (DiskType.DIFFERENCING if with_parent else DiskType.DYNAMIC)
    assert os.pread(fd, 512, 0) == os.pread(fd, 512, layout.size - 512)
    os.close(fd)


@pytest.mark.parametrize("size", [512, 2 * MIB, 2 * MIB + 512, 127 * GIB + 512 * 7, LARGEST])
def test_qemu_and_libvhdi_take_the_size_to_the_byte(tmp_path: Path, size: int) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", size)
    image = tmp_path / "a.vhd"
    write_layout(vhd_layout(disk, array("I"), vhd_id("x")), image)
    disk.close()
    command = ["qemu-img", "info", "--output=json", "-f", "vpc", str(image)]
    told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert told["virtual-size"] == size
    file = pyvhdi.file()
    file.open(str(image))
    assert file.get_media_size() == size
    file.close()
    cylinders, heads, sectors = inspect(image).footer.geometry
    assert cylinders * heads * sectors * 512 <= size
    assert problems(image) == set()


def test_a_disk_of_any_bytes_is_padded_to_sectors(tmp_path: Path) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", 3 * MIB + 100)
    disk.pwrite(b"end", 3 * MIB + 97)
    write_layout(vhd_layout(disk, array("I", [1]), vhd_id("x")), tmp_path / "a.vhd")
    disk.close()
    os.truncate(tmp_path / "disk.raw", 3 * MIB + 512)
    qemu_compare(tmp_path / "a.vhd", "vpc", tmp_path / "disk.raw", "raw")


def test_what_no_vhd_can_hold_is_refused(tmp_path: Path) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", LARGEST + 512)
    with pytest.raises(ImageTooLarge, match="2040 GiB"):
        vhd_layout(disk, array("I"), vhd_id("x"))
    disk.close()


@pytest.mark.parametrize("every", [1, 2, 3, 1000])
def test_at_2_tib_the_table_is_made_in_pieces_and_is_right(tmp_path: Path, every: int) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", LARGEST)
    blocks = array("I", range(0, LARGEST // (2 * MIB), every))
    layout = vhd_layout(disk, blocks, vhd_id("x"))
    table = b""
    for segment in layout.segments(2048, 2048 + 4 * 1044480):
        assert isinstance(segment, Literal)
        assert len(segment.data) <= 64 << 10
        table += segment.data
    entries = array("I", table)
    entries.byteswap()
    first = (2048 + len(table)) // 512
    assert entries[::every] == array("I", range(first, first + 4097 * len(blocks), 4097))
    assert all(
        entries[offset::every].count(0xFFFFFFFF) == len(entries[offset::every])
        for offset in range(1, min(every, 4))
    )
    tail = list(layout.segments(layout.size - 512 - 2 * MIB, layout.size))
    assert tail[0] == Hole(2 * MIB)
    disk.close()


def test_ids_follow_from_contents() -> None:
    assert vhd_id("a") == vhd_id("a") != vhd_id("b")
    assert vhd_id("a").variant == uuid.RFC_4122
