"""qcow2 images on their way out, checked and read by qemu, and by libqcow as a second reader."""

import json
import os
import struct
import subprocess
from array import array
from itertools import pairwise
from pathlib import Path

import pytest

from gateway.images.disk import Literal
from gateway.images.errors import ImageTooLarge
from gateway.images.qcow2.layout import CLUSTER, Backing, qcow2_layout
from tests.images.disks import qemu_compare
from tests.images.exports import MIB, export, libqcow_reads, random_chain, write_layout, write_raw
from tests.images.test_vhd_layout import GIB, generations, sparse_disk

TIB = 1 << 40


def checked(image: Path) -> None:
    command = ["qemu-img", "check", "-f", "qcow2", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "No errors were found on the image."), done


def info(image: Path) -> dict[str, object]:
    command = ["qemu-img", "info", "--output=json", "-f", "qcow2", str(image)]
    told: dict[str, object] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return told


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_becomes_one_image(tmp_path: Path, seed: int) -> None:
    leaf, *_ = random_chain(tmp_path, seed)
    (tmp_path / "out").mkdir()
    raw = write_raw(leaf, tmp_path / "out" / "disk.img")
    image = export(leaf, tmp_path / "out" / "disk.qcow2")
    checked(image)
    qemu_compare(image, "qcow2", raw, "raw")
    assert libqcow_reads([image]) == raw.read_bytes()
    assert export(leaf, tmp_path / "out" / "again.qcow2").read_bytes() == image.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 300))
def test_many_chains_become_images(tmp_path: Path, seed: int) -> None:
    test_a_chain_becomes_one_image(tmp_path, seed)


@pytest.mark.parametrize("odd", [False, True])
def test_overlays_stand_on_each_other_and_on_a_full_export(tmp_path: Path, odd: bool) -> None:
    sr, out = tmp_path / "sr", tmp_path / "out"
    sr.mkdir()
    out.mkdir()
    snapshots = generations(sr, sr / "root.vhd", 3, odd=odd)
    images = [
        export(snapshot, out / f"{snapshot.stem}.qcow2", base=base) for snapshot, base in pairwise(snapshots)
    ]
    images.append(export(snapshots[-1], out / f"{snapshots[-1].stem}.qcow2"))
    for number, snapshot in enumerate(snapshots):
        raw = write_raw(snapshot, out / "disk.img")
        checked(images[number])
        qemu_compare(images[number], "qcow2", raw, "raw")
        assert libqcow_reads(images[number:]) == raw.read_bytes()
    told = info(images[0])
    assert (told["backing-filename"], told["backing-filename-format"]) == ("snapshot1.qcow2", "qcow2")


@pytest.mark.parametrize("size", [512, 2 * MIB, 512 * MIB, 512 * MIB + 512, 2 * TIB, 2 * TIB + 512])
def test_the_size_is_exact(tmp_path: Path, size: int) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", size)
    write_layout(qcow2_layout(disk, array("I")), tmp_path / "a.qcow2")
    disk.close()
    checked(tmp_path / "a.qcow2")
    assert info(tmp_path / "a.qcow2")["virtual-size"] == size
    # One cluster each of header, refcounts and L1, whatever the size.
    assert (tmp_path / "a.qcow2").stat().st_size == 4 * CLUSTER


def test_blocks_all_over_a_disk_of_2_tib(tmp_path: Path) -> None:
    size = 2 * TIB + 3 * CLUSTER + 512
    disk = sparse_disk(tmp_path / "disk.raw", size)
    places = [0, 255 * 2 * MIB, 256 * 2 * MIB, TIB, TIB + 511 * MIB, size - 512]
    for number, place in enumerate(places):
        disk.pwrite(bytes([number + 1]) * 512, place)
    layout = qcow2_layout(disk, array("I", [place // (2 * MIB) for place in places]))
    write_layout(layout, tmp_path / "a.qcow2")
    disk.close()
    checked(tmp_path / "a.qcow2")
    qemu_compare(tmp_path / "a.qcow2", "qcow2", tmp_path / "disk.raw", "raw")


def test_all_tables_come_before_the_data_in_the_order_in_which_xapi_reads_them(tmp_path: Path) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", 3 * GIB)
    layout = qcow2_layout(disk, array("I", [0, 1, 300, 1535]))
    write_layout(layout, tmp_path / "a.qcow2")
    disk.close()
    image = (tmp_path / "a.qcow2").read_bytes()
    l1_entries, l1 = struct.unpack_from(">IQ", image, 36)
    (table,) = struct.unpack_from(">Q", image, 48)
    (refcounts,) = struct.unpack_from(">Q", image, table)
    l2 = [entry & ~(1 << 63) for entry in struct.unpack_from(f">{l1_entries}Q", image, l1) if entry]
    data = [
        entry & ~(1 << 63) for place in l2 for entry in struct.unpack_from(">8192Q", image, place) if entry
    ]
    order = [0, table, refcounts, l1, *l2, *data]
    assert order == list(range(0, len(image), CLUSTER))
    assert len(data) == 4 * 32


@pytest.mark.parametrize("blocks", [32768 // 32 - 1, 32768 // 32, 40 * 1024])
def test_as_many_refcounts_as_clusters(tmp_path: Path, blocks: int) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", blocks * 2 * MIB)
    write_layout(qcow2_layout(disk, array("I", range(blocks))), tmp_path / "a.qcow2")
    disk.close()
    checked(tmp_path / "a.qcow2")


def test_a_dense_disk_of_2_tib_is_described_without_its_tables_in_memory(tmp_path: Path) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", 2 * TIB)
    layout = qcow2_layout(disk, array("I", range(1 << 20)))
    first = next(layout.segments(0, layout.size))
    assert isinstance(first, Literal)
    assert len(first.data) == CLUSTER
    tables = layout.size - 2 * TIB
    assert 4096 * CLUSTER < tables < 4096 * CLUSTER * 1.3
    (last,) = layout.segments(tables - 8, tables)
    assert isinstance(last, Literal)
    assert struct.unpack(">Q", last.data) == ((layout.size - CLUSTER) | 1 << 63,)
    disk.close()


def test_what_qemu_would_not_open_is_refused(tmp_path: Path) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", 4096)
    disk.size = (1 << 51) + 512
    with pytest.raises(ImageTooLarge, match="QEMU opens disks of up to"):
        qcow2_layout(disk, array("I"))
    disk.close()


def test_a_name_that_no_header_holds_is_refused(tmp_path: Path) -> None:
    disk = sparse_disk(tmp_path / "disk.raw", 4096)
    with pytest.raises(ValueError, match="1023"):
        qcow2_layout(disk, array("I"), Backing("n" * 1024))
    disk.close()
    os.unlink(tmp_path / "disk.raw")
