"""A disk as a VHD on its way out: dynamic, or differencing against the VHD that was made of another content.

The file is footer, header, parent locators, block allocation table, then whole blocks of 2 MiB one after
another, each behind a bitmap of ones, then the footer again. Without a batmap and without gaps, since clients
compute the length in advance from the number of blocks; so the creator must not be one whose images have a
batmap, and must be one whose size QEMU believes. Same disk, same blocks: same bytes, so times are 0.

The trap: a differencing VHD is right only over a parent with the very bytes that the base had. Its id is all
that says so, and ids therefore follow from contents: `vhd_id` of the same content is the same for ever.
"""

import sys
import uuid
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

from gateway.images.disk import Disk, Literal
from gateway.images.layout import Computed, DiskBlocks, Layout
from gateway.images.vhd.check_parent import LOCATOR_PLATFORMS, locator_text
from gateway.images.vhd.format import (
    BLOCK_SIZE,
    FOOTER_SIZE,
    HEADER_SIZE,
    LOCATORS,
    NO_ID,
    SECTOR,
    UNUSED,
    DiskType,
    DynamicHeader,
    Footer,
    ParentLocator,
    check_virtual_size,
    geometry,
    round_up_to_sector,
)

# block/vpc.c goes by the geometry, which is smaller than most disks, unless the creator is one of a few; that
# of Hyper-V and Windows is the one of these whose images have no extensions.
_CREATOR: Final = b"win "
_CREATOR_VERSION: Final = 0x000A0000
_CREATOR_OS: Final = b"Wi2k"
_NAMES: Final = uuid.UUID("5d1f3c1e-8a64-5b0e-9d57-2f0c6f1f7a11")
BLOCK_PREFIX: Final = b"\xff" * (BLOCK_SIZE // SECTOR // 8)
"""The bitmap before each block: all of its sectors are there."""
_BLOCK_SECTORS: Final = (len(BLOCK_PREFIX) + BLOCK_SIZE) // SECTOR
_METADATA_END: Final = FOOTER_SIZE + HEADER_SIZE
_TABLE_PIECE: Final = 64 << 10  # bytes


@dataclass(frozen=True, slots=True)
class VhdParent:
    """What a differencing VHD stands on: the id of its footer, and the file's name (ASCII)."""

    unique_id: uuid.UUID
    name: str


def vhd_id(content_id: str) -> uuid.UUID:
    """Return the id of every VHD that is made of this content, full or differencing."""
    return uuid.uuid5(_NAMES, content_id)


def vhd_layout(
    disk: Disk, blocks: "array[int]", unique_id: uuid.UUID, parent: VhdParent | None = None
) -> Layout:
    """The VHD with these `blocks` of 2 MiB (ascending) of `disk`, all of them whole.

    The size is the disk's, rounded up to 512 bytes. Raises ImageTooLarge over 2040 GiB.
    """
    head, footer = vhd_frame(disk.size, blocks, unique_id, parent)
    return Layout([*head, DiskBlocks(disk, blocks, BLOCK_SIZE, BLOCK_PREFIX), footer])


def vhd_frame(
    disk_size: int, blocks: "array[int]", unique_id: uuid.UUID, parent: VhdParent | None = None
) -> tuple[list[Literal | Computed], Literal]:
    """What comes before the blocks, and what behind; each block stands behind BLOCK_PREFIX.

    Raises as vhd_layout.
    """
    size = round_up_to_sector(disk_size)
    check_virtual_size(size, f"VHD {unique_id}")
    footer = Footer(
        current_size=size,
        disk_type=DiskType.DYNAMIC if parent is None else DiskType.DIFFERENCING,
        unique_id=unique_id,
        timestamp=0,
        data_offset=FOOTER_SIZE,
        original_size=size,
        geometry=geometry(size),
        creator=_CREATOR,
        creator_version=_CREATOR_VERSION,
        creator_os=_CREATOR_OS,
    ).pack()
    # XenServer's own exports keep one sector between header and table, too.
    named = bytes(SECTOR)
    locators: list[ParentLocator] = []
    if parent is not None:
        named = b""
        for platform in LOCATOR_PLATFORMS:
            text = locator_text(platform, parent.name)
            locators.append(ParentLocator(platform, SECTOR, len(text), _METADATA_END + len(named)))
            named += text.ljust(SECTOR, b"\0")
    entries = -(-size // BLOCK_SIZE)
    header = DynamicHeader(
        _METADATA_END + len(named),
        entries,
        parent_id=NO_ID if parent is None else parent.unique_id,
        parent_name=("" if parent is None else parent.name).encode("utf-16-be").ljust(SECTOR, b"\0"),
        locators=(*locators, *[ParentLocator()] * (LOCATORS - len(locators))),
    )
    table = _Table(blocks, entries, header.table_end // SECTOR)
    head: list[Literal | Computed] = [
        Literal(footer + header.pack() + named),
        Computed(header.table_end - header.table_offset, _TABLE_PIECE, table.piece),
    ]
    return head, Literal(footer)


@dataclass(frozen=True, slots=True)
class _Table:
    """The block allocation table, big-endian, of blocks that begin at the sector `first` without gaps."""

    blocks: "array[int]"
    entries: int
    first: int

    def piece(self, number: int) -> bytes:
        """Return its bytes from `number` pieces on, to its end in whole sectors at most."""
        begin = number * _TABLE_PIECE // 4
        end = min(begin + _TABLE_PIECE // 4, self.entries)
        one, other = bisect_left(self.blocks, begin), bisect_left(self.blocks, end)
        places = range(self.first + one * _BLOCK_SECTORS, self.first + other * _BLOCK_SECTORS, _BLOCK_SECTORS)
        if other - one == end - begin:
            table = array("I", places)
        else:
            table = array("I", (UNUSED,)) * (end - begin)
            for block, place in zip(self.blocks[one:other], places, strict=True):
                table[block - begin] = place
        return _big_endian(table).ljust(round_up_to_sector(4 * (end - begin)), b"\0")


def _big_endian(table: "array[int]") -> bytes:
    if sys.byteorder == "little":
        table.byteswap()
    return table.tobytes()
