"""Where the bytes of a chain of VHD files lie: a compact map of the virtual disk.

The disk is cut into granules, the smallest block size of the chain. Each granule has one place: not looked up
yet, a hole, the file and offset where all of it lies, or mixed. Places are found on first use, by merging the
sector bitmaps from the leaf down; the runs of mixed granules are kept in a cache of bounded size.

The traps: a place is one integer, so that a reader never pairs a file with the offset of another; it is
stored under the lock, so that a slow reader never overwrites what a writer has put there since. Look-ups
take no lock.
"""

import mmap
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from gateway.images.errors import UnsupportedImage
from gateway.images.vhd.bits import bit_runs
from gateway.images.vhd.format import BLOCK_SIZE, SECTOR, DiskType
from gateway.images.vhd.image import MAX_BLOCKS, VhdFile
from gateway.images.vhd.levels import FlatLevel, Level, ReadLevel, SparseLevel, WrittenLeaf
from gateway.images.vhd.writer import LeafWriter

# Places: the offset in the file, a multiple of 512, plus the number of the level, which begins at 1.
LEVEL: Final = 511
OFFSET: Final = ~511
_UNKNOWN: Final = 0
_HOLE: Final = -1
_MIXED: Final = -2

_WORTH_SKIPPING: Final = 8  # granules; a shorter rest of a range is looked up one by one

_CACHED_RUNS: Final = 1 << 20  # of mixed granules: 12 bytes each


class BlockMap:
    """The map of [leaf … root], level 1 being the leaf; `raw_root` is the (descriptor, path) of a raw root.

    `writer` is the leaf's if it is written to, and shares `lock`, which guards what changes here. Raises
    ImageError: a BAT cannot be read, or the chain's blocks are too small for its size.
    """

    def __init__(
        self,
        images: Sequence[VhdFile],
        raw_root: tuple[int, str] | None,
        lock: threading.Lock,
        writer: LeafWriter | None,
    ) -> None:
        leaf = images[0]
        self._lock = lock
        self._writer = writer
        self._block_size = leaf.block_size
        self.flat_level = 0
        self._flat_size = 0
        levels: list[ReadLevel] = []
        visible = leaf.size  # a small node hides what its parents have beyond its end
        for image in images:
            visible = min(visible, image.size)
            if image.footer.disk_type is DiskType.FIXED:
                self._add_flat(levels, image.fd, visible)
            else:
                levels.append(SparseLevel(image, visible))
        if raw_root is not None:
            self._add_flat(levels, raw_root[0], min(visible, os.fstat(raw_root[0]).st_size))
        self._below = levels[1:]
        self._levels: list[Level] = [
            levels[0] if writer is None else WrittenLeaf(writer, leaf),
            *self._below,
        ]
        self._sparse = self._levels[: self.flat_level - 1] if self.flat_level else self._levels

        self.granule: Final = min(
            (image.block_size for image in images if image.header is not None), default=BLOCK_SIZE
        )
        granules = max(1, -(-leaf.size // self.granule))
        if granules > MAX_BLOCKS:
            raise UnsupportedImage(
                leaf.path,
                f"a disk of {leaf.size} bytes has too many blocks of {self.granule} bytes, the smallest size"
                " in its chain; copy it with the program that made it",
            )
        self.shift: Final = self.granule.bit_length() - 1
        self.within: Final = self.granule - 1
        self._sectors = self.granule // SECTOR
        self._skippable = _WORTH_SKIPPING * self.granule
        # Anonymous memory: pages that were never touched cost nothing, whatever the size of the disk.
        self.places: Final = memoryview(mmap.mmap(-1, 8 * granules)).cast("q")
        self._mixed: dict[int, tuple[array[int], array[int]]] = {}
        self._cached_runs = 0

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (level or 0 for zeroes, file offset, length) for a range."""
        ahead = [0] * len(self._levels)
        while length > 0:
            granule = offset >> self.shift
            within = offset & self.within
            size = min(length, self.granule - within)
            place = self.places[granule] or self._find(granule)
            if place > 0:
                level = place & LEVEL
                if level == self.flat_level and length - size > self._skippable:
                    size += self._bare(offset + size, min(length, self._flat_size - offset) - size, ahead)
                yield level, (place & OFFSET) + within, size
            elif place == _HOLE:
                if length - size > self._skippable:
                    size += self._bare(offset + size, length - size, ahead)
                yield 0, 0, size
            else:
                yield from self._mixed_pieces(granule, within, size)
            offset += size
            length -= size

    def known_pieces(self, offset: int, length: int, most: int) -> list[tuple[int, int, int]] | None:
        """What `pieces` yields; None if a file had to be looked into for it, or there are more than `most`.

        Takes no lock, so that it never waits for who looks into a file just now.
        """
        found: list[tuple[int, int, int]] = []
        while length > 0:
            granule = offset >> self.shift
            within = offset & self.within
            size = min(length, self.granule - within)
            place = self.places[granule]
            if place > 0:
                found.append((place & LEVEL, (place & OFFSET) + within, size))
            elif place == _HOLE:
                found.append((0, 0, size))
            else:
                runs = self._mixed.get(granule)
                if runs is None:
                    return None
                found += islice(self._cut(runs, within, size), most + 1)
            if len(found) > most:
                return None
            offset += size
            length -= size
        return found

    def stored_blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (block of the leaf, offset within it, length) for what any file may have of a range.

        What was yielded may be written to meanwhile.
        """
        ahead = [0] * len(self._levels)
        while (found := _next_stored(self._levels, start, stop, ahead)) < stop:
            block = found // self._block_size
            within = max(start - block * self._block_size, 0)
            start = block * self._block_size + within
            size = min(stop - start, self._block_size - within)
            yield block, within, size
            start += size

    def stored_below(self, start: int, stop: int) -> bool:
        """Return whether a parent has anything but holes in a range of whole sectors."""
        return any(level.stores(start, stop) for level in self._below)

    def renew(self, block: int) -> None:
        """Correct the places of one of the leaf's blocks that was written to; the lock is held."""
        assert self._writer is not None
        first = block * self._block_size >> self.shift
        last = min(first + (self._block_size >> self.shift), len(self.places))
        offset = self._writer.data_offset(block)
        if self._writer.is_full(block) and offset is not None:
            for granule in range(first, last):
                self.places[granule] = offset + (granule - first) * self.granule + 1
        else:
            for granule in range(first, last):
                self.places[granule] = _UNKNOWN
        if self._mixed:
            for granule in range(first, last):
                self._forget(granule)

    def _add_flat(self, levels: list[ReadLevel], fd: int, size: int) -> None:
        levels.append(FlatLevel(fd, size))
        self.flat_level = len(levels)
        self._flat_size = size

    def _bare(self, start: int, length: int, ahead: list[int]) -> int:
        """Return for how many of `length` bytes no VHD with blocks has one: what is below shows.

        `start` is the first byte of a granule, and so is the end unless it is that of the range.
        """
        if length <= 0:
            return 0
        return _next_stored(self._sparse, start, start + length, ahead) - start

    def _mixed_pieces(self, granule: int, within: int, length: int) -> Iterator[tuple[int, int, int]]:
        runs = self._mixed.get(granule)
        if runs is None:  # others took its place in the cache
            with self._lock:
                runs = self._mixed.get(granule) or self._runs(granule)
                if self.places[granule] == _MIXED and granule not in self._mixed:
                    self._remember(granule, runs)
        return self._cut(runs, within, length)

    def _cut(
        self, runs: "tuple[array[int], array[int]]", within: int, length: int
    ) -> Iterator[tuple[int, int, int]]:
        """Yield the pieces of a part of a mixed granule, whose runs these are."""
        starts, places = runs
        index = bisect_right(starts, within) - 1
        stop = within + length
        while within < stop:
            end = starts[index + 1] if index + 1 < len(starts) else self.granule
            size = min(end, stop) - within
            place = places[index]
            if place > 0:
                yield place & LEVEL, (place & OFFSET) + within - starts[index], size
            else:
                yield 0, 0, size
            within += size
            index += 1

    def _find(self, granule: int) -> int:
        """Look a granule up in the files and remember its place."""
        with self._lock:
            place = self.places[granule]
            if place == _UNKNOWN:
                starts, places = self._runs(granule)
                if len(starts) == 1:
                    place = places[0]
                else:
                    place = _MIXED
                    self._remember(granule, (starts, places))
                self.places[granule] = place
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
        start = granule * self.granule
        found: list[tuple[int, int, int]] = []
        rest: int | None = None  # the place of what no run has: the last file's, or nobody's
        missing = (1 << sectors) - 1
        for number, level in enumerate(self._levels, 1):
            answer = level.find(start, sectors)
            if answer is None:
                continue
            taken = answer[1] & missing
            if not taken:
                continue
            base = answer[0] + number
            if taken == missing and not self._ends_oddly(number, start):
                rest = base
                break
            found += [
                (first * SECTOR, last * SECTOR, base + first * SECTOR)
                for first, last in bit_runs(taken, sectors)
            ]
            missing ^= taken
            if not missing:
                break
        if not found:
            return array("I", (0,)), array("q", (_HOLE if rest is None else rest,))
        found.sort()
        starts, places = list[int](), list[int]()
        position = 0
        for first, last, place in found:
            if first > position:
                starts.append(position)
                places.append(_HOLE if rest is None else rest + position)
            starts.append(first)
            places.append(place)
            position = last
            if place & LEVEL == self.flat_level and start + last > self._flat_size:
                position = self._flat_size - start  # a raw parent may end within a sector
        if position < self.granule:
            starts.append(position)
            places.append(_HOLE if rest is None else rest + position)
        return array("I", starts), array("q", places)

    def _ends_oddly(self, number: int, start: int) -> bool:
        return number == self.flat_level and start + self.granule > self._flat_size


def _next_stored(levels: Sequence[Level], start: int, stop: int, ahead: list[int]) -> int:
    """Return the first offset in [start, stop) that any of the levels may have, or `stop`.

    `ahead` keeps how far each level is known to have nothing.
    """
    for number, level in enumerate(levels):
        if ahead[number] <= start:
            ahead[number] = level.next_stored(start)
        stop = min(stop, ahead[number])
        if stop <= start:
            break
    return stop
