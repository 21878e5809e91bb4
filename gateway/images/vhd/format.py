"""The structures of a VHD file as bytes: footer, dynamic header, parent locators, batmap header.

Sources: Microsoft's "Virtual Hard Disk Image Format Specification" 1.0 and blktap's vhd.h and libvhd.c, which
add the hidden flag and the batmap. All numbers are big-endian. This module does no I/O. The trap: the
virtual size is `current_size` and nothing else; the geometry of most disks is a little smaller.
"""

import struct
import time
import uuid
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, Self

from gateway.images.errors import CorruptImage, ImageTooLarge, UnsupportedImage
from gateway.images.files import Buffer

SECTOR: Final = 512
BLOCK_SIZE: Final = 2 << 20
SMALLEST_BLOCK: Final = 4096
LARGEST_BLOCK: Final = 256 << 20  # a bitmap of 64 KiB; nobody makes more than 2 MiB
MAX_VIRTUAL_SIZE: Final = 2040 << 30
UNUSED: Final = 0xFFFFFFFF
NO_OFFSET: Final = 0xFFFFFFFFFFFFFFFF

FOOTER_SIZE: Final = 512
HEADER_SIZE: Final = 1024
LOCATORS: Final = 8
NO_ID: Final = uuid.UUID(int=0)  # as the id of a parent: the parent is a raw image
EPOCH: Final = 946684800  # 2000-01-01T00:00:00Z in Unix time

_FOOTER_COOKIE: Final = b"conectix"
_HEADER_COOKIE: Final = b"cxsparse"
_BATMAP_COOKIE: Final = b"tdbatmap"
_FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQHBBII16sBB426s")
_HEADER: Final = struct.Struct(">8sQQIIII16sII512s192s256s")
_LOCATOR: Final = struct.Struct(">IIIIQ")
_BATMAP: Final = struct.Struct(">8sQIII484s")
_FOOTER_CHECKSUM: Final = 64
_HEADER_CHECKSUM: Final = 36
_TAP_OLD_HIDDEN: Final = (0x00000001, 0x00010001)  # these flipped the hidden flag without a new checksum

CREATOR_TAP: Final = b"tap\0"
TAP_VERSION: Final = 0x00010003
TAP_LITTLE_ENDIAN_BITMAPS: Final = 0x00000001
FEATURES: Final = 0x00000002  # the reserved bit, which is always set
FORMAT_VERSION: Final = 0x00010000
HEADER_VERSION: Final = 0x00010000
BATMAP_VERSION: Final = 0x00010002


class DiskType(IntEnum):
    """The kinds of VHD that exist in practice."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


class Platform(IntEnum):
    """The platform code of a parent locator."""

    NONE = 0
    W2RU = 0x57327275  # Windows, relative, UTF-16LE
    W2KU = 0x57326B75  # Windows, absolute, UTF-16LE; tapdisk writes a relative path here too
    MACX = 0x4D616358  # a file URL, UTF-8


def checksum(data: Buffer, position: int) -> int:
    """Return the one's complement of the sum of all bytes but the four at `position`."""
    return ~(sum(data) - sum(data[position : position + 4])) & 0xFFFFFFFF


def geometry(size: int) -> tuple[int, int, int]:
    """Return (cylinders, heads, sectors per track) for a disk of `size` bytes, never more than `size`.

    The algorithm is the specification's appendix, as blktap's vhd_chs has it.
    """
    sectors = min(size // SECTOR, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        heads, per_track = 16, 255
        tracks = sectors // per_track
    else:
        per_track = 17
        tracks = sectors // per_track
        heads = max((tracks + 1023) // 1024, 4)
        if tracks >= heads * 1024 or heads > 16:
            heads, per_track = 16, 31
            tracks = sectors // per_track
        if tracks >= heads * 1024:
            heads, per_track = 16, 63
            tracks = sectors // per_track
    return tracks // heads, heads, per_track


def vhd_timestamp(unix_time: float) -> int:
    """Return seconds since 2000 for a Unix time: never in the future, never before 2000."""
    return max(0, min(int(min(unix_time, time.time())) - EPOCH, 0xFFFFFFFF))


def round_up_virtual_size(size: int) -> int:
    """Return the next multiple of 2 MiB, at least 2 MiB: the sizes that XenServer gives to a VHD."""
    return max(BLOCK_SIZE, -(-size // BLOCK_SIZE) * BLOCK_SIZE)


def round_up_to_sector(size: int) -> int:
    """Return the next multiple of 512."""
    return -(-size // SECTOR) * SECTOR


def check_virtual_size(size: int, path: str) -> None:
    """Raise ImageTooLarge when a VHD cannot hold `size` bytes, CorruptImage when it is no size at all."""
    if size > MAX_VIRTUAL_SIZE:
        raise ImageTooLarge(
            path, f"a VHD holds at most {MAX_VIRTUAL_SIZE} bytes (2040 GiB), not {size}; use a raw image"
        )
    if size % SECTOR:
        raise CorruptImage(path, f"the virtual size {size} is not a multiple of 512 bytes")


@dataclass(frozen=True, slots=True)
class Footer:
    """The 512 bytes at the end of every VHD (and, as a copy, at the start of all but fixed ones)."""

    current_size: int
    disk_type: DiskType
    unique_id: uuid.UUID
    timestamp: int
    data_offset: int
    original_size: int
    geometry: tuple[int, int, int]
    features: int = FEATURES
    version: int = FORMAT_VERSION
    creator: bytes = CREATOR_TAP
    creator_version: int = TAP_VERSION
    creator_os: bytes = bytes(4)
    saved: int = 0
    hidden: bool = False
    reserved: bytes = bytes(426)

    @classmethod
    def new(cls, size: int, disk_type: DiskType, unique_id: uuid.UUID | None = None) -> Self:
        """Make the footer of a new disk of `size` bytes, with a random id unless one is given."""
        return cls(
            current_size=size,
            disk_type=disk_type,
            unique_id=unique_id or uuid.uuid4(),
            timestamp=vhd_timestamp(time.time()),
            data_offset=NO_OFFSET if disk_type is DiskType.FIXED else FOOTER_SIZE,
            original_size=size,
            geometry=geometry(size),
        )

    @classmethod
    def unpack(cls, data: Buffer, path: str) -> Self:
        """Parse 512 bytes, or the 511 that old versions of Virtual PC wrote. Raises ImageError."""
        raw = bytes(data)
        if len(raw) == FOOTER_SIZE - 1:
            raw += b"\0"
        if len(raw) != FOOTER_SIZE or raw[:8] != _FOOTER_COOKIE:
            raise CorruptImage(path, "there is no VHD footer")
        (
            _,
            features,
            version,
            data_offset,
            timestamp,
            creator,
            creator_version,
            creator_os,
            original_size,
            current_size,
            cylinders,
            heads,
            per_track,
            disk_type,
            stored,
            unique_id,
            saved,
            hidden,
            reserved,
        ) = _FOOTER.unpack(raw)
        expected = checksum(raw, _FOOTER_CHECKSUM)
        if stored != expected and not (
            hidden
            and creator[:3] == b"tap"
            and creator_version in _TAP_OLD_HIDDEN
            and stored == (expected + hidden) & 0xFFFFFFFF
        ):
            raise CorruptImage(path, "the checksum of the footer is wrong")
        if version >> 16 != FORMAT_VERSION >> 16:
            raise UnsupportedImage(path, f"VHD format version {version:#010x} is not known")
        try:
            known_type = DiskType(disk_type)
        except ValueError:
            raise UnsupportedImage(path, f"VHD disk type {disk_type} is not known") from None
        if hidden > 1:
            raise CorruptImage(path, f"the hidden flag is {hidden}, neither 0 nor 1")
        return cls(
            current_size=current_size,
            disk_type=known_type,
            unique_id=uuid.UUID(bytes=unique_id),
            timestamp=timestamp,
            data_offset=data_offset,
            original_size=original_size,
            geometry=(cylinders, heads, per_track),
            features=features,
            version=version,
            creator=creator,
            creator_version=creator_version,
            creator_os=creator_os,
            saved=saved,
            hidden=bool(hidden),
            reserved=reserved,
        )

    def pack(self) -> bytes:
        """Return the 512 bytes, checksum included (the hidden flag is always part of it)."""
        data = bytearray(
            _FOOTER.pack(
                _FOOTER_COOKIE,
                self.features,
                self.version,
                self.data_offset,
                self.timestamp,
                self.creator,
                self.creator_version,
                self.creator_os,
                self.original_size,
                self.current_size,
                *self.geometry,
                self.disk_type,
                0,
                self.unique_id.bytes,
                self.saved,
                self.hidden,
                self.reserved,
            )
        )
        struct.pack_into(">I", data, _FOOTER_CHECKSUM, checksum(data, _FOOTER_CHECKSUM))
        return bytes(data)

    def with_hidden(self, hidden: bool) -> "Footer":
        """Return the same footer with another hidden flag."""
        return replace(self, hidden=hidden)

    @property
    def made_by_tap(self) -> bool:
        """Return whether blktap (or we, who sign as it does) made the image."""
        return self.creator[:3] == b"tap"


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """Where the header says that a parent's name is stored. Offsets and lengths are bytes."""

    platform: int = Platform.NONE
    data_space: int = 0  # bytes or sectors, depending on who wrote it
    data_length: int = 0
    data_offset: int = 0
    reserved: int = 0

    @classmethod
    def unpack(cls, data: Buffer, path: str) -> Self:
        """Parse 24 bytes. Raises CorruptImage."""
        if len(data) != _LOCATOR.size:
            raise CorruptImage(path, "a parent locator is cut short")
        platform, space, length, reserved, offset = _LOCATOR.unpack(data)
        return cls(platform, space, length, offset, reserved)

    def pack(self) -> bytes:
        """Return the 24 bytes."""
        return _LOCATOR.pack(
            self.platform, self.data_space, self.data_length, self.reserved, self.data_offset
        )

    @property
    def space_bytes(self) -> int:
        """Return the room kept for the data: values under 512 count sectors, larger ones bytes."""
        return self.data_space * SECTOR if self.data_space < SECTOR else self.data_space


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """The 1024 bytes that dynamic and differencing images have after the footer's copy."""

    table_offset: int
    max_table_entries: int
    block_size: int = BLOCK_SIZE
    parent_id: uuid.UUID = NO_ID
    parent_timestamp: int = 0
    parent_name: bytes = bytes(512)  # UTF-16BE, padded with zeroes
    locators: tuple[ParentLocator, ...] = (ParentLocator(),) * LOCATORS
    version: int = HEADER_VERSION
    data_offset: int = NO_OFFSET
    reserved: int = 0
    padding: bytes = bytes(256)

    @classmethod
    def unpack(cls, data: Buffer, path: str) -> Self:
        """Parse 1024 bytes. Raises ImageError."""
        if len(data) != HEADER_SIZE or data[:8] != _HEADER_COOKIE:
            raise CorruptImage(path, "there is no dynamic disk header")
        (
            _,
            data_offset,
            table_offset,
            version,
            entries,
            block_size,
            stored,
            parent_id,
            parent_timestamp,
            reserved,
            parent_name,
            locators,
            padding,
        ) = _HEADER.unpack(data)
        if stored != checksum(data, _HEADER_CHECKSUM):
            raise CorruptImage(path, "the checksum of the dynamic disk header is wrong")
        if version >> 16 != HEADER_VERSION >> 16:
            raise UnsupportedImage(path, f"dynamic disk header version {version:#010x} is not known")
        if not SMALLEST_BLOCK <= block_size <= LARGEST_BLOCK or block_size & (block_size - 1):
            raise UnsupportedImage(
                path, f"the block size {block_size} is no power of two from 4096 to {LARGEST_BLOCK}"
            )
        return cls(
            table_offset=table_offset,
            max_table_entries=entries,
            block_size=block_size,
            parent_id=uuid.UUID(bytes=parent_id),
            parent_timestamp=parent_timestamp,
            parent_name=parent_name,
            locators=tuple(
                ParentLocator.unpack(locators[start : start + _LOCATOR.size], path)
                for start in range(0, LOCATORS * _LOCATOR.size, _LOCATOR.size)
            ),
            version=version,
            data_offset=data_offset,
            reserved=reserved,
            padding=padding,
        )

    def pack(self) -> bytes:
        """Return the 1024 bytes, checksum included."""
        data = bytearray(
            _HEADER.pack(
                _HEADER_COOKIE,
                self.data_offset,
                self.table_offset,
                self.version,
                self.max_table_entries,
                self.block_size,
                0,
                self.parent_id.bytes,
                self.parent_timestamp,
                self.reserved,
                self.parent_name,
                b"".join(locator.pack() for locator in self.locators),
                self.padding,
            )
        )
        struct.pack_into(">I", data, _HEADER_CHECKSUM, checksum(data, _HEADER_CHECKSUM))
        return bytes(data)

    @property
    def table_end(self) -> int:
        """Return the offset of the first byte after the BAT, which fills whole sectors."""
        return self.table_offset + round_up_to_sector(4 * self.max_table_entries)


@dataclass(frozen=True, slots=True)
class BatmapHeader:
    """blktap's "tdbatmap": after it comes one bit for each block, set when the block's bitmap is full."""

    map_offset: int
    map_sectors: int
    map_checksum: int = 0xFFFFFFFF  # of a map of zeroes, whatever its length
    version: int = BATMAP_VERSION
    reserved: bytes = bytes(484)

    @classmethod
    def unpack(cls, data: Buffer, path: str) -> Self:
        """Parse 512 bytes. Raises CorruptImage."""
        if len(data) != SECTOR or data[:8] != _BATMAP_COOKIE:
            raise CorruptImage(path, "there is no batmap")
        _, offset, sectors, version, map_checksum, reserved = _BATMAP.unpack(data)
        return cls(offset, sectors, map_checksum, version, reserved)

    def pack(self) -> bytes:
        """Return the 512 bytes."""
        return _BATMAP.pack(
            _BATMAP_COOKIE,
            self.map_offset,
            self.map_sectors,
            self.version,
            self.map_checksum,
            self.reserved,
        )
