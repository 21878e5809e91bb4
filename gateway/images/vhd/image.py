"""One opened VHD file: its structures, checked, and where its blocks lie.

Opening reads two kilobytes; the BAT is read on first use, whole or in pieces, and its size is held against
the virtual size and the file's length before a byte is allocated for it. A BAT entry is checked when its
block is looked up: one that points into the metadata or beyond the file is CorruptImage then, so that the
rest stays readable. The trap: the footer's copy at the start serves readers only; a file that lost its end
is not written to.
"""

import os
import re
import sys
import urllib.parse
import uuid
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from gateway.images.errors import CorruptImage, ImageError, UnsupportedImage
from gateway.images.files import FileIdentity, identity_of, pread_exactly
from gateway.images.vhd.format import (
    FOOTER_SIZE,
    HEADER_SIZE,
    NO_ID,
    SECTOR,
    TAP_LITTLE_ENDIAN_BITMAPS,
    UNUSED,
    BatmapHeader,
    DiskType,
    DynamicHeader,
    Footer,
    ParentLocator,
    Platform,
    check_virtual_size,
    round_up_to_sector,
)
from gateway.images.vhd.table import BlockTable

MAX_BLOCKS: Final = 1 << 24  # 2040 GiB in blocks of 128 KiB: a BAT of 64 MiB
MAX_DEPTH: Final = 64  # levels; XenServer stops at 30, and a leased chain must fit a limit of open files
_TABLE_PIECE: Final = 64 << 10  # bytes
_LONGEST_NAME: Final = 255  # bytes, of a file
MAX_LOCATOR: Final = 4096  # bytes; no path is longer

# Bitmaps are MSB first, but those of the first tapdisk.
REVERSED_BITS: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_PARENT_NAME: Final = re.compile(r"[^./\\\x00][^/\\\x00]*\.(vhd|raw)", re.DOTALL)


@dataclass(frozen=True)
class VhdFile:
    """A VHD that is open as `fd`. Offsets and sizes are bytes.

    `footer_offset` is None when the footer at the end is damaged and `footer` is the copy; `data_end` is
    where the blocks must have ended.
    """

    fd: int
    path: str
    identity: FileIdentity
    footer: Footer
    header: DynamicHeader | None  # None for a fixed disk
    footer_offset: int | None
    data_end: int

    @property
    def size(self) -> int:
        """Return the virtual size: the footer's current_size, whoever wrote the file."""
        return self.footer.current_size

    @property
    def unique_id(self) -> uuid.UUID:
        """Return the UUID that children name."""
        return self.footer.unique_id

    @cached_property
    def block_size(self) -> int:
        """Return the bytes of one block."""
        return self._header.block_size

    @cached_property
    def sectors_per_block(self) -> int:
        """Return the sectors of one block."""
        return self.block_size // SECTOR

    @cached_property
    def bitmap_bytes(self) -> int:
        """Return how many bytes of the bitmap have a meaning."""
        return self.sectors_per_block // 8

    @cached_property
    def bitmap_size(self) -> int:
        """Return the bytes that a bitmap takes in the file: whole sectors."""
        return round_up_to_sector(self.bitmap_bytes)

    @cached_property
    def blocks(self) -> int:
        """Return how many blocks the virtual size needs; the last one may be used in part."""
        return -(-self.size // self.block_size)

    @cached_property
    def bat(self) -> "array[int]":
        """Return the block allocation table in host order: sector numbers of the bitmaps, or UNUSED."""
        table = array("I", (UNUSED,)) * self.blocks
        view = memoryview(table).cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, (view[done:],), self._header.table_offset + done)
            if count == 0:
                raise CorruptImage(self.path, "the file ends within its block allocation table")
            done += count
        if sys.byteorder == "little":
            table.byteswap()
        return table

    @cached_property
    def table(self) -> BlockTable:
        """Return the same entries for looking up some of them: only those pieces are read."""
        return BlockTable(self.fd, self.path, self._header.table_offset, self.blocks)

    @cached_property
    def batmap(self) -> BatmapHeader | None:
        """Return blktap's batmap header if there is a sane one. Readers don't need the batmap."""
        if not self.footer.made_by_tap or self.footer.creator_version <= TAP_LITTLE_ENDIAN_BITMAPS:
            return None
        offset = self._header.table_end
        try:
            batmap = BatmapHeader.unpack(pread_exactly(self.fd, SECTOR, offset), self.path)
        except CorruptImage:
            return None
        end = batmap.map_offset + batmap.map_sectors * SECTOR
        if batmap.map_offset < offset + SECTOR or end > self.data_end:
            return None
        return batmap

    @cached_property
    def metadata(self) -> tuple[tuple[int, int], ...]:
        """Return the ranges [start, stop) where no block may lie."""
        header = self._header
        ranges = [
            (0, FOOTER_SIZE),
            (self.footer.data_offset, self.footer.data_offset + HEADER_SIZE),
            (header.table_offset, header.table_end),
        ]
        if self.batmap is not None:
            end = self.batmap.map_offset + self.batmap.map_sectors * SECTOR
            ranges.append((header.table_end, end))
        if self.footer.disk_type is DiskType.DIFFERENCING:
            for locator in header.locators:
                end = locator.data_offset + round_up_to_sector(locator.data_length)
                if locator.platform != Platform.NONE and end <= self.data_end:
                    ranges.append((locator.data_offset, end))
        return tuple(ranges)

    def block_offset(self, block: int) -> int | None:
        """Return where a block's bitmap begins in the file, or None for a block that is not there.

        Raises CorruptImage when the BAT points where no block can be.
        """
        entry = self.table[block]
        if entry == UNUSED:
            return None
        start = entry * SECTOR
        stop = start + self.bitmap_size + min(self.block_size, self.size - block * self.block_size)
        if stop > self.data_end:
            raise CorruptImage(self.path, f"block {block} is said to lie beyond the end of the file")
        for first, last in self.metadata:
            if start < last and first < stop:
                raise CorruptImage(self.path, f"block {block} is said to lie in the metadata")
        return start

    def has_blocks(self) -> bool:
        """Return whether any block is allocated, reading no more of the BAT than it takes to know."""
        left = 4 * self.blocks
        offset = self._header.table_offset
        while left:
            piece = pread_exactly(self.fd, min(left, _TABLE_PIECE), offset)
            if not piece:
                raise CorruptImage(self.path, "the file ends within its block allocation table")
            if piece.count(0xFF) != len(piece):
                return True
            left -= len(piece)
            offset += len(piece)
        return False

    def read_bitmap(self, offset: int) -> bytes:
        """Read the bitmap that begins at `offset`, MSB first, without its padding."""
        bitmap = pread_exactly(self.fd, self.bitmap_bytes, offset)
        if len(bitmap) < self.bitmap_bytes:
            raise CorruptImage(self.path, "the file was cut shorter while it was open")
        if self.footer.made_by_tap and self.footer.creator_version == TAP_LITTLE_ENDIAN_BITMAPS:
            return bitmap.translate(REVERSED_BITS)
        return bitmap

    @property
    def _header(self) -> DynamicHeader:
        assert self.header is not None, "a fixed disk has no blocks"
        return self.header


def open_vhd(fd: int, path: str) -> VhdFile:
    """Read and check the structures of the VHD open as `fd`, which stays the caller's. Raises ImageError."""
    file_size = os.fstat(fd).st_size
    footer, footer_offset = _read_footer(fd, file_size, path)
    data_end = file_size if footer_offset is None else footer_offset
    check_virtual_size(footer.current_size, path)
    if footer.disk_type is DiskType.FIXED:
        if footer.current_size > data_end:
            raise CorruptImage(
                path, f"the file holds {data_end} bytes of a fixed disk of {footer.current_size} bytes"
            )
        return VhdFile(fd, path, identity_of(fd), footer, None, footer_offset, data_end)

    if footer.data_offset < FOOTER_SIZE or footer.data_offset + HEADER_SIZE > data_end:
        raise CorruptImage(path, "the dynamic disk header is said to lie outside the file")
    header = DynamicHeader.unpack(pread_exactly(fd, HEADER_SIZE, footer.data_offset), path)
    blocks = -(-footer.current_size // header.block_size)
    if blocks > header.max_table_entries:
        raise CorruptImage(
            path, f"the block allocation table has room for {header.max_table_entries} of {blocks} blocks"
        )
    if blocks > MAX_BLOCKS:
        raise UnsupportedImage(path, f"the disk has {blocks} blocks; at most {MAX_BLOCKS} are supported")
    table_end = header.table_offset + 4 * blocks
    header_end = footer.data_offset + HEADER_SIZE
    if table_end > data_end or header.table_offset < FOOTER_SIZE:
        raise CorruptImage(path, "the block allocation table is said to lie outside the file")
    if header.table_offset < header_end and footer.data_offset < table_end:
        raise CorruptImage(path, "the block allocation table is said to lie in the dynamic disk header")
    return VhdFile(fd, path, identity_of(fd), footer, header, footer_offset, data_end)


def parent_names(image: VhdFile) -> list[str]:
    """Return the names that a differencing image has for its parent, without directories, best first.

    A VHD parent proves itself by its id, so every locator may be tried. A raw parent has no id: all the names
    must then be one. Raises CorruptImage when there is no usable name.
    """
    header = image.header
    assert header is not None
    names: list[str] = []
    for locator in header.locators:
        name = _locator_name(image, locator)
        if name is not None and name not in names:
            names.append(name)
    stored = header.parent_name.decode("utf-16-be", "replace").split("\0", 1)[0]
    name = _plain_name(stored)
    if name is not None and name not in names:
        names.append(name)
    if header.parent_id == NO_ID:
        if len(names) > 1:
            raise CorruptImage(image.path, f"it names different raw parents: {', '.join(names)}")
        names = [name for name in names if name.endswith(".raw")]
    else:
        names = [name for name in names if name.endswith(".vhd")]
    if not names:
        raise CorruptImage(image.path, "it does not name its parent")
    return names


def _read_footer(fd: int, file_size: int, path: str) -> tuple[Footer, int | None]:
    for length in (FOOTER_SIZE, FOOTER_SIZE - 1):
        offset = file_size - length
        if offset < 0:
            break
        try:
            return Footer.unpack(pread_exactly(fd, length, offset), path), offset
        except CorruptImage:
            continue
    try:
        copy = Footer.unpack(pread_exactly(fd, FOOTER_SIZE, 0), path)
    except ImageError:
        raise CorruptImage(path, "neither the footer nor its copy is intact") from None
    if copy.disk_type is DiskType.FIXED:
        raise CorruptImage(path, "the footer of a fixed disk is damaged")
    return copy, None


def _locator_name(image: VhdFile, locator: ParentLocator) -> str | None:
    """Return the last component of a locator's path if it is one that a repository could hold."""
    if (
        not 0 < locator.data_length <= MAX_LOCATOR
        or locator.data_offset + locator.data_length > image.data_end
    ):
        return None
    if locator.platform not in (Platform.MACX, Platform.W2KU, Platform.W2RU):
        return None
    data = pread_exactly(image.fd, locator.data_length, locator.data_offset)
    if locator.platform == Platform.MACX:
        text = urllib.parse.unquote(data.decode("utf-8", "replace"))
    else:
        text = data.decode("utf-16-le", "replace").replace("\\", "/")
    return _plain_name(text.split("\0", 1)[0])


def _plain_name(path: str) -> str | None:
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    if not _PARENT_NAME.fullmatch(name) or "\ufffd" in name or len(name.encode()) > _LONGEST_NAME:
        return None
    return name
