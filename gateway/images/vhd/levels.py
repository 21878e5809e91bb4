"""The files of a chain as the block map sees them: what each has of a stretch of the disk.

A level answers with a place in its file and a mask of the sectors that are there, an integer whose highest
bit is the first sector: whole-number arithmetic merges such masks without a loop over sectors.
The trap: a small node hides what its parents have beyond its end, so each level knows how much of it shows.
"""

from typing import Final, Protocol

from gateway.images.files import Buffer, next_data
from gateway.images.vhd.format import SECTOR
from gateway.images.vhd.image import VhdFile
from gateway.images.vhd.writer import LeafWriter

NOWHERE: Final = 1 << 62


class Level(Protocol):
    """One file of the chain, as the map sees it."""

    def find(self, start: int, sectors: int) -> tuple[int, int] | None:
        """Return (file offset of the byte at `start`, mask of the sectors this level has), or None.

        The first sector is the highest of the mask's `sectors` bits.
        """
        ...

    def next_stored(self, start: int) -> int:
        """Return the first offset from `start` on where this level may have anything, or NOWHERE."""
        ...


class ReadLevel(Level, Protocol):
    """A file that is only read: every one but a leaf that is open for writing."""

    def stores(self, start: int, stop: int) -> bool:
        """Return whether this level has anything in a range of whole sectors."""
        ...


class SparseLevel:
    """A dynamic or differencing image that is only read; its children see `visible` bytes of it."""

    def __init__(self, image: VhdFile, visible: int) -> None:
        self._image = image
        self._visible = visible

    def find(self, start: int, sectors: int) -> tuple[int, int] | None:
        """Return where the bytes at `start` lie and which sectors are there, or None."""
        image = self._image
        block = start // image.block_size
        if block >= image.blocks:
            return None
        offset = image.block_offset(block)
        if offset is None:
            return None
        within = start % image.block_size
        mask = sectors_present(image.read_bitmap(offset), within, sectors)
        return offset + image.bitmap_size + within, clip(mask, start, sectors, self._visible)

    def next_stored(self, start: int) -> int:
        """Return where the next block is, or NOWHERE."""
        image = self._image
        block = start // image.block_size
        found = image.table.next_used(block)
        if found >= image.blocks or found * image.block_size >= self._visible:
            return NOWHERE
        return max(start, found * image.block_size)

    def stores(self, start: int, stop: int) -> bool:
        """Return whether any sector of the range is there."""
        image = self._image
        stop = min(stop, self._visible)
        while (start := self.next_stored(start)) < stop:
            block, within = divmod(start, image.block_size)
            offset = image.block_offset(block)
            if offset is not None:
                last = min(stop - block * image.block_size, image.block_size)
                sectors = image.sectors_per_block
                wanted = (1 << (sectors - within // SECTOR)) - (1 << (sectors - -(-last // SECTOR)))
                if int.from_bytes(image.read_bitmap(offset), "big") & wanted:
                    return True
            start = (block + 1) * image.block_size
        return False


class FlatLevel:
    """A raw parent, or a fixed VHD: everything up to its size lies there. Holes of the file are none."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size

    def find(self, start: int, sectors: int) -> tuple[int, int] | None:
        """Return where the bytes at `start` lie and which sectors are there, or None."""
        if start >= self._size:
            return None
        return start, clip((1 << sectors) - 1, start, sectors, self._size)

    def next_stored(self, start: int) -> int:
        """Return where the next data is, or NOWHERE."""
        if start >= self._size:
            return NOWHERE
        found = next_data(self._fd, start, self._size)
        return found if found < self._size else NOWHERE

    def stores(self, start: int, stop: int) -> bool:
        """Return whether there is any data in the range."""
        return self.next_stored(start) < stop


class WrittenLeaf:
    """The leaf of a disk that is open for writing: what is in memory counts."""

    def __init__(self, writer: LeafWriter, image: VhdFile) -> None:
        self._writer = writer
        self._image = image

    def find(self, start: int, sectors: int) -> tuple[int, int] | None:
        """Return where the bytes at `start` lie and which sectors are there, or None."""
        image = self._image
        block = start // image.block_size
        offset = self._writer.data_offset(block)
        if offset is None:
            return None
        within = start % image.block_size
        mask = sectors_present(self._writer.bitmap(block), within, sectors)
        return offset + within, clip(mask, start, sectors, image.size)

    def next_stored(self, start: int) -> int:
        """Return where the next block is, or NOWHERE."""
        image = self._image
        found = self._writer.next_used(start // image.block_size)
        return max(start, found * image.block_size) if found < image.blocks else NOWHERE


def sectors_present(bitmap: Buffer, within: int, sectors: int) -> int:
    """Return the part of a bitmap that begins `within` bytes into the block, as an integer."""
    first = within // SECTOR // 8
    return int.from_bytes(bitmap[first : first + sectors // 8], "big")


def clip(mask: int, start: int, sectors: int, size: int) -> int:
    """Clear the bits of sectors that begin at or beyond `size` bytes."""
    beyond = sectors - max(0, -(-(size - start) // SECTOR))
    return mask if beyond <= 0 else mask >> beyond << beyond
