"""Chains written out in a format, and random chains to be written out."""

import os
import random
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyqcow

from gateway.images.allocation import differing_blocks, stored_blocks
from gateway.images.chain import open_chain_files, open_disk
from gateway.images.disk import Disk, Hole
from gateway.images.layout import Layout
from gateway.images.qcow2.layout import Backing, qcow2_layout
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.layout import VhdParent, vhd_id, vhd_layout
from tests.images.disks import make_child, open_leaf, pattern
from tests.images.test_layout import content_of

if TYPE_CHECKING:
    from array import array

SECTOR = 512
MIB = 1 << 20
NOISE = pattern(1 << 16)


def blocks_of(leaf: Path, base: Path | None = None) -> "array[int]":
    with ExitStack() as files:
        chain = files.enter_context(closing(open_chain_files(str(leaf), writable=False)))
        if base is None:
            return stored_blocks(chain)
        return differing_blocks(
            chain, files.enter_context(closing(open_chain_files(str(base), writable=False)))
        )


def export(leaf: Path, out: Path, *, content_id: str = "", base: Path | None = None) -> Path:
    """Write the image that `out`'s ending asks for; contents are called by the files' names."""
    blocks = blocks_of(leaf, base)
    disk = open_disk(open_chain_files(str(leaf), writable=False))
    try:
        write_layout(layout_of(disk, blocks, out.suffix, content_id or leaf.stem, base), out)
    finally:
        disk.close()
    return out


def layout_of(disk: Disk, blocks: "array[int]", suffix: str, content_id: str, base: Path | None) -> Layout:
    if suffix == ".vhd":
        parent = None if base is None else VhdParent(vhd_id(base.stem), f"{base.stem}.vhd")
        return vhd_layout(disk, blocks, vhd_id(content_id), parent)
    return qcow2_layout(disk, blocks, None if base is None else Backing(f"{base.stem}.qcow2"))


def write_layout(layout: Layout, out: Path) -> None:
    """Holes of the layout become holes of the file."""
    with out.open("wb") as file:
        for segment in layout.segments(0, layout.size):
            if isinstance(segment, Hole):
                file.seek(segment.length, os.SEEK_CUR)
            else:
                file.write(content_of(segment))
        file.truncate(layout.size)


def write_raw(leaf: Path, out: Path) -> Path:
    """The disk as it is, read by its own reader, which other tests hold against foreign ones."""
    disk = open_leaf(leaf)
    buffer = bytearray(disk.size)
    disk.pread_into(buffer, 0)
    disk.close()
    # QEMU counts in sectors.
    out.write_bytes(buffer.ljust(-(-len(buffer) // SECTOR) * SECTOR, b"\0"))
    return out


def random_chain(directory: Path, seed: int, *, odd: bool = True) -> list[Path]:
    """A chain, leaf first, of two to four files with partial bitmaps, and of any size in sectors."""
    choose = random.Random(seed)
    size = choose.randrange(5 * MIB // SECTOR, 14 * MIB // SECTOR) * SECTOR if odd else 12 * MIB
    root = directory / f"root{choose.choice(['.vhd', '.vhd', '.raw'])}"
    if root.suffix == ".raw":
        root.write_bytes(b"")
        os.truncate(root, size - choose.choice([0, 0, 100]))
    elif choose.randrange(4):
        create_dynamic(str(root), size)
    else:
        create_fixed(str(root), size)
    chain = [root]
    for level in range(choose.randrange(1, 4)):
        path = directory / f"level{level}.vhd"
        make_child(path, chain[0], block_size=choose.choice([2 * MIB, 2 * MIB, 64 << 10, 4 * MIB]))
        chain.insert(0, path)
    for path in reversed(chain):
        scribble(path, choose)
    return chain


def scribble(path: Path, choose: random.Random, times: int = 6) -> None:
    """Write and zero at random places of whole bytes of a sector bitmap: libvhdi counts in these."""
    disk = open_leaf(path, writable=True)
    for _ in range(times):
        length = min(choose.randrange(1, 200) * 4096, disk.size)
        offset = choose.randrange(0, disk.size - length + 1) // 4096 * 4096
        if choose.randrange(4):
            at = choose.randrange(256)
            data = (NOISE * (length // len(NOISE) + 2))[at : at + length]
            disk.pwrite(data, offset)
        else:
            disk.zero(offset, length, trim=bool(choose.randrange(2)))
    disk.close()


def libqcow_reads(paths: list[Path]) -> bytes:
    """What libqcow reads from an image and what it stands on, overlay first."""
    files = []
    for path in paths:
        file = pyqcow.file()
        file.open(str(path))
        files.append(file)
    for overlay, backing in pairwise(files):
        overlay.set_parent(backing)
    size = files[0].get_media_size()
    data = b"".join(
        files[0].read_buffer_at_offset(min(MIB, size - offset), offset) for offset in range(0, size, MIB)
    )
    for file in files:
        file.close()
    return data
