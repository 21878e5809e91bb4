"""Making a VHD larger, in a copy of it that nobody else sees: the order of the writes means nothing here.

The block allocation table of a larger disk is longer, and it must stay before the blocks (blktap takes a
block that lies before the end of the metadata for damaged). So all metadata is written anew from the start of
the file, and the blocks that lie where it comes to lie move to the end. The trap: where the old size isn't a
whole number of blocks, the last block may hold anything beyond it, and may be cut short in the file.
"""

import os
import sys
from array import array
from dataclasses import replace
from typing import Final

from gateway.images.errors import CorruptImage, UnsupportedImage
from gateway.images.files import FILES, FileCalls, pread_exactly
from gateway.images.vhd.create import sparse_image
from gateway.images.vhd.format import (
    FOOTER_SIZE,
    HEADER_SIZE,
    SECTOR,
    TAP_LITTLE_ENDIAN_BITMAPS,
    UNUSED,
    DiskType,
    Footer,
    Platform,
    check_virtual_size,
    geometry,
)
from gateway.images.vhd.image import MAX_BLOCKS, MAX_LOCATOR, VhdFile, open_vhd

_ALIGNMENT: Final = 4096  # of a block's data, as blktap has it


def grow_vhd(fd: int, path: str, size: int, *, files: FileCalls = FILES) -> None:
    """Give the VHD open as `fd` the virtual size `size` (bytes, a multiple of 512); what is new reads as
    zeroes, or as the parent where that is larger.

    A crash leaves the file unusable, and nothing is synced. Raises ImageError, OSError; ValueError for a
    size below the present one.
    """
    image = open_vhd(fd, path)
    if size < image.size:
        raise ValueError(f"{path} has {image.size} bytes; it can't be made smaller")
    check_virtual_size(size, path)
    if image.footer_offset is None:
        raise CorruptImage(path, "the footer at its end is damaged; repair it before making it larger")
    # libvhdi takes original_size for the size; nobody else asks for it.
    footer = replace(image.footer, current_size=size, original_size=size, geometry=geometry(size))
    if image.header is None:
        files.truncate(fd, image.size)
        files.truncate(fd, size)
        files.pwrite(fd, footer.pack(), size)
        return
    if footer.made_by_tap and footer.creator_version == TAP_LITTLE_ENDIAN_BITMAPS:
        raise UnsupportedImage(path, "images of tapdisk 0.1 can be read, but not written to")
    if -(-size // image.block_size) > MAX_BLOCKS:
        raise UnsupportedImage(path, f"a disk of {size} bytes has too many blocks of {image.block_size}")
    _grow_sparse(image, replace(footer, data_offset=FOOTER_SIZE), files)


def _grow_sparse(image: VhdFile, footer: Footer, files: FileCalls) -> None:
    assert image.header is not None
    fd, whole = image.fd, image.bitmap_size + image.block_size
    entries = -(-footer.current_size // image.block_size)
    header = replace(
        image.header, table_offset=FOOTER_SIZE + HEADER_SIZE, max_table_entries=max(entries, image.blocks)
    )
    metadata = bytearray(sparse_image(footer, header, _locations(image))[:-FOOTER_SIZE])

    offsets = {
        block: offset for block in range(image.blocks) if (offset := image.block_offset(block)) is not None
    }
    tail = image.size % image.block_size
    end = max([len(metadata), *(offset + whole for offset in offsets.values())])
    for block, offset in list(offsets.items()):
        is_tail = bool(tail) and block == image.blocks - 1
        if offset >= len(metadata) and not is_tail:
            continue
        target = -(-(end + image.bitmap_size) // _ALIGNMENT) * _ALIGNMENT - image.bitmap_size
        length = tail if is_tail else image.block_size
        bitmap = bytearray(image.read_bitmap(offset))
        if is_tail:
            _clear_from(bitmap, tail // SECTOR)
        files.pwrite(fd, bytes(bitmap).ljust(image.bitmap_size, b"\0"), target)
        files.copy_range(fd, offset + image.bitmap_size, fd, target + image.bitmap_size, length)
        offsets[block] = target
        end = target + whole

    table = array("I", (UNUSED,)) * entries
    for block, offset in offsets.items():
        table[block] = offset // SECTOR
    if sys.byteorder == "little":
        table.byteswap()
    metadata[header.table_offset : header.table_offset + 4 * entries] = table.tobytes()
    # What was there before must not show through, neither below the footer nor where blocks have left.
    files.truncate(fd, end)
    first = min([end, *offsets.values()])
    files.punch(fd, len(metadata), first - len(metadata))
    files.pwrite(fd, metadata, 0)
    files.pwrite(fd, footer.pack(), end)


def _locations(image: VhdFile) -> list[tuple[Platform | int, bytes]]:
    """What the parent locators say, in their order."""
    assert image.header is not None
    if image.footer.disk_type is not DiskType.DIFFERENCING:
        return []
    size = os.fstat(image.fd).st_size
    return [
        (locator.platform, pread_exactly(image.fd, locator.data_length, locator.data_offset))
        for locator in image.header.locators
        if locator.platform != Platform.NONE
        and 0 < locator.data_length <= MAX_LOCATOR
        and locator.data_offset + locator.data_length <= size
    ]


def _clear_from(bitmap: bytearray, sector: int) -> None:
    """Clear the bits of all sectors from this one on; the first sector is the highest bit."""
    byte, bit = divmod(sector, 8)
    if bit:
        bitmap[byte] &= 0xFF00 >> bit & 0xFF
        byte += 1
    bitmap[byte:] = bytes(len(bitmap) - byte)
