"""Making VHD files as blktap makes them, and changing the one flag that it changes later.

A dynamic image is footer copy, header, BAT, batmap, parent locators, footer, all written by one call. The
batmap stays all zeroes, which is always true of it; tapdisk insists on one in images of its own version.
Parents are named relative to the child's directory, by their last component alone, so that an image made
in a staging directory is right after it was renamed. A crash can leave a file cut short under `path`: who
wants none in a repository makes the image elsewhere and renames it.
"""

import os
import uuid
from dataclasses import replace
from typing import Final

from gateway.images.errors import UnsupportedImage
from gateway.images.files import FILES, FileCalls
from gateway.images.vhd.format import (
    BLOCK_SIZE,
    FOOTER_SIZE,
    HEADER_SIZE,
    LOCATORS,
    NO_ID,
    SECTOR,
    BatmapHeader,
    DiskType,
    DynamicHeader,
    Footer,
    ParentLocator,
    Platform,
    check_virtual_size,
    round_up_to_sector,
    vhd_timestamp,
)
from gateway.images.vhd.image import VhdFile, open_vhd

_TABLE_OFFSET: Final = FOOTER_SIZE + HEADER_SIZE


def create_dynamic(
    path: str,
    virtual_size: int,
    *,
    unique_id: uuid.UUID | None = None,
    block_size: int = BLOCK_SIZE,
    files: FileCalls = FILES,
) -> None:
    """Make an empty dynamic image of `virtual_size` bytes (a multiple of 512), durably.

    Raises ImageTooLarge over 2040 GiB, FileExistsError, OSError; leaves no file then.
    """
    _check_size(virtual_size, path)
    footer = Footer.new(virtual_size, DiskType.DYNAMIC, unique_id)
    entries = -(-virtual_size // block_size)
    header = DynamicHeader(_TABLE_OFFSET, entries, block_size)
    _write_new(path, sparse_image(footer, header, []), 0, files)


def create_fixed(
    path: str,
    virtual_size: int,
    *,
    unique_id: uuid.UUID | None = None,
    files: FileCalls = FILES,
) -> None:
    """Make a fixed image of zeroes, all of them a hole, durably. Raises as create_dynamic does."""
    _check_size(virtual_size, path)
    footer = Footer.new(virtual_size, DiskType.FIXED, unique_id)
    _write_new(path, footer.pack(), virtual_size, files)


def create_differencing(
    path: str,
    parent_path: str,
    parent: VhdFile | None,
    *,
    parent_name: str | None = None,
    virtual_size: int | None = None,
    unique_id: uuid.UUID | None = None,
    block_size: int = BLOCK_SIZE,
    files: FileCalls = FILES,
) -> None:
    """Make a child of `parent_path`, which has to be in the child's directory in the end, durably.

    `parent` is the opened VHD, or None for a raw parent. `parent_name` is the name that the parent will have,
    if it has another one now. The size is the parent's unless given. Raises as create_dynamic does, and
    UnsupportedImage for a parent whose name or id no chain would accept.
    """
    status = os.stat(parent_path)
    name = parent_name or os.path.basename(parent_path)
    if not name.endswith(".raw" if parent is None else ".vhd") or name.startswith("."):
        raise UnsupportedImage(parent_path, "a parent's name ends in .vhd, that of a raw one in .raw")
    if parent is not None and parent.unique_id == NO_ID:
        problem = "its id is all zeroes, so nothing can stand on it; copy the disk: the copy has an id"
        raise UnsupportedImage(parent_path, problem)
    if virtual_size is None:
        virtual_size = round_up_to_sector(status.st_size) if parent is None else parent.size
    _check_size(virtual_size, path)
    footer = Footer.new(virtual_size, DiskType.DIFFERENCING, unique_id)
    stored_name = name.encode("utf-16-be")  # a file's name has at most 255 bytes, so it fits
    windows_path = f".\\{name}".encode("utf-16-le")
    locations: list[tuple[Platform | int, bytes]] = [
        (Platform.MACX, f"file://./{name}".encode()),
        (Platform.W2KU, windows_path),
        (Platform.W2RU, windows_path),
    ]
    header = DynamicHeader(
        _TABLE_OFFSET,
        -(-virtual_size // block_size),
        block_size,
        parent_id=NO_ID if parent is None else parent.unique_id,
        parent_timestamp=vhd_timestamp(status.st_mtime),
        parent_name=stored_name.ljust(SECTOR, b"\0"),
    )
    _write_new(path, sparse_image(footer, header, locations), 0, files)


def set_hidden(path: str, hidden: bool, *, files: FileCalls = FILES) -> None:
    """Set or clear the flag by which a repository knows a node that is no VDI of its own, durably.

    The footer that counts is written first, so that a crash leaves the old state or the new one. Raises
    ImageError, OSError.
    """
    fd = files.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        image = open_vhd(fd, path)
        footer = image.footer.with_hidden(hidden).pack()
        if image.footer_offset is not None:
            files.pwrite(fd, footer, image.footer_offset)
            files.datasync(fd)
        if image.header is not None:
            files.pwrite(fd, footer, 0)
            files.datasync(fd)
    finally:
        files.close(fd)


def _check_size(size: int, path: str) -> None:
    if size <= 0 or size % SECTOR:
        raise ValueError(f"a virtual size is a positive multiple of {SECTOR} bytes, not {size}")
    check_virtual_size(size, path)


def sparse_image(
    footer: Footer, header: DynamicHeader, locations: list[tuple[Platform | int, bytes]]
) -> bytes:
    """Return all bytes of an image without blocks; `locations` says where the parent is."""
    table = b"\xff" * (4 * header.max_table_entries)
    map_bytes = max(round_up_to_sector(-(-header.max_table_entries // 8)), SECTOR)
    batmap = BatmapHeader(header.table_end + SECTOR, map_bytes // SECTOR)
    position = batmap.map_offset + map_bytes
    locators: list[ParentLocator] = []
    stored = bytearray()
    for platform, data in locations:
        space = round_up_to_sector(len(data))
        locators.append(ParentLocator(platform, space, len(data), position + len(stored)))
        stored += data.ljust(space, b"\0")
    locators += [ParentLocator()] * (LOCATORS - len(locators))
    header = replace(header, locators=tuple(locators))
    return b"".join(
        (
            footer.pack(),
            header.pack(),
            table.ljust(header.table_end - header.table_offset, b"\0"),
            batmap.pack(),
            bytes(map_bytes),
            stored,
            footer.pack(),
        )
    )


def _write_new(path: str, data: bytes, offset: int, files: FileCalls) -> None:
    fd = files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
    try:
        try:
            files.pwrite(fd, data, offset)
            files.sync(fd)
        finally:
            files.close(fd)
        files.sync_directory(os.path.dirname(path) or ".")
    except BaseException:
        files.unlink(path)
        raise
