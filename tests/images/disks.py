"""Chains for tests, and what programs that are not ours read from them."""

import itertools
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pyvhdi

from gateway.images.chain import open_chain_files, open_disk
from gateway.images.disk import Disk, ExtentKind, FileRange
from gateway.images.files import FILES, FileCalls
from gateway.images.vhd.create import create_differencing, create_dynamic, create_fixed
from gateway.images.vhd.image import VhdFile, open_vhd


def open_leaf(
    path: Path, *, writable: bool = False, files: FileCalls = FILES, published: bool = True
) -> Disk:
    chain = open_chain_files(str(path), writable=writable)
    try:
        return open_disk(chain, read_only=not writable, files=files, published=published)
    except BaseException:
        chain.close()
        raise


def make_child(path: Path, parent: Path, *, size: int | None = None, block_size: int = 2 << 20) -> None:
    if parent.suffix == ".raw":
        create_differencing(str(path), str(parent), None, virtual_size=size, block_size=block_size)
        return
    fd = os.open(parent, os.O_RDONLY)
    try:
        image = open_vhd(fd, str(parent))
        create_differencing(str(path), str(parent), image, virtual_size=size, block_size=block_size)
    finally:
        os.close(fd)


def make_next(
    paths: list[Path], directory: str, root: str, size: int, *, block_size: int = 2 << 20, odd: int = 0
) -> Path:
    """Add one to the images of a chain: a child, or first a root, which is "raw" (and `odd` bytes longer),
    "fixed" or "dynamic".
    """
    path = Path(directory) / f"{len(paths)}.{'raw' if root == 'raw' and not paths else 'vhd'}"
    if paths:
        make_child(path, paths[-1], size=size, block_size=block_size)
    elif root == "dynamic":
        create_dynamic(str(path), size, block_size=block_size)
    elif root == "fixed":
        create_fixed(str(path), size)
    else:
        path.touch()
        os.truncate(path, size + odd)
    paths.append(path)
    return path


def inspect(path: Path) -> VhdFile:
    """The structures of an image; its descriptor is closed, so only what was read at opening is there."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return open_vhd(fd, str(path))
    finally:
        os.close(fd)


def entries(path: Path) -> list[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(open_vhd(fd, str(path)).bat)
    finally:
        os.close(fd)


def read_all(disk: Disk) -> bytes:
    return read(disk, 0, disk.size)


def read(disk: Disk, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xa5" * length)
    disk.pread_into(buffer, offset)
    return bytes(buffer)


def content(path: Path) -> bytes:
    """All bytes of the disk whose leaf this is."""
    disk = open_leaf(path)
    try:
        return read_all(disk)
    finally:
        disk.close()


def put(path: Path, *writes: tuple[int, bytes]) -> None:
    """Write at these offsets of the disk whose leaf this is."""
    disk = open_leaf(path, writable=True)
    for offset, data in writes:
        disk.pwrite(data, offset)
    disk.close()


def read_by_segments(disk: Disk, offset: int, length: int) -> bytes:
    parts = []
    for segment in disk.segments(offset, length):
        if isinstance(segment, FileRange):
            part = os.pread(segment.fd, segment.length, segment.offset)
            assert len(part) == segment.length
            parts.append(part)
        else:
            parts.append(bytes(segment.length))
    return b"".join(parts)


def assert_extents_true(disk: Disk, expected: bytes) -> None:
    """Extents cover the disk without gaps, neighbours differ, and what is not data reads as zeroes."""
    position = 0
    last = None
    for extent in disk.extents(0, disk.size):
        assert extent.offset == position
        assert extent.length > 0
        assert extent.kind is not last
        last = extent.kind
        position += extent.length
        if extent.kind is not ExtentKind.DATA:
            assert not any(expected[extent.offset : position])
    assert position == disk.size


def libvhdi_reads(paths: Sequence[Path]) -> bytes:
    """What libvhdi reads from a chain of VHDs, leaf first."""
    files = []
    for path in paths:
        file = pyvhdi.file()
        file.open(str(path))
        files.append(file)
    for child, parent in itertools.pairwise(files):
        child.set_parent(parent)
    size = files[0].get_media_size()
    # In pieces: a longer read across small blocks takes runs of clear bits for too long.
    data = b"".join(
        files[0].read_buffer_at_offset(min(4096, size - offset), offset) for offset in range(0, size, 4096)
    )
    for file in files:
        file.close()
    return data


def qemu_compare(one: Path, one_format: str, other: Path, other_format: str) -> None:
    """qemu reads fixed and dynamic VHDs; differencing ones it reads wrongly without saying so."""
    command = ["qemu-img", "compare", "-f", one_format, "-F", other_format, str(one), str(other)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that are never zero and differ by place."""
    period = 51 * 256
    piece = bytes((seed * 31 + index * 7 + (index >> 8) * 13) % 255 + 1 for index in range(period))
    return (piece * (length // period + 1))[:length]


def noise(length: int, seed: int = 1) -> bytes:
    """Random bytes, the same for a seed."""
    return random.Random(seed).randbytes(length)
