"""A VHD from a body, as it comes: no file is kept but the one that becomes the VDI's image.

A dynamic or differencing VHD is read in the order of its file: footer, header, block allocation table, then
blocks by their place in the file, whatever order the table has; at last the footer. A fixed one is the disk,
then its footer. A dynamic VHD is a whole disk: sectors that it lacks are zeroes. A differencing one is a
patch: sectors that it has replace those of the disk, all others stay. Of which disk it is the patch can't be
known, because exports name a parent by an id that no VDI keeps. qemu-img and Xen Orchestra's converter of
VMDKs round the size up to whole cylinders: a VDI of the size before needs room for the data alone.

The trap: nothing here can be read again, so all that the header and the table show is checked before the
first block. Sources: as gateway/images/vhd/format.py.
"""

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from gateway.core.errors import XenAPIError
from gateway.images.disk import Disk
from gateway.images.errors import CorruptImage, ImageError, ImageTooLarge
from gateway.images.files import FILES, FileCalls
from gateway.images.vhd.bits import bit_runs
from gateway.images.vhd.format import (
    FOOTER_SIZE,
    HEADER_SIZE,
    SECTOR,
    TAP_LITTLE_ENDIAN_BITMAPS,
    UNUSED,
    DiskType,
    DynamicHeader,
    Footer,
    check_virtual_size,
    round_up_to_sector,
)
from gateway.images.vhd.image import MAX_BLOCKS, REVERSED_BITS
from gateway.images.vhd.levels import sectors_present
from gateway.transfers.body import BodyEnded, BodyReader
from gateway.transfers.formats import BodyFormat, Fits, corrupt_image, refuse_others, unsupported_image
from gateway.transfers.import_flat import FlatDisk, begin_flat
from gateway.transfers.import_raw import BUFFER_BYTES, WRITEBACK_BYTES, start_writeback, store

_NAME: Final = "vhd"
_COOKIE: Final = b"conectix"
_FURTHEST: Final = UNUSED * SECTOR  # no block allocation table entry reaches farther
_BLOCK_BITS: Final = 24  # MAX_BLOCKS is 1 << 24
# More blocks than that are sorted only if they are in order already: a VHD of 2040 GiB has half as many.
_MOST_SORTED: Final = 1 << 21
# Without a length the last footer is looked for so far behind the last block (bytes).
_MOST_BEFORE_FOOTER: Final = 2 << 30
_ZEROES: Final = bytes(BUFFER_BYTES)


def begin_vhd(
    reader: BodyReader, fits: Fits, *, room: int | None = None, is_new: bool = False
) -> "SparseVhd | FlatDisk":
    """Read what precedes the data; see begin_flat. Raises XenAPIError, BodyEnded and what a body raises."""
    begin = reader.peek(SECTOR)
    try:
        if not begin.startswith(_COOKIE):
            refuse_others(begin, BodyFormat.VHD)
            return begin_flat(reader, fits, room=room, wanted=BodyFormat.VHD, is_new=is_new)
        vhd = _begin_sparse(reader, fits, room)
    except ImageError as error:
        raise _told(error) from error
    if is_new and vhd.patches:
        raise unsupported_image(_NAME, "a differencing VHD changes a disk; name the VDI that it is for")
    return vhd


def _told(error: ImageError) -> XenAPIError:
    if isinstance(error, CorruptImage):
        return corrupt_image(_NAME, error.problem)
    return unsupported_image(_NAME, error.problem)


def _begin_sparse(reader: BodyReader, fits: Fits, room: int | None) -> "SparseVhd":
    footer = Footer.unpack(reader.read(FOOTER_SIZE), _NAME)
    if footer.disk_type is DiskType.FIXED:
        raise CorruptImage(_NAME, "it begins with the footer of a fixed disk, which belongs at its end")
    _check_size(footer)
    virtual_size = footer.current_size
    if room is not None and room < virtual_size and _rounded_up(footer, room):
        virtual_size = room
    fits(virtual_size)
    if footer.data_offset % SECTOR or not FOOTER_SIZE <= footer.data_offset <= _FURTHEST:
        raise CorruptImage(_NAME, f"the header can't be at {footer.data_offset}")
    reader.skip(footer.data_offset - reader.position)
    header = DynamicHeader.unpack(reader.read(HEADER_SIZE), _NAME)
    blocks = -(-footer.current_size // header.block_size)
    if blocks > header.max_table_entries:
        raise CorruptImage(
            _NAME, f"the block allocation table has room for {header.max_table_entries} of {blocks} blocks"
        )
    if blocks > MAX_BLOCKS:
        raise unsupported_image(_NAME, f"the disk has {blocks} blocks; at most {MAX_BLOCKS} are supported")
    if header.table_offset % SECTOR or header.table_offset > _FURTHEST:
        raise CorruptImage(_NAME, f"the block allocation table can't be at {header.table_offset}")
    if header.table_offset < reader.position:
        raise unsupported_image(_NAME, "the block allocation table precedes the header")
    reader.skip(header.table_offset - reader.position)
    if reader.length is not None and reader.length < reader.position + 4 * blocks:
        raise BodyEnded(reader.position + 4 * blocks, reader.length)
    table = array("I", bytes(4 * blocks))
    with memoryview(table) as view:
        reader.fill_whole(view.cast("B"))
    if sys.byteorder == "little":
        table.byteswap()
    vhd = SparseVhd(reader, footer, header.block_size, table, virtual_size, fits)
    vhd.check_places(round_up_to_sector(reader.position) // SECTOR)
    return vhd


def _check_size(footer: Footer) -> None:
    if not footer.current_size:
        raise CorruptImage(_NAME, "its virtual size is 0")
    try:
        check_virtual_size(footer.current_size, _NAME)
    except ImageTooLarge:
        raise corrupt_image(
            _NAME, f"its virtual size is {footer.current_size} bytes, more than a VHD holds"
        ) from None


def _rounded_up(footer: Footer, size: int) -> bool:
    """Whether the disk may be one of `size` bytes whose last cylinder was made whole."""
    cylinders, heads, per_track = footer.geometry
    cylinder = heads * per_track * SECTOR
    return footer.current_size == cylinders * cylinder and footer.current_size - size < cylinder


@dataclass(slots=True)
class SparseVhd:
    """A dynamic or differencing VHD whose block allocation table has been read.

    Of its disk `virtual_size` bytes are taken; `fits` refuses more of them, should data lie behind these.
    """

    reader: BodyReader
    footer: Footer
    block_size: int
    table: "array[int]"
    virtual_size: int
    fits: Fits
    expected: int = 0
    _places: "array[int] | None" = field(default=None, init=False)

    @property
    def patches(self) -> bool:
        """Whether what it lacks stays as it is."""
        return self.footer.disk_type is DiskType.DIFFERENCING

    def fraction(self) -> float:
        """How far it is, from 0.0 to 1.0."""
        return self.reader.fraction(self.expected)

    @property
    def _bitmap_size(self) -> int:
        return round_up_to_sector(self.block_size // SECTOR // 8)

    def check_places(self, first: int) -> None:
        """Hold the table against itself: blocks lie from sector `first` on, and none in another.

        Finds the order of the file, and in `expected` how many bytes it has at least. Raises XenAPIError,
        BodyEnded if the body is shorter than that.
        """
        last = len(self.table) - 1
        whole = (self._bitmap_size + self.block_size) // SECTOR
        # The last block may be cut off where the disk ends.
        rest = self.footer.current_size - last * self.block_size
        short = (self._bitmap_size + rest) // SECTOR
        end = first
        for block, entry in self._in_file_order():
            if entry < end:
                self._sort()
                break
            end = entry + (short if block == last else whole)
        else:
            return self._expect(end)
        end = first
        for block, entry in self._in_file_order():
            if entry < end:
                raise corrupt_image(_NAME, f"block {block} lies in the metadata or in another block")
            end = entry + (short if block == last else whole)
        return self._expect(end)

    def _expect(self, end: int) -> None:
        """The last block ends at sector `end`."""
        self.expected = end * SECTOR + FOOTER_SIZE - 1  # old programs wrote 511 bytes
        length = self.reader.length
        if length is not None:
            if length < self.expected:
                raise BodyEnded(end * SECTOR + FOOTER_SIZE, length)
            self.expected = length

    def _sort(self) -> None:
        used = len(self.table) - self.table.count(UNUSED)
        if used > _MOST_SORTED:
            raise unsupported_image(_NAME, f"{used} blocks out of order are too many to be sorted")
        places = [entry << _BLOCK_BITS | block for block, entry in enumerate(self.table) if entry != UNUSED]
        places.sort()
        self._places = array("Q", places)

    def _in_file_order(self) -> Iterator[tuple[int, int]]:
        """Yield (block, its first sector in the file)."""
        if self._places is None:
            for block, entry in enumerate(self.table):
                if entry != UNUSED:
                    yield block, entry
        else:
            for place in self._places:
                yield place & ((1 << _BLOCK_BITS) - 1), place >> _BLOCK_BITS

    def receive(self, disk: Disk, *, files: FileCalls = FILES) -> None:
        """Write the blocks to `disk`, which reads as zeroes all over unless `patches`. Blocks.

        Raises XenAPIError, BodyEnded, OSError and what a body raises.
        """
        reader = self.reader
        reversed_bits = self.footer.made_by_tap and self.footer.creator_version == TAP_LITTLE_ENDIAN_BITMAPS
        buffer = bytearray(min(BUFFER_BYTES, self.block_size))
        begun = ended = 0  # a run of blocks that follow each other, not yet being written out
        with memoryview(buffer) as view:
            for block, entry in self._in_file_order():
                reader.skip(entry * SECTOR - reader.position)
                bitmap = reader.read(self._bitmap_size)
                if reversed_bits:
                    bitmap = bitmap.translate(REVERSED_BITS)
                start = block * self.block_size
                length = min(self.block_size, self.footer.current_size - start)
                for done in range(0, length, len(buffer)):
                    count = min(len(buffer), length - done)
                    reader.fill_whole(view[:count])
                    mask = sectors_present(bitmap, done, len(buffer) // SECTOR)
                    self._store(disk, buffer, view, count=count, offset=start + done, mask=mask)
                if start != ended or ended - begun >= WRITEBACK_BYTES:
                    start_writeback(disk, begun, ended - begun, files)
                    begun = start
                ended = max(start, min(start + length, self.virtual_size))
        try:
            self._check_end()
        except ImageError as error:
            raise _told(error) from error

    def _store(
        self, disk: Disk, buffer: bytearray, view: memoryview, *, count: int, offset: int, mask: int
    ) -> None:
        """Write the sectors of a part of a block that its bitmap says are there."""
        sectors = len(buffer) // SECTOR
        wanted = max(0, min(count, self.virtual_size - offset)) // SECTOR
        full = (1 << wanted) - 1 << sectors - wanted
        if wanted < count // SECTOR:
            for first, last in bit_runs(mask & ~full, sectors):
                if any(view[first * SECTOR : min(last * SECTOR, count)]):
                    self.fits(self.footer.current_size)
            if not wanted:
                return
            count = wanted * SECTOR
        present = mask & full
        if present == full:
            store(disk, buffer, view, count, offset, fresh=not self.patches)
        elif self.patches:
            for first, last in bit_runs(present, sectors):
                disk.pwrite(view[first * SECTOR : last * SECTOR], offset + first * SECTOR)
        elif present:
            for first, last in bit_runs(full & ~present, sectors):
                view[first * SECTOR : last * SECTOR] = _ZEROES[: (last - first) * SECTOR]
            store(disk, buffer, view, count, offset, fresh=True)

    def _check_end(self) -> None:
        """The body is whole if its last sector is the footer that it began with."""
        reader = self.reader
        if reader.length is None:
            footer = self._search_footer()
        else:
            left = reader.length - reader.position
            size = FOOTER_SIZE - 1 if left % SECTOR == FOOTER_SIZE - 1 else FOOTER_SIZE
            reader.skip(max(0, left - size))
            footer = Footer.unpack(reader.read(size), _NAME)
        first = self.footer
        if (footer.current_size, footer.disk_type, footer.unique_id) != (
            first.current_size,
            first.disk_type,
            first.unique_id,
        ):
            raise CorruptImage(_NAME, "the footer at its end is that of another disk")

    def _search_footer(self) -> Footer:
        reader = self.reader
        # A disk without blocks ends with its table, which need not end with a sector.
        reader.skip(-reader.position % SECTOR)
        stop = reader.position + _MOST_BEFORE_FOOTER
        while reader.position < stop:
            sector = reader.read(SECTOR)
            if sector.startswith(_COOKIE):
                return Footer.unpack(sector, _NAME)
        raise CorruptImage(_NAME, "there is no footer behind its last block")
