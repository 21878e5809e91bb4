"""Images that a check finds nothing wrong with, ours and qemu's, and that a repair leaves alone."""

import struct
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from gateway.images.vhd.check import ProblemKind, check_vhd, repair_vhd
from gateway.images.vhd.create import create_differencing, create_dynamic
from gateway.images.vhd.format import SECTOR, UNUSED, Footer
from tests.images.damaged import BLOCK, MEBIBYTE, SIZE, Vhd, kinds
from tests.images.disks import put


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
        put(path, (block * 4096, b"x" * 512))
    assert check_vhd(str(path)).problems == ()


def test_a_healthy_image_is_not_touched_by_a_repair(child: Vhd) -> None:
    before = child.path.read_bytes()
    repaired = repair_vhd(str(child.path))
    assert (repaired.problems, repaired.repaired) == ((), ())
    assert child.path.read_bytes() == before


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


def test_unused_entries_stay_as_they_are(dynamic: Vhd) -> None:
    assert dynamic.image().bat[2] == UNUSED
    assert Footer.unpack(dynamic.get(0, 512), "") == Footer.unpack(dynamic.get(-512, 512), "")
