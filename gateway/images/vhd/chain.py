"""A disk made of a chain of VHD files: a leaf over any number of parents.

The block map tells where bytes lie; a request inside one of its granules is two look-ups and one preadv. What
is written goes into the leaf, at once, and the map learns of it.

The traps: a write takes the map's lock after its data is in the file, so that no reader is led to what isn't
there yet; nobody may close a disk while a request of another thread runs; and a change in which memory ran
out may be known to the map or the writer in part, so it is the last one.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from os import RWF_NOWAIT, preadv
from typing import Final

from gateway.images.at_hand import AtHand, how_at_hand
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
from gateway.images.files import FILES, ZEROES, Buffer, FileCalls, close_all
from gateway.images.raw import DataRun, file_extents, not_at_hand, read_range
from gateway.images.vhd.block_map import LEVEL, OFFSET, BlockMap
from gateway.images.vhd.format import SECTOR
from gateway.images.vhd.image import VhdFile
from gateway.images.vhd.short_runs import FEW, clear, read_short_runs
from gateway.images.vhd.turns import Turns
from gateway.images.vhd.writer import LeafWriter

_MOST_AT_HAND: Final = 64  # pieces; to read more of them takes so long that it is waiting


class VhdChain:
    """A `Disk` over [leaf … root]; owns the descriptors.

    `raw_root` is the (descriptor, path) of a raw root. Raises ImageError when a BAT cannot be read, the leaf
    cannot be written to, or a parent's blocks are too small for a disk of that size.
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
        self._turns = Turns()
        self._writer: LeafWriter | None = None
        if not read_only:
            self._writer = LeafWriter(leaf, self._lock, files=files, published=published)
        self._map = BlockMap(images, raw_root, self._lock, self._writer)
        self._fds = [-1, *(image.fd for image in images)]
        self._paths = ["", *(image.path for image in images)]
        if raw_root is not None:
            self._fds.append(raw_root[0])
            self._paths.append(raw_root[1])
        self._runs_of_data = [DataRun() for _ in self._fds]
        self._at_hand: AtHand | None = None
        self._closed = False

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        """Fill `buf` with the bytes at `offset`."""
        check_range(offset, len(buf), self.size)
        self._read_pieces(buf, offset)

    def reader(self, *, nowait: bool = False) -> Reader:
        """Return `pread_into` for who knows that a range lies on the disk; see FileDisk.

        It has at hand what a request inside one granule needs. The disk doesn't keep it: a circle of
        references would keep closed disks in memory.
        """
        places, fds = self._map.places, self._fds
        pieces = self._read_at_hand if nowait else self._read_pieces
        shift, mask, granule = self._map.shift, self._map.within, self._map.granule
        flags = RWF_NOWAIT if nowait else 0

        def read(buf: bytearray | memoryview, offset: int) -> None:
            length = len(buf)
            within = offset & mask
            if 0 < length <= granule - within:
                place = places[offset >> shift]
                if (
                    place > 0
                    and preadv(fds[place & LEVEL], (buf,), (place & OFFSET) + within, flags) == length
                ):
                    return
            pieces(buf, offset)

        return read

    def pwrite(self, buf: Buffer, offset: int) -> None:
        """Write `buf` at `offset`. Durable only after `flush`."""
        writer = self._writing()
        length = len(buf)
        check_range(offset, length, self.size)
        block_size = self._leaf.block_size
        try:
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
        except MemoryError:
            writer.give_up()
            raise

    def zero(self, offset: int, length: int, *, trim: bool) -> None:
        """Make a range read as zeroes.

        With `trim`, blocks that nobody has stay that way, stored sectors become holes of the file, and only
        what would show a parent's data is hidden by a block of its own. Without it zeroes are written.
        """
        writer = self._writing()
        check_range(offset, length, self.size)
        try:
            self._zero(writer, offset, offset + length, trim)
        except MemoryError:
            writer.give_up()
            raise

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
            close_all(descriptors)

    # Reading

    def _read_pieces(self, buf: bytearray | memoryview, offset: int) -> None:
        view = memoryview(buf)
        pieces: Iterable[tuple[int, int, int]] = self._map.pieces(offset, len(view))
        if (offset & self._map.within) + len(view) <= self._map.granule:
            pieces = list(pieces)
            if len(pieces) > FEW and self._read_short_runs(view, pieces):
                return
        done = 0
        for level, position, size in pieces:
            part = view[done : done + size]
            if level:
                read_range(self._fds[level], part, position, self._paths[level])
            else:
                clear(part)
            done += size

    def _read_short_runs(self, view: memoryview, pieces: Sequence[tuple[int, int, int]]) -> bool:
        try:
            if self._at_hand is None:
                self._at_hand = how_at_hand(self._leaf.fd)  # the files of a chain lie in one directory
            return read_short_runs(view, pieces, self._fds, self._at_hand)
        except OSError:
            return False  # perhaps of what nobody has asked for: one by one it shows

    def _read_at_hand(self, buf: bytearray | memoryview, offset: int) -> None:
        view = memoryview(buf)
        pieces = self._map.known_pieces(offset, len(view), _MOST_AT_HAND)
        if pieces is None:
            raise not_at_hand()
        done = 0
        for level, position, size in pieces:
            part = view[done : done + size]
            if not level:
                clear(part)
            elif preadv(self._fds[level], (part,), position, RWF_NOWAIT) != size:
                raise not_at_hand()
            done += size

    def _joined(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        current, begin, size = -1, 0, 0
        for level, position, piece in self._map.pieces(offset, length):
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
        for level, position, size in self._map.pieces(offset, length):
            if level:
                hole = ExtentKind.HOLE if level == self._map.flat_level else ExtentKind.ZERO
                yield from file_extents(self._fds[level], position, size, offset, hole, run=runs[level])
            else:
                yield offset, size, ExtentKind.HOLE
            offset += size

    # Writing

    def _writing(self) -> LeafWriter:
        check_writable(self.read_only)
        assert self._writer is not None
        self._writer.check()
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
        turn = self._turns.enter()
        try:
            if writer.write(block, within, data):
                return
            self._note_written(writer, block, within, len(data))
        finally:
            self._turns.leave(turn)
        writer.relieve()

    def _zero(self, writer: LeafWriter, offset: int, stop: int, trim: bool) -> None:
        first = min(-(-offset // SECTOR) * SECTOR, stop)
        last = max(stop // SECTOR * SECTOR, first)
        for edge, size in ((offset, first - offset), (last, stop - last)):
            if size:
                self._write_edges(writer, ZEROES[:size], edge)
        if trim:
            self._trim(writer, first, last)
            return
        for block, within, _, size in self._blocks(first, last - first):
            for start in range(0, size, len(ZEROES)):
                self._write(writer, block, within + start, ZEROES[: size - start])

    def _note_written(self, writer: LeafWriter, block: int, within: int, length: int) -> None:
        with self._lock:
            writer.set_written(block, within, length)
            self._map.renew(block)

    def _trim(self, writer: LeafWriter, start: int, stop: int) -> None:
        """Make whole sectors holes; what no file of the chain has is passed over."""
        for block, within, size in self._map.stored_blocks(start, stop):
            first = block * self._leaf.block_size + within
            hide = self._map.stored_below(first, first + size)
            turn = self._turns.enter()
            try:
                punched = writer.punch(block, within, size, allocate=hide)
                if punched:
                    with self._lock:
                        if hide:
                            writer.set_written(block, within, size)
                        self._map.renew(block)
            finally:
                self._turns.leave(turn)
            if punched:
                writer.relieve()

    def _write_edges(self, writer: LeafWriter, data: memoryview, offset: int) -> None:
        """Write bytes that do not fill their first or last sector.

        Those sectors are read, changed and written, by one request at a time and while nobody else writes:
        requests must not undo each other's bytes.
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
                    self._write_in_sector(writer, position, data[position - offset : end - offset])
                position = end

    def _write_in_sector(self, writer: LeafWriter, offset: int, data: memoryview) -> None:
        start = offset // SECTOR * SECTOR
        sector = bytearray(SECTOR)
        with self._turns.alone():
            self.pread_into(sector, start)
            sector[offset - start : offset - start + len(data)] = data
            block, within = divmod(start, self._leaf.block_size)
            if writer.write(block, within, sector):
                return
            self._note_written(writer, block, within, SECTOR)
        writer.relieve()
