"""How long it takes to open a chain of 2040 GiB VHDs whose tables are full, and to read from it once.

The files are sparse: every BAT entry points inside the file, the blocks hold nothing. So the tables are those
of a dense 2 TiB disk without its data. Only `gateway.images` is measured, in this process.
"""

import os
import statistics
import struct
import uuid
from pathlib import Path

from gateway.images.chain import open_chain_files, open_disk
from gateway.images.vhd.create import create_differencing, create_dynamic
from gateway.images.vhd.image import open_vhd
from scripts.benchmarks.harness.measure import GIB, timed

LARGEST = 2040 * GIB
BLOCK = 2 << 20
BLOCK_SECTORS = 1 + BLOCK // 512


def build(directory: Path, depth: int) -> Path:
    """Makes the chain; the path of its leaf."""
    paths = [directory / f"{uuid.uuid4()}.vhd" for _ in range(depth)]
    create_dynamic(str(paths[0]), LARGEST)
    fill(paths[0], every=1)
    for level, path in enumerate(paths[1:], start=1):
        fd = os.open(paths[level - 1], os.O_RDONLY)
        parent = open_vhd(fd, str(paths[level - 1]))
        try:
            create_differencing(str(path), str(paths[level - 1]), parent)
        finally:
            os.close(fd)
        fill(path, every=7 * level)
    return paths[-1]


def fill(path: Path, *, every: int) -> None:
    """Allocates each `every`-th block of the VHD at `path`, in order, after what the file holds already."""
    fd = os.open(path, os.O_RDWR)
    try:
        end = os.fstat(fd).st_size - 512
        footer = os.pread(fd, 512, end)
        header_offset = struct.unpack(">Q", footer[16:24])[0]
        header = os.pread(fd, 1024, header_offset)
        table_offset = struct.unpack(">Q", header[16:24])[0]
        entries = struct.unpack(">I", header[28:32])[0]
        first = end // 512
        used = range(0, entries, every)
        table = [0xFFFFFFFF] * entries
        for position, block in enumerate(used):
            table[block] = first + position * BLOCK_SECTORS
        os.pwrite(fd, struct.pack(f">{entries}I", *table), table_offset)
        os.pwrite(fd, footer, (first + len(used) * BLOCK_SECTORS) * 512)
    finally:
        os.close(fd)


def open_and_read(leaf: Path) -> None:
    """What a lease and a first request do."""
    disk = open_disk(open_chain_files(str(leaf), writable=False))
    try:
        disk.pread_into(memoryview(bytearray(4096)), LARGEST // 2)
    finally:
        disk.close()


def milliseconds(directory: Path, depth: int) -> float:
    leaf = build(directory, depth)
    open_and_read(leaf)
    return statistics.median(timed(lambda: open_and_read(leaf)) for _ in range(11)) * 1000
