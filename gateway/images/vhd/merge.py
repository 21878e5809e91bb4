"""The sectors of a VHD written into the VHD that it stands on, in place.

While the child is there, it hides every sector that changes in the parent, and nobody reads the parent but
through it. So a merge may stop or crash between any two calls, and parent and child still give the same
bytes; it goes on from any block that a flush has covered. Only after `flush` may anybody read the parent
without the child. The trap: this holds while the child keeps all its sectors, and while the parent has
no other child.

Runs of sectors go from file to file (`copy_range`), so that whole blocks share their space where the file
system can, and holes stay holes but hide what the parent had. Short ones are read together.

The child goes away in the end, so the page cache forgets it on the way: a merge of terabytes must not drive
out what the machine's users need, and pages just freed are the quickest to get for the parent.
"""

import os
import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from gateway.images.errors import CorruptImage, ImageError, UnsupportedImage
from gateway.images.files import FILES, FileCalls, length_of, next_data
from gateway.images.raw import RawDisk, read_range
from gateway.images.vhd.bits import bit_runs
from gateway.images.vhd.format import SECTOR, UNUSED, DiskType
from gateway.images.vhd.image import VhdFile
from gateway.images.vhd.levels import clip
from gateway.images.vhd.writer import LeafWriter

_WRITE_BACK: Final = 64 << 20  # bytes
_LONG_RUN: Final = 64 << 10  # bytes: from here on a call of its own is cheaper than two copies
_LARGEST_READ: Final = 1 << 20
_PADDING: Final = 4096  # a block's data is aligned to this


class _Target(Protocol):
    """The parent, as the merge sees it. Offsets are those of the virtual disk; all are whole sectors."""

    def copy(self, offset: int, source_fd: int, source_offset: int, length: int) -> None:
        """Copy a range of another file."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        ...

    def relieve(self) -> None:
        """Write metadata when much of it has gathered."""
        ...

    def flush(self) -> None:
        """Make everything so far durable."""
        ...

    def finish(self) -> None:
        """Flush, and leave the file as it stays."""
        ...


class Merge:
    """The sectors of a VHD written into the VHD (dynamic, differencing or fixed) that it stands on.

    `parent.fd` is open for writing; both descriptors stay the caller's. `first_block` is where an earlier
    merge of the same two files stopped and was flushed. Raises ImageError: the parent is smaller than the
    child, or isn't its parent, or can't be written to.

    One thread works at a time; `position` and `done` may be read by all.
    """

    def __init__(
        self, child: VhdFile, parent: VhdFile, *, first_block: int = 0, files: FileCalls = FILES
    ) -> None:
        _check_pair(child, parent)
        self._child = child
        self._parent = parent
        self._files = files
        self._blocks = array("I", (block for block, entry in enumerate(child.bat) if entry != UNUSED))
        self._next = bisect_left(self._blocks, first_block)
        self._target: _Target = (
            _FixedTarget(parent, files) if parent.header is None else _SparseTarget(parent, files)
        )
        self._prepared = False
        self._whole_bitmap = b"\xff" * child.bitmap_bytes
        self._not_written_back = 0
        self._read: list[tuple[int, int]] = []  # ranges (start, stop) of the child's file since then

    @property
    def total(self) -> int:
        """Return the bytes of the blocks to merge in all."""
        return len(self._blocks) * self._child.block_size

    @property
    def done(self) -> int:
        """Return the bytes of the blocks that were merged, from the first block of the child on."""
        return self._next * self._child.block_size

    @property
    def position(self) -> int:
        """Return the next block of the child."""
        return self._blocks[self._next] if self._next < len(self._blocks) else self._child.blocks

    def copy_some(self, stop: Callable[[], bool]) -> bool:
        """Copy block by block until all is copied (True) or `stop` says so (False); it is asked before each.

        Raises CorruptImage, OSError; the parent is as good as before then.
        """
        while self._next < len(self._blocks):
            if stop():
                return False
            self._prepare()
            self._require_whole()
            self._copy_block(self._blocks[self._next])
            self._require_whole()
            self._target.relieve()
            self._next += 1
            if self._not_written_back >= _WRITE_BACK:
                self._write_back()
        return True

    def flush(self) -> None:
        """Make everything copied so far durable. Fails for good once it has failed."""
        self._target.flush()

    def finish(self) -> None:
        """Flush, and cut the parent to its end."""
        self._target.finish()

    def _prepare(self) -> None:
        """Let the file grow once: every growth on the way would wait for all data so far."""
        if self._prepared:
            return
        self._prepared = True
        if isinstance(self._target, _SparseTarget):
            new_blocks, _ = _blocks_below(self._child, self._parent, self._blocks[self._next :])
            self._target.writer.expect(new_blocks)

    def _copy_block(self, block: int) -> None:
        child = self._child
        place = child.block_offset(block)
        assert place is not None
        data = place + child.bitmap_size
        start = block * child.block_size
        bitmap = child.read_bitmap(place)
        self._note_read(place, data + child.block_size)
        if bitmap == self._whole_bitmap and start + child.block_size <= child.size:
            self._target.copy(start, child.fd, data, child.block_size)
            self._not_written_back += child.block_size
            return
        sectors = child.sectors_per_block
        mask = clip(int.from_bytes(bitmap, "big"), start, sectors, child.size)
        short: list[tuple[int, int]] = []
        for first, last in ((a * SECTOR, b * SECTOR) for a, b in bit_runs(mask, sectors)):
            self._not_written_back += last - first
            if last - first >= _LONG_RUN:
                self._target.copy(start + first, child.fd, data + first, last - first)
            else:
                short.append((first, last))
        for group in _groups(short):
            self._copy_short(group, start, data)

    def _require_whole(self) -> None:
        """Raise CorruptImage when the child has lost its end: what is not there was copied as zeroes."""
        if length_of(self._child.fd) < self._child.data_end:
            raise CorruptImage(self._child.path, "the file was cut shorter while it was open")

    def _copy_short(self, runs: list[tuple[int, int]], start: int, data: int) -> None:
        """Copy runs that lie close together in one block by one read."""
        child = self._child
        base, end = runs[0][0], runs[-1][1]
        if next_data(child.fd, data + base, data + end) == data + end:
            for first, last in runs:
                self._target.copy(start + first, child.fd, data + first, last - first)
            return
        view = memoryview(bytearray(end - base))
        read_range(child.fd, view, data + base, child.path)
        for first, last in runs:
            self._target.write(start + first, view[first - base : last - base])

    def _note_read(self, start: int, stop: int) -> None:
        """Note what was read of the child's file; blocks mostly lie there one after the other."""
        if self._read and 0 <= start - self._read[-1][1] <= _PADDING:
            start = self._read.pop()[0]
        self._read.append((start, stop))

    def _write_back(self) -> None:
        self._not_written_back = 0
        self._files.start_writeback(self._parent.fd, 0, 0)  # 0: up to the end of the file
        for start, stop in self._read:
            self._files.forget(self._child.fd, start, stop - start)
        self._read.clear()


def extra_space(child: VhdFile, parent: VhdFile) -> int:
    """Return how many bytes of the file system the parent may come to need, at most, by a merge.

    Blocks that the parent lacks count whole; where it has them, they may fill its holes. Space that files
    share and that a write separates isn't known. Raises ImageError as Merge does.
    """
    _check_pair(child, parent)
    used = array("I", (block for block, entry in enumerate(child.bat) if entry != UNUSED))
    stored = os.fstat(parent.fd).st_blocks * 512
    if parent.header is None:
        return min(len(used) * child.block_size, max(0, parent.size - stored))
    whole = parent.bitmap_size + parent.block_size
    new, common = _blocks_below(child, parent, used)
    holes = max(0, (len(parent.bat) - parent.bat.count(UNUSED)) * whole - stored)
    return new * (whole + _PADDING) + min(common * parent.block_size, holes)


def _blocks_below(child: VhdFile, parent: VhdFile, used: "array[int]") -> tuple[int, int]:
    """Return how many blocks of the parent lie below these blocks of the child: (not there yet, there)."""
    table = parent.bat
    ours, theirs = child.block_size, parent.block_size
    if ours == theirs:
        new = sum(1 for block in used if table[block] == UNUSED)
        return new, len(used) - new
    touched = {
        below
        for block in used
        for below in range(block * ours // theirs, -(-min((block + 1) * ours, child.size) // theirs))
    }
    new = sum(1 for block in touched if table[block] == UNUSED)
    return new, len(touched) - new


def _check_pair(child: VhdFile, parent: VhdFile) -> None:
    if child.header is None or child.footer.disk_type is not DiskType.DIFFERENCING:
        raise UnsupportedImage(child.path, "it stands on no other image")
    if child.header.parent_id != parent.unique_id:
        raise CorruptImage(child.path, f"{os.path.basename(parent.path)} is not its parent")
    if child.size > parent.size:
        raise ImageError(
            child.path, f"it has {child.size} bytes, more than its parent with {parent.size} bytes"
        )


def _groups(runs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Put runs of a block together that are worth reading together."""
    group: list[tuple[int, int]] = []
    for first, last in runs:
        if group and (first - group[-1][1] > _LONG_RUN or last - group[0][0] > _LARGEST_READ):
            yield group
            group = []
        group.append((first, last))
    if group:
        yield group


class _SparseTarget:
    """A dynamic or differencing parent."""

    def __init__(self, parent: VhdFile, files: FileCalls) -> None:
        self._lock = threading.Lock()
        self._block_size = parent.block_size
        self.writer = LeafWriter(parent, self._lock, files=files)

    def copy(self, offset: int, source_fd: int, source_offset: int, length: int) -> None:
        for block, within, done, size in self._blocks(offset, length):
            self.writer.copy_in(block, within, source_fd, source_offset + done, size)

    def write(self, offset: int, data: memoryview) -> None:
        for block, within, done, size in self._blocks(offset, len(data)):
            if not self.writer.write(block, within, data[done : done + size]):
                with self._lock:
                    self.writer.set_written(block, within, size)

    def relieve(self) -> None:
        self.writer.relieve(ordered=False)  # the child hides all of it

    def flush(self) -> None:
        self.writer.flush()

    def finish(self) -> None:
        self.writer.finish()

    def _blocks(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut a range at the blocks: (block, offset within it, bytes before this part, length)."""
        done = 0
        while done < length:
            block, within = divmod(offset + done, self._block_size)
            size = min(length - done, self._block_size - within)
            yield block, within, done, size
            done += size


class _FixedTarget:
    """A fixed parent: the disk's bytes, then the footer."""

    def __init__(self, parent: VhdFile, files: FileCalls) -> None:
        # Never closed: the descriptor is the caller's.
        self._disk = RawDisk(parent.fd, parent.size, read_only=False, path=parent.path, files=files)

    def copy(self, offset: int, source_fd: int, source_offset: int, length: int) -> None:
        self._disk.copy_in(offset, source_fd, source_offset, length)

    def write(self, offset: int, data: memoryview) -> None:
        self._disk.pwrite(data, offset)

    def relieve(self) -> None:
        """There is no metadata."""

    def flush(self) -> None:
        self._disk.flush()

    def finish(self) -> None:
        self.flush()
