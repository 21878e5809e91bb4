"""The consistency check of one VHD file.

It finds what open_vhd tolerates as well: a damaged footer beside an intact copy, blocks that share bytes, a
batmap that lies, locators that only some programs can follow. VHD has no checksum over its block allocation
table and bitmaps, so a wrong entry that stays inside the file and hits nothing cannot be found.

Time is linear in the number of blocks; memory is a small multiple of the block allocation table's size. The
trap: a file that is being written looks damaged, so a file that somebody writes to is not checked at all.
"""

import os
import stat
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from gateway.images.errors import CorruptImage, ImageError, UnsupportedImage
from gateway.images.file_locks import FileInUse, FileUse, lock_file
from gateway.images.files import pread_exactly
from gateway.images.vhd.check_parent import parent_problems
from gateway.images.vhd.format import (
    FOOTER_SIZE,
    NO_OFFSET,
    SECTOR,
    UNUSED,
    BatmapHeader,
    DiskType,
    Footer,
    round_up_to_sector,
    vhd_timestamp,
)
from gateway.images.vhd.image import VhdFile, open_vhd
from gateway.images.vhd.problems import CheckReport, Problem, ProblemKind

SHOWN_OF_A_KIND: Final = 10
_SEARCHED: Final = 1 << 20  # so far (bytes) before the end of a file a lost footer is looked for
_WINDOW: Final = 1 << 18
_LARGEST_GEOMETRY: Final = (65535, 16, 255)
_PIECE: Final = 1 << 16
_FULL_BITS: Final = {count: 0xFF >> count for count in range(8)}


class Findings:
    """The problems of one file; of each kind only the first few are written out."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._problems: list[Problem] = []
        self._count: Counter[ProblemKind] = Counter()

    def add(self, kind: ProblemKind, detail: str, *, repairable: bool = False) -> None:
        """Note a problem."""
        self._count[kind] += 1
        if self._count[kind] <= SHOWN_OF_A_KIND:
            self._problems.append(Problem(kind, self.path, detail, repairable))

    def has_errors(self) -> bool:
        """Return whether something worse than a warning was found."""
        return bool(self.report().errors)

    def report(self) -> CheckReport:
        """Return what was found so far."""
        more = tuple(
            Problem(kind, self.path, f"and {count - SHOWN_OF_A_KIND} more of this kind ({kind.value})")
            for kind, count in self._count.items()
            if count > SHOWN_OF_A_KIND
        )
        return CheckReport(self.path, (*self._problems, *more))


def check_vhd(path: str) -> CheckReport:
    """Check the VHD at `path`. What is wrong with it is reported; an OSError is a failure of the machine."""
    findings = Findings(path)
    # O_NONBLOCK: a fifo of that name must not hold us.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except IsADirectoryError:
        fd = -1
    if fd < 0 or not stat.S_ISREG(os.fstat(fd).st_mode):
        if fd >= 0:
            os.close(fd)
        findings.add(ProblemKind.NOT_REGULAR, "this is not a regular file; move it out of the directory")
        return findings.report()
    try:
        lock_file(fd, FileUse.READ, path)
        return check_open_vhd(fd, path)
    except FileInUse as error:
        findings.add(ProblemKind.IN_USE, f"not checked, since {error.why}; close it there and check again")
        return findings.report()
    finally:
        os.close(fd)


def check_open_vhd(fd: int, path: str) -> CheckReport:
    """Check the VHD open as `fd`, which nobody else may write to meanwhile."""
    findings = Findings(path)
    footer = _check_footers(fd, findings)
    if footer is None:
        return findings.report()
    try:
        image = open_vhd(fd, path)
        if image.header is not None:
            len(image.bat)
    except UnsupportedImage as error:
        findings.add(ProblemKind.UNSUPPORTED, f"{error.problem}; convert it with the program that made it")
        return findings.report()
    except ImageError as error:
        if footer.disk_type is not DiskType.FIXED or not findings.has_errors():
            detail = f"{error.problem}; this cannot be repaired without a backup"
            findings.add(ProblemKind.HEADER_WRONG, detail)
        return findings.report()
    _check_footer_values(image, findings)
    if image.header is not None:
        _check_metadata(image, findings)
        _check_blocks(image, findings)
        _check_last_bitmap(image, findings)
        _check_batmap(image, findings)
        if image.footer.disk_type is DiskType.DIFFERENCING:
            for kind, detail, repairable in parent_problems(image):
                findings.add(kind, detail, repairable=repairable)
    return findings.report()


# Footers


def _check_footers(fd: int, findings: Findings) -> Footer | None:
    """Find the footer that counts. None: the rest of the file cannot be looked at."""
    size = os.fstat(fd).st_size
    try:
        end = _footer_at_end(fd, size, findings.path)
        copy = footer_at(fd, 0, findings.path)
    except UnsupportedImage as error:
        findings.add(ProblemKind.UNSUPPORTED, f"{error.problem}; convert it with the program that made it")
        return None
    if end is None and (copy is None or copy.disk_type is DiskType.FIXED):
        earlier = earlier_footer(fd, size, findings.path)
        if earlier is not None:
            offset = earlier[0]
            detail = f"after the footer at {offset} come {size - offset - FOOTER_SIZE} strange bytes; "
            detail += "repairing cuts them off"
            findings.add(ProblemKind.FOOTER_NOT_AT_END, detail, repairable=True)
            return None
        detail = "there is neither a footer at the end nor a copy of it at 0; this is no VHD, or restore it"
        findings.add(ProblemKind.NO_FOOTER, detail)
        return None
    if end is None:
        assert copy is not None
        if pread_exactly(fd, 8, max(0, round_up_to_sector(size) - FOOTER_SIZE)) == b"conectix":
            detail = f"the footer at {size - FOOTER_SIZE} is damaged; repairing writes it from its copy at 0"
            findings.add(ProblemKind.FOOTER_DAMAGED, detail, repairable=True)
        else:
            detail = f"the file ends at {size} without a footer; repairing writes it from its copy at 0"
            findings.add(ProblemKind.FOOTER_NOT_AT_END, detail, repairable=True)
        return copy
    if end.disk_type is DiskType.FIXED:
        spare = size - FOOTER_SIZE - end.current_size
        if spare > 0:
            detail = f"{spare} bytes lie between the end of the disk at {end.current_size} and the footer; "
            detail += "no program minds"
            findings.add(ProblemKind.LENGTH_WRONG, detail)
    elif copy is None:
        detail = "the copy of the footer at 0 is damaged; repairing writes it from the footer"
        findings.add(ProblemKind.FOOTER_COPY_DAMAGED, detail, repairable=True)
    elif copy != end:
        _compare_footers(end, copy, findings)
    return end


def _compare_footers(end: Footer, copy: Footer, findings: Findings) -> None:
    fields = ("current_size", "disk_type", "unique_id", "data_offset", "original_size", "geometry")
    differing = [name for name in fields if getattr(end, name) != getattr(copy, name)]
    kind = ProblemKind.FOOTERS_DIFFER if differing else ProblemKind.FLAGS_DIFFER
    what = ", ".join(differing) or "flags"
    detail = f"the footer at the end and its copy at 0 have different {what}; repairing writes the copy anew"
    findings.add(kind, detail, repairable=True)


def _footer_at_end(fd: int, size: int, path: str) -> Footer | None:
    for length in (FOOTER_SIZE, FOOTER_SIZE - 1):
        if size >= length:
            try:
                return Footer.unpack(pread_exactly(fd, length, size - length), path)
            except CorruptImage:
                continue
    return None


def footer_at(fd: int, offset: int, path: str) -> Footer | None:
    """Return the footer that lies whole at `offset`, or None. Raises UnsupportedImage."""
    try:
        return Footer.unpack(pread_exactly(fd, FOOTER_SIZE, offset), path)
    except CorruptImage:
        return None


def earlier_footer(fd: int, size: int, path: str) -> tuple[int, Footer] | None:
    """Return the last intact footer before the end that can be this file's own, and its offset."""
    begin = max(0, size - _SEARCHED) // SECTOR * SECTOR
    tail = pread_exactly(fd, size - begin, begin)
    position = tail.rfind(b"conectix")
    while position >= 0:
        offset = begin + position
        if offset % SECTOR == 0 and offset > 0:
            footer = footer_at(fd, offset, path)
            fixed_here = footer and (footer.disk_type is not DiskType.FIXED or footer.current_size == offset)
            if footer is not None and fixed_here:
                return offset, footer
        position = tail.rfind(b"conectix", 0, position)
    return None


def _check_footer_values(image: VhdFile, findings: Findings) -> None:
    footer = image.footer
    if footer.timestamp > vhd_timestamp(time.time()):
        detail = "the footer's timestamp lies in the future, for which some programs refuse the file; "
        detail += "set the clock right or wait"
        findings.add(ProblemKind.TIMESTAMP_IN_FUTURE, detail)
    cylinders, heads, per_track = footer.geometry
    # QEMU and others write the largest geometry on purpose, to say that the size counts (block/vpc.c).
    if footer.geometry != _LARGEST_GEOMETRY and cylinders * heads * per_track * SECTOR > footer.current_size:
        detail = f"the geometry {cylinders}/{heads}/{per_track} is larger than the disk of "
        detail += f"{footer.current_size} bytes; programs that go by it read beyond the end"
        findings.add(ProblemKind.GEOMETRY_TOO_LARGE, detail)
    if footer.disk_type is DiskType.FIXED and footer.data_offset not in (NO_OFFSET, 0xFFFFFFFF):
        detail = f"a fixed disk's footer has the data offset {footer.data_offset}; no program minds"
        findings.add(ProblemKind.LENGTH_WRONG, detail)


# Blocks


def _check_metadata(image: VhdFile, findings: Findings) -> None:
    ranges = sorted(set(image.metadata))
    for (first, stop), (start, end) in pairwise(ranges):
        if start < stop:
            detail = f"the metadata at {first} to {stop} and at {start} to {end} overlap; "
            detail += "this cannot be repaired without a backup"
            findings.add(ProblemKind.METADATA_OVERLAPS, detail)


def _check_blocks(image: VhdFile, findings: Findings) -> None:
    metadata_end = max(last for _, last in image.metadata)
    for block, entry in enumerate(image.bat):
        if entry == UNUSED:
            continue
        start = entry * SECTOR
        stop = start + image.bitmap_size + min(image.block_size, image.size - block * image.block_size)
        if start >= image.data_end:
            detail = f"block {block} is said to lie at {start}, but the blocks end at {image.data_end}: its "
            detail += "data is lost. Repairing marks it unused: it then reads as its parent or zeroes"
            findings.add(ProblemKind.BLOCK_BEYOND_END, detail, repairable=True)
        elif stop > image.data_end:
            detail = f"block {block} at {start} is cut by the end of the blocks at {image.data_end}: "
            detail += f"{stop - image.data_end} bytes are lost. Repairing makes them zeroes"
            findings.add(ProblemKind.BLOCK_CUT, detail, repairable=True)
        if start >= metadata_end:
            continue
        for first, last in image.metadata:
            if start < last and first < stop:
                detail = f"block {block} at {start} lies over the metadata at {first}; "
                detail += "this cannot be repaired without a backup"
                findings.add(ProblemKind.BLOCK_IN_METADATA, detail)
                break
    for block, other in _overlaps(image):
        where = (
            f"block {block} at {image.bat[block] * SECTOR} and block {other} at {image.bat[other] * SECTOR}"
        )
        detail = f"{where} share bytes; this cannot be repaired without a backup"
        findings.add(ProblemKind.BLOCKS_OVERLAP, detail)


def _overlaps(image: VhdFile) -> Iterator[tuple[int, int]]:
    """Yield pairs of blocks that share bytes: each block that begins within one before it.

    Blocks have one length, so blocks that don't overlap begin in different slots of this length: an array of
    slots replaces sorting. A long file with few blocks is looked at in windows of slots.
    """
    length = (image.bitmap_size + image.block_size) // SECTOR
    bat = image.bat
    last = image.blocks - 1
    short = image.size % image.block_size  # the last block of some writers ends with the disk
    window = max(_WINDOW, len(bat))
    windows = sorted({entry // length // window for entry in bat if entry != UNUSED})
    slots_in_all = max((entry for entry in bat if entry != UNUSED), default=0) // length + 1
    before: int | None = None
    for number in windows:
        first_slot = number * window
        slots = array("I", bytes(4 * min(window, slots_in_all - first_slot)))  # block number + 1
        for block, entry in enumerate(bat):
            if entry == UNUSED or (short and block == last):
                continue
            slot = entry // length - first_slot
            if not 0 <= slot < window:
                continue
            if slots[slot]:
                yield slots[slot] - 1, block
            slots[slot] = block + 1
        for mark in slots:
            if mark:
                if before is not None and bat[mark - 1] - bat[before] < length:
                    yield before, mark - 1
                before = mark - 1
    if short and bat[last] != UNUSED:
        start = bat[last]
        stop = start + (image.bitmap_size + short) // SECTOR
        for block, entry in enumerate(bat):
            if block != last and entry != UNUSED and entry < stop and start < entry + length:
                yield block, last


def _check_last_bitmap(image: VhdFile, findings: Findings) -> None:
    block = image.blocks - 1
    used = (image.size - block * image.block_size) // SECTOR
    if block < 0 or used == image.sectors_per_block:
        return
    try:
        offset = image.block_offset(block)
    except CorruptImage:
        return  # reported with the other blocks
    if offset is None:
        return
    bits = int.from_bytes(image.read_bitmap(offset), "big")
    if bits & ((1 << (image.sectors_per_block - used)) - 1):
        detail = f"the bitmap at {offset} marks sectors beyond the end of the disk; no program minds"
        findings.add(ProblemKind.BITS_BEYOND_DISK, detail)


# The batmap


def _check_batmap(image: VhdFile, findings: Findings) -> None:
    assert image.header is not None
    offset = image.header.table_end
    header = image.batmap
    remedy = "repairing writes a batmap that is right"
    if header is None:
        if image.footer.made_by_tap and pread_exactly(image.fd, 8, offset) == b"tdbatmap":
            detail = (
                f"the header of the batmap at {offset} names no place inside the file; no program needs it"
            )
            findings.add(ProblemKind.BATMAP_DAMAGED, detail)
        return
    length = header.map_sectors * SECTOR
    if length < -(-image.blocks // 8) or length > round_up_to_sector(image.header.max_table_entries) + SECTOR:
        detail = f"the batmap at {header.map_offset} has {length} bytes for {image.blocks} blocks; "
        detail += "no program needs it"
        findings.add(ProblemKind.BATMAP_DAMAGED, detail)
        return
    if batmap_checksum(image.fd, header) != header.map_checksum:
        detail = f"the checksum of the batmap at {header.map_offset} is wrong; {remedy}"
        findings.add(ProblemKind.BATMAP_DAMAGED, detail, repairable=True)
    for block in lying_batmap_bits(image, header):
        detail = f"the batmap at {header.map_offset} says that block {block} is full, but it isn't; {remedy}"
        findings.add(ProblemKind.BATMAP_WRONG, detail, repairable=True)


def batmap_checksum(fd: int, header: BatmapHeader) -> int:
    """Return the one's complement of the sum of the map's bytes (blktap, vhd_checksum_batmap)."""
    stop = header.map_offset + header.map_sectors * SECTOR
    total = 0
    for position in range(header.map_offset, stop, _PIECE):
        total += sum(pread_exactly(fd, min(_PIECE, stop - position), position))
    return ~total & 0xFFFFFFFF


def lying_batmap_bits(image: VhdFile, header: BatmapHeader) -> Iterator[int]:
    """Yield the blocks that the batmap calls full though their bitmap isn't, or that aren't there at all."""
    marks = pread_exactly(image.fd, -(-image.blocks // 8), header.map_offset)
    for index, byte in enumerate(marks):
        if not byte:
            continue
        for bit in range(8):
            block = index * 8 + bit
            if byte & (0x80 >> bit) and block < image.blocks and not _is_full(image, block):
                yield block


def _is_full(image: VhdFile, block: int) -> bool:
    try:
        offset = image.block_offset(block)
    except CorruptImage:
        return True  # a worse problem, reported as such
    if offset is None:
        return False
    sectors = min(image.sectors_per_block, (image.size - block * image.block_size) // SECTOR)
    bitmap = image.read_bitmap(offset)
    full, rest = divmod(sectors, 8)
    return bitmap[:full] == b"\xff" * full and (
        not rest or bitmap[full] | _FULL_BITS[rest] == 0xFF  # bits of the last byte that have no meaning
    )
