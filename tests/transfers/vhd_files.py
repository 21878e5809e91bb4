"""VHD files made byte by byte for tests, as programs that are not ours lay them out, and hostile ones."""

import random
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.images.vhd.format import (
    NO_ID,
    SECTOR,
    UNUSED,
    DiskType,
    DynamicHeader,
    Footer,
    checksum,
    round_up_to_sector,
)

TABLE_OFFSET = 1536
# Seconds since 2000 (2020-01-01): the same bytes on every run.
MADE_AT = 631_152_000


@dataclass(frozen=True)
class Block:
    """A bitmap as integer, the highest bit being the first sector, and the data of the whole block."""

    mask: int
    data: bytes


def footer_of(size: int, kind: DiskType = DiskType.DYNAMIC, **changes: object) -> Footer:
    made = Footer.new(size, kind, uuid.UUID(int=size + kind))
    made = replace(made, timestamp=MADE_AT, creator=b"win ", creator_version=0xA0000)
    return replace(made, **changes)  # type: ignore[arg-type]


def vhd_file(
    size: int,
    blocks: Mapping[int, Block],
    *,
    kind: DiskType = DiskType.DYNAMIC,
    block_size: int = 2 << 20,
    order: Sequence[int] | None = None,
    gap: int = 0,
    footer: Footer | None = None,
) -> bytes:
    """A sparse VHD with its blocks in `order`, `gap` bytes before each of them and the last footer."""
    footer = footer or footer_of(size, kind)
    entries = -(-size // block_size)
    parent = uuid.UUID(int=7) if kind is DiskType.DIFFERENCING else NO_ID
    header = DynamicHeader(TABLE_OFFSET, entries, block_size, parent_id=parent)
    table = [UNUSED] * entries
    data = bytearray(header.table_end)
    bitmap_bytes = block_size // SECTOR // 8
    for block in order if order is not None else sorted(blocks):
        data += bytes(gap)
        table[block] = len(data) // SECTOR
        bitmap = blocks[block].mask.to_bytes(bitmap_bytes, "big")
        data += bitmap.ljust(round_up_to_sector(bitmap_bytes), b"\0") + blocks[block].data
    data += bytes(gap) + footer.pack()
    data[:512] = footer.pack()
    data[512:1536] = header.pack()
    data[TABLE_OFFSET : TABLE_OFFSET + 4 * entries] = struct.pack(f">{entries}I", *table)
    return bytes(data)


def with_header(file: bytes, offset: int, form: str, value: int) -> bytes:
    """The same file with another field in the header (big-endian, at `offset` in it), checksum put right."""
    data = bytearray(file)
    header = data[512:1536]
    struct.pack_into(form, header, offset, value)
    struct.pack_into(">I", header, 36, checksum(header, 36))
    data[512:1536] = header
    return bytes(data)


def with_footer(file: bytes, footer: Footer) -> bytes:
    """The same file with another footer at both ends."""
    return footer.pack() + file[512:-512] + footer.pack()


def random_blocks(chance: random.Random, size: int, block_size: int = 2 << 20) -> dict[int, Block]:
    """Some blocks of a disk, with bitmaps of all kinds."""
    sectors = block_size // SECTOR
    blocks = {}
    for block in range(-(-size // block_size)):
        if chance.random() < 0.5:
            data = chance.randbytes(block_size)
            if chance.random() < 0.3:
                zeroes = min(block_size, 256 << 10)
                data = bytes(zeroes) + data[zeroes:]
            masks = [(1 << sectors) - 1, 0, chance.getrandbits(sectors), _runs(chance, sectors)]
            blocks[block] = Block(chance.choice(masks), data)
    return blocks


def _runs(chance: random.Random, sectors: int) -> int:
    mask, at = 0, 0
    while at < sectors:
        length = min(chance.randint(1, 700), sectors - at)
        if chance.random() < 0.5:
            mask |= ((1 << length) - 1) << (sectors - at - length)
        at += length
    return mask


def content(old: bytes, blocks: Mapping[int, Block], block_size: int = 2 << 20) -> bytes:
    """What a disk that held `old` holds when the sectors of these blocks are written to it."""
    disk = bytearray(old)
    sectors = block_size // SECTOR
    for number, block in blocks.items():
        for sector in range(sectors):
            at = number * block_size + sector * SECTOR
            if block.mask >> (sectors - 1 - sector) & 1 and at < len(disk):
                disk[at : at + SECTOR] = block.data[sector * SECTOR : (sector + 1) * SECTOR]
    return bytes(disk)
