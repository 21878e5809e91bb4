"""A disk made of a chain of VHD files: a leaf over any number of parents.

The virtual disk is cut into granules, the smallest block size of the chain. Each granule has one place in a
compact map: not looked up yet, a hole, the file and offset where all of it lies, or mixed. A request inside
one granule is two look-ups and one preadv. Places are found on first use, by merging the sector bitmaps
from the leaf down; the runs of mixed granules are kept in a cache of bounded size.

The traps: a place is one integer, so that a reader never pairs a file with the offset of another; it is
stored under the lock, so that a slow reader never overwrites what a writer has put there since. Look-ups
take no lock. Nobody may close a disk while a request of another thread runs.
"""

import mmap
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from os import preadv
from typing import Final

from gateway.images.disk import (
    Extent,
    ExtentKind,
    FileRange,
    Hole,
    Reader,
    check_range,
    check_writable,
    merge_extents,
)
from gateway.images.files import FILES, Buffer, FileCalls, next_data
from gateway.images.raw import DataRun, file_extents, read_range
from gateway.images.vhd.format import BLOCK_SIZE, SECTOR, DiskType
from gateway.images.vhd.image import VhdFile
from gateway.images.vhd.levels import FlatLevel, Level, SparseLevel, WrittenLeaf, bit_runs
from gateway.images.vhd.writer import LeafWriter

# Places: the offset in the file, a multiple of 512, plus the number of the level, which begins at 1.
_UNKNOWN: Final = 0
_HOLE: Final = -1
_MIXED: Final = -2
_LEVEL: Final = 511
_OFFSET: Final = ~511

_WORTH_SKIPPING: Final = 8  # granules; a shorter rest of a range is looked up one by one

_CACHED_RUNS: Final = 1 << 20  # of mixed granules: 12 bytes each
_ZEROES: Final = bytes(1 << 20)


class VhdChain:
    """A `Disk` over [leaf … root]; owns the descriptors.

    `raw_root` is the (descriptor, path) of a raw root. Raises ImageError when a BAT cannot be read or the
    leaf cannot be written to.
    """

    def __init__(
        self,
        images: Sequence[VhdFile],
        raw_root: tuple[int, str] | None = None,
        *,
        read_only: bool = True,
        files: FileCalls = FILES,
        published: bool = True,
    ) -> None:
        leaf = images[0]
        self.size: Final = leaf.size
        self.read_only: Final = read_only
        self._leaf = leaf
        self._files = files
        self._lock = threading.Lock()
        self._edge_lock = threading.Lock()
        self._writer: LeafWriter | None = None
        if not read_only:
            self._writer = LeafWriter(leaf, self._lock, files=files, published=published)
        self._fds = [-1, *(image.fd for image in images)]
        self._paths = ["", *(image.path for image in images)]
        self._levels: list[Level] = []
        self._flat_level = 0
        self._flat_size = 0
        sizes = [image.block_size for image in images if image.header is not None]
        visible = self.size  # a small node hides what its parents have beyond its end
        for image in images:
            visible = min(visible, image.size)
            if image.footer.disk_type is DiskType.FIXED:
                self._add_flat(visible)
            else:
                self._levels.append(SparseLevel(image, visible))
        if self._writer is not None:
            self._levels[0] = WrittenLeaf(self._writer, leaf)
        if raw_root is not None:
            self._fds.append(raw_root[0])
            self._paths.append(raw_root[1])
            self._add_flat(min(visible, os.fstat(raw_root[0]).st_size))
        self._runs_of_data = [DataRun() for _ in self._fds]
        self._granule = min(sizes, default=BLOCK_SIZE)
        self._sectors = self._granule // SECTOR
        self._shift = self._granule.bit_length() - 1
        self._within = self._granule - 1
        self._skippable = _WORTH_SKIPPING * self._granule
        # Anonymous memory: pages that were never touched cost nothing, whatever the size of the disk.
        self._map = memoryview(mmap.mmap(-1, 8 * max(1, -(-self.size // self._granule)))).cast("q")
        self._mixed: dict[int, tuple[array[int], array[int]]] = {}
        self._cached_runs = 0
        self._closed = False

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        """Fill `buf` with the bytes at `offset`."""
        check_range(offset, len(buf), self.size)
        self._read_pieces(buf, offset)

    def reader(self) -> Reader:
        """Return `pread_into` for who knows that a range lies on the disk.

        It has at hand what a request inside one granule needs. The disk doesn't keep it: a circle of
        references would keep closed disks in memory.
        """
        places, fds, pieces = self._map, self._fds, self._read_pieces
        shift, mask, granule = self._shift, self._within, self._granule

        def read(buf: bytearray | memoryview, offset: int) -> None:
            length = len(buf)
            within = offset & mask
            if 0 < length <= granule - within:
                place = places[offset >> shift]
                if place > 0 and preadv(fds[place & _LEVEL], (buf,), (place & _OFFSET) + within) == length:
                    return
            pieces(buf, offset)

        return read

    def pwrite(self, buf: Buffer, offset: int) -> None:
        """Write `buf` at `offset`. Durable only after `flush`."""
        writer = self._writing()
        length = len(buf)
        check_range(offset, length, self.size)
        block_size = self._leaf.block_size
        if (offset | length) % SECTOR:
            self._write_edges(writer, memoryview(buf), offset)
            return
        within = offset % block_size
        if 0 < length <= block_size - within:
            self._write(writer, offset // block_size, within, buf)
            return
        view = memoryview(buf)
        for block, start, done, size in self._blocks(offset, length):
            self._write(writer, block, start, view[done : done + size])

    def zero(self, offset: int, length: int, *, trim: bool) -> None:
        """Make a range read as zeroes.

        With `trim`, blocks that nobody has stay that way, stored sectors become holes of the file, and only
        what would show a parent's data is hidden by a block of its own. Without it zeroes are written.
        """
        writer = self._writing()
        check_range(offset, length, self.size)
        stop = offset + length
        first = min(-(-offset // SECTOR) * SECTOR, stop)
        last = max(stop // SECTOR * SECTOR, first)
        for edge, size in ((offset, first - offset), (last, stop - last)):
            if size:
                self._write_edges(writer, memoryview(_ZEROES)[:size], edge)
        for block, within, done, size in self._blocks(first, last - first):
            if not trim:
                for start in range(0, size, len(_ZEROES)):
                    piece = memoryview(_ZEROES)[: min(len(_ZEROES), size - start)]
                    self._write(writer, block, within + start, piece)
                continue
            start = first + done
            hide = self._stored_below(start, start + size)
            if writer.punch(block, within, size, allocate=hide):
                with self._lock:
                    if hide:
                        writer.set_written(block, within, size)
                    self._place_block(writer, block)

    def flush(self) -> None:
        """Make every completed write durable."""
        if self._writer is not None:
            self._writer.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what the range is made of."""
        check_range(offset, length, self.size)
        return merge_extents(self._kinds(offset, length))

    def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        """Yield where the bytes of the range lie, joined where they follow each other in one file."""
        check_range(offset, length, self.size)
        return self._joined(offset, length)

    def close(self) -> None:
        """Flush what was written, cut the leaf to its end, and close all files."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._writer is not None:
                self._writer.finish()
        finally:
            descriptors = self._fds[1:]
            self._fds[:] = [-1] * len(self._fds)
            for fd in descriptors:
                os.close(fd)

    # Reading

    def _read_pieces(self, buf: bytearray | memoryview, offset: int) -> None:
        view = memoryview(buf)
        done = 0
        for level, position, size in self._pieces(offset, len(view)):
            part = view[done : done + size]
            if level:
                read_range(self._fds[level], part, position, self._paths[level])
            else:
                for start in range(0, size, len(_ZEROES)):
                    piece = min(len(_ZEROES), size - start)
                    part[start : start + piece] = _ZEROES[:piece]
            done += size

    def _add_flat(self, size: int) -> None:
        self._levels.append(FlatLevel(size))
        self._flat_level = len(self._levels)
        self._flat_size = size

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (level or 0 for zeroes, file offset, length) for a range."""
        ahead = [0] * len(self._levels)
        while length > 0:
            granule = offset >> self._shift
            within = offset & self._within
            size = min(length, self._granule - within)
            place = self._map[granule] or self._find(granule)
            if place > 0:
                level = place & _LEVEL
                if level == self._flat_level and length - size > self._skippable:
                    size += self._bare(offset + size, min(length, self._flat_size - offset) - size, ahead)
                yield level, (place & _OFFSET) + within, size
            elif place == _HOLE:
                if length - size > self._skippable:
                    size += self._bare(offset + size, length - size, ahead)
                yield 0, 0, size
            else:
                yield from self._mixed_pieces(granule, within, size)
            offset += size
            length -= size

    def _bare(self, start: int, length: int, ahead: list[int]) -> int:
        """Return for how many of `length` bytes no VHD with blocks has one: what is below shows.

        `start` is the first byte of a granule, and so is the end unless it is that of the range. `ahead`
        keeps how far each level is known to have nothing.
        """
        stop = start + length
        for number, level in enumerate(self._levels):
            if number + 1 == self._flat_level:
                continue
            if ahead[number] <= start:
                ahead[number] = level.next_stored(start)
            stop = min(stop, ahead[number])
            if stop <= start:
                break
        return max(0, stop - start)

    def _mixed_pieces(self, granule: int, within: int, length: int) -> Iterator[tuple[int, int, int]]:
        cached = self._mixed.get(granule)
        if cached is None:
            with self._lock:
                cached = self._runs(granule)
        starts, places = cached
        index = bisect_right(starts, within) - 1
        stop = within + length
        while within < stop:
            end = starts[index + 1] if index + 1 < len(starts) else self._granule
            size = min(end, stop) - within
            place = places[index]
            if place > 0:
                yield place & _LEVEL, (place & _OFFSET) + within - starts[index], size
            else:
                yield 0, 0, size
            within += size
            index += 1

    def _find(self, granule: int) -> int:
        """Look a granule up in the files and remember its place."""
        with self._lock:
            place = self._map[granule]
            if place == _UNKNOWN:
                starts, places = self._runs(granule)
                if len(starts) == 1:
                    place = places[0]
                else:
                    place = _MIXED
                    self._remember(granule, (starts, places))
                self._map[granule] = place
            return place

    def _remember(self, granule: int, runs: "tuple[array[int], array[int]]") -> None:
        self._cached_runs += len(runs[0])
        self._mixed[granule] = runs
        while self._cached_runs > _CACHED_RUNS and len(self._mixed) > 1:
            self._forget(next(iter(self._mixed)))

    def _forget(self, granule: int) -> None:
        runs = self._mixed.pop(granule, None)
        if runs is not None:
            self._cached_runs -= len(runs[0])

    def _runs(self, granule: int) -> "tuple[array[int], array[int]]":
        """Return the runs of a granule: where each begins, in bytes from its start, and its place."""
        sectors = self._sectors
        start = granule * self._granule
        found: list[tuple[int, int, int]] = []
        missing = (1 << sectors) - 1
        for number, level in enumerate(self._levels, 1):
            answer = level.find(start, sectors)
            if answer is None:
                continue
            taken = answer[1] & missing
            if not taken:
                continue
            base = answer[0] + number
            if taken == missing == (1 << sectors) - 1 and not self._ends_oddly(number, start):
                return array("I", (0,)), array("q", (base,))
            found += [
                (first * SECTOR, last * SECTOR, base + first * SECTOR)
                for first, last in bit_runs(taken, sectors)
            ]
            missing ^= taken
            if not missing:
                break
        if not found:
            return array("I", (0,)), array("q", (_HOLE,))
        found.sort()
        starts, places = array("I"), array("q")
        position = 0
        for first, last, place in found:
            if first > position:
                starts.append(position)
                places.append(_HOLE)
            starts.append(first)
            places.append(place)
            position = last
            if place & _LEVEL == self._flat_level and start + last > self._flat_size:
                position = self._flat_size - start  # a raw parent may end within a sector
        if position < self._granule:
            starts.append(position)
            places.append(_HOLE)
        return starts, places

    def _ends_oddly(self, number: int, start: int) -> bool:
        return number == self._flat_level and start + self._granule > self._flat_size

    def _joined(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        current, begin, size = -1, 0, 0
        for level, position, piece in self._pieces(offset, length):
            if level == current and (not level or position == begin + size):
                size += piece
                continue
            if size:
                yield FileRange(self._fds[current], begin, size) if current else Hole(size)
            current, begin, size = level, position, piece
        if size:
            yield FileRange(self._fds[current], begin, size) if current else Hole(size)

    def _kinds(self, offset: int, length: int) -> Iterator[tuple[int, int, ExtentKind]]:
        runs = self._runs_of_data
        if not self.read_only:
            runs = [*runs[:1], DataRun(), *runs[2:]]  # in the leaf there are new holes now and then
        for level, position, size in self._pieces(offset, length):
            if level:
                hole = ExtentKind.HOLE if level == self._flat_level else ExtentKind.ZERO
                yield from file_extents(self._fds[level], position, size, offset, hole, run=runs[level])
            else:
                yield offset, size, ExtentKind.HOLE
            offset += size

    # Writing

    def _writing(self) -> LeafWriter:
        check_writable(self.read_only)
        assert self._writer is not None
        return self._writer

    def _blocks(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut a range at the leaf's blocks: (block, offset within it, bytes before this part, length)."""
        block_size = self._leaf.block_size
        done = 0
        while done < length:
            within = (offset + done) % block_size
            size = min(length - done, block_size - within)
            yield (offset + done) // block_size, within, done, size
            done += size

    def _write(self, writer: LeafWriter, block: int, within: int, data: Buffer) -> None:
        """Write whole sectors inside one block."""
        if writer.write(block, within, data):
            return
        with self._lock:
            writer.set_written(block, within, len(data))
            self._place_block(writer, block)
        writer.relieve()

    def _write_edges(self, writer: LeafWriter, data: memoryview, offset: int) -> None:
        """Write bytes that do not fill their first or last sector: read, change and write those sectors.

        One at a time: two requests for different bytes of one sector must not undo each other.
        """
        stop = offset + len(data)
        with self._edge_lock:
            position = offset
            while position < stop:
                start = position // SECTOR * SECTOR
                if position == start and stop - position >= SECTOR:
                    end = stop // SECTOR * SECTOR
                    for block, within, done, size in self._blocks(position, end - position):
                        at = position - offset + done
                        self._write(writer, block, within, data[at : at + size])
                else:
                    end = min(start + SECTOR, stop)
                    sector = bytearray(SECTOR)
                    self.pread_into(sector, start)
                    sector[position - start : end - start] = data[position - offset : end - offset]
                    block_size = self._leaf.block_size
                    self._write(writer, start // block_size, start % block_size, sector)
                position = end

    def _place_block(self, writer: LeafWriter, block: int) -> None:
        """Bring the map up to date after a write into a block of the leaf; the lock is held."""
        block_size = self._leaf.block_size
        first = block * block_size >> self._shift
        last = min(first + (block_size >> self._shift), len(self._map))
        offset = writer.data_offset(block)
        if writer.is_full(block) and offset is not None:
            for granule in range(first, last):
                self._map[granule] = offset + (granule - first) * self._granule + 1
        else:
            for granule in range(first, last):
                self._map[granule] = _UNKNOWN
        if self._mixed:
            for granule in range(first, last):
                self._forget(granule)

    def _stored_below(self, start: int, stop: int) -> bool:
        """Return whether a parent has anything but holes in a range of whole sectors."""
        for granule in range(start >> self._shift, -(-stop // self._granule)):
            base = granule * self._granule
            first = max(start - base, 0) // SECTOR
            last = min(stop - base, self._granule) // SECTOR
            wanted = (1 << (self._sectors - first)) - (1 << (self._sectors - last))
            for number, level in enumerate(self._levels[1:], 2):
                answer = level.find(base, self._sectors)
                if answer is None or not answer[1] & wanted:
                    continue
                if number != self._flat_level:
                    return True
                end = min(base + last * SECTOR, self._flat_size)
                if next_data(self._fds[number], base + first * SECTOR, end) < end:
                    return True
        return False
