"""Images of ours read by qemu and libvhdi, and images of qemu's read by us."""

import json
import subprocess
from pathlib import Path

import pytest

from gateway.images.vhd.create import create_dynamic, create_fixed
from tests.images.disks import libvhdi_reads, make_child, open_leaf, pattern, qemu_compare, read_all

MIB = 1 << 20
DATA = pattern(3 * MIB)
SIZE = 16 * MIB


def fill(path: Path, *, published: bool = True) -> None:
    disk = open_leaf(path, writable=True, published=published)
    disk.pwrite(memoryview(DATA), 5 * MIB + 4096)
    disk.pwrite(DATA[:512], 512)
    disk.pwrite(DATA[:100], SIZE - 100)
    disk.zero(6 * MIB, 4096, trim=True)
    disk.close()


def filled() -> bytes:
    content = bytearray(SIZE)
    content[5 * MIB + 4096 : 8 * MIB + 4096] = DATA
    content[512:1024] = DATA[:512]
    content[SIZE - 100 :] = DATA[:100]
    content[6 * MIB : 6 * MIB + 4096] = bytes(4096)
    return bytes(content)


def qemu(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("published", [True, False])
def test_qemu_and_libvhdi_read_our_dynamic_image(tmp_path: Path, published: bool) -> None:
    image, raw = tmp_path / "a.vhd", tmp_path / "a.img"
    create_dynamic(str(image), SIZE)
    fill(image, published=published)
    raw.write_bytes(filled())
    qemu_compare(image, "vpc", raw, "raw")
    assert libvhdi_reads([image]) == filled()
    disk = open_leaf(image)
    assert read_all(disk) == filled()
    disk.close()


def test_qemu_and_libvhdi_read_our_fixed_image(tmp_path: Path) -> None:
    image, raw = tmp_path / "a.vhd", tmp_path / "a.img"
    create_fixed(str(image), SIZE)
    fill(image)
    raw.write_bytes(filled())
    qemu_compare(image, "vpc", raw, "raw")
    assert libvhdi_reads([image]) == filled()


@pytest.mark.parametrize("size", [2 << 20, (1 << 30) + (2 << 20), 2040 << 30])
def test_qemu_takes_the_size_of_an_empty_image_to_the_byte(tmp_path: Path, size: int) -> None:
    image = tmp_path / "a.vhd"
    create_dynamic(str(image), size)
    assert json.loads(qemu("qemu-img", "info", "--output=json", str(image)))["virtual-size"] == size


def test_libvhdi_reads_a_chain_of_ours(tmp_path: Path) -> None:
    paths = [tmp_path / f"{level}.vhd" for level in range(4)]
    create_dynamic(str(paths[0]), SIZE)
    content = bytearray(SIZE)
    for level, path in enumerate(paths):
        if level:
            make_child(path, paths[level - 1])
        disk = open_leaf(path, writable=True)
        start = level * MIB + 8192
        disk.pwrite(DATA, start)
        content[start : start + len(DATA)] = DATA
        disk.zero(start + 65536, 65536, trim=True)
        content[start + 65536 : start + 131072] = bytes(65536)
        disk.close()
    assert libvhdi_reads(paths[::-1]) == content


@pytest.mark.parametrize(
    "options", ["subformat=dynamic", "subformat=dynamic,force_size=on", "subformat=fixed"]
)
@pytest.mark.parametrize("size", [SIZE, 16 * MIB + 512 * 3])
def test_an_image_of_qemu_reads_as_qemu_reads_it(tmp_path: Path, options: str, size: int) -> None:
    raw, image, back = tmp_path / "a.img", tmp_path / "a.vhd", tmp_path / "b.img"
    raw.write_bytes(filled().ljust(size, b"\x55"))
    qemu("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, str(raw), str(image))
    qemu("qemu-img", "convert", "-f", "vpc", "-O", "raw", str(image), str(back))
    disk = open_leaf(image)
    ours, theirs = read_all(disk), back.read_bytes()
    disk.close()
    if "force_size" in options:
        assert disk.size == size
    assert len(ours) == disk.size
    shorter = min(len(ours), len(theirs))
    assert ours[:shorter] == theirs[:shorter] == raw.read_bytes().ljust(shorter, b"\0")[:shorter]


def test_an_image_of_qemu_can_be_written_to(tmp_path: Path) -> None:
    image, raw = tmp_path / "a.vhd", tmp_path / "a.img"
    qemu("qemu-img", "create", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", str(image), "16M")
    qemu("qemu-io", "-f", "vpc", "-c", "write -P 0x33 1M 3M", str(image))
    content = bytearray(filled())
    content[: 5 * MIB] = bytes(5 * MIB)
    content[MIB : 4 * MIB] = b"\x33" * (3 * MIB)
    content[512:1024] = DATA[:512]
    fill(image)
    raw.write_bytes(content)
    qemu_compare(image, "vpc", raw, "raw")


def test_qemu_can_write_to_an_image_that_we_filled(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    create_dynamic(str(image), SIZE)
    fill(image)
    qemu("qemu-io", "-f", "vpc", "-c", "write -P 0x33 10M 3M", str(image))
    content = bytearray(filled())
    content[10 * MIB : 13 * MIB] = b"\x33" * (3 * MIB)
    disk = open_leaf(image)
    assert read_all(disk) == content
    disk.close()
