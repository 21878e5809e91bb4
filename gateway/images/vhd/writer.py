"""Growing the leaf of a chain in place, so that whoever opens the file after a crash finds a whole image.

The order is everything. A file grows by writing its footer at a new end, far enough away for several blocks,
and only then are blocks placed before it. Data is written at once. Sector bitmaps and BAT entries stay in
memory until a flush: data is synced first, then bitmaps and BAT entries are written, then synced. So a BAT
entry on disk always points inside the file, and a set bit at data that is there; what a crash can take is
only what no flush has promised. Closing cuts the file to its end.

Before the first write the BAT is checked as a whole: where blocks overlap, a write would destroy data.
The traps: the old footer lies where a bitmap may come to lie, so it is cleared; a sync that failed once
must never be followed by one that succeeds. Nor may one follow a change in which memory ran out: it may be
known here in part.
"""

import errno
import os
import sys
import threading
from array import array
from bisect import bisect_left
from itertools import pairwise
from typing import Final

from gateway.images.errors import CorruptImage, ImageTooLarge, UnsupportedImage
from gateway.images.files import FILES, Buffer, FileCalls, pread_exactly
from gateway.images.vhd.bits import set_bits
from gateway.images.vhd.format import (
    SECTOR,
    TAP_LITTLE_ENDIAN_BITMAPS,
    UNUSED,
    BatmapHeader,
    round_up_to_sector,
)
from gateway.images.vhd.image import VhdFile
from gateway.images.vhd.table import next_used

_ALIGNMENT: Final = 4096  # of a block's data, as blktap has it: copies by reflink need it
_GROWTH: Final = 64 << 20
_LARGEST_GROWTH: Final = 1 << 30  # each growth of a published file costs a sync, so it grows with the file
_NO_MEMORY: Final = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))  # to make one then would need some
_UNSAVED_BLOCKS: Final = 4096  # then bitmaps and BAT entries are written without being asked


class LeafWriter:
    """Owns the allocation of one leaf. `lock` guards everything in memory; the chain shares it.

    `published` is False for a file that nobody will look at if we crash: the order of writes on the disk is
    then of no importance. Raises CorruptImage or UnsupportedImage for images that cannot be written to.
    """

    def __init__(
        self, image: VhdFile, lock: threading.Lock, *, files: FileCalls = FILES, published: bool = True
    ) -> None:
        if image.footer_offset is None:
            raise CorruptImage(image.path, "the footer at its end is damaged; repair it before writing to it")
        if image.footer.made_by_tap and image.footer.creator_version == TAP_LITTLE_ENDIAN_BITMAPS:
            raise UnsupportedImage(image.path, "images of tapdisk 0.1 can be read, but not written to")
        self._image = image
        self._fd = image.fd
        self._files = files
        self._published = published
        self._lock = lock
        self._flush_lock = threading.Lock()
        self._bat = image.bat  # with the entries to come
        self._full_bitmap = b"\xff" * image.bitmap_bytes
        self._full = bytearray(image.blocks)  # 1: known to have every sector
        self._bitmaps: dict[int, bytes | bytearray] = {}
        self._changed_bitmaps: set[int] = set()
        self._changed_entries: set[int] = set()
        self._data_written = False
        self._failed: OSError | None = None
        self._checked = False
        self._footer = image.footer.pack()
        self._footer_at = image.footer_offset
        self._end = image.footer_offset  # of the last block or of the metadata
        self._unused = 0
        self._growing = False

    # What the map asks

    def data_offset(self, block: int) -> int | None:
        """Return where a block's data begins, written to disk or not."""
        if self._checked:
            entry = self._bat[block]
            return None if entry == UNUSED else entry * SECTOR + self._image.bitmap_size
        offset = self._image.block_offset(block)
        return None if offset is None else offset + self._image.bitmap_size

    def bitmap(self, block: int) -> Buffer:
        """Return the sector bitmap of an allocated block; the lock is held."""
        if self._full[block]:
            return self._full_bitmap
        bitmap = self._bitmaps.get(block)
        if bitmap is None:
            bitmap = self._image.read_bitmap(self._bat[block] * SECTOR)
            if bitmap == self._full_bitmap:
                self._full[block] = 1
        return bitmap

    def is_full(self, block: int) -> bool:
        """Return whether every sector of a block is known to be in the leaf."""
        return bool(self._full[block])

    def next_used(self, block: int) -> int:
        """Return the first allocated block from `block` on, written to disk or not; or their number."""
        return next_used(self._bat, block)

    # What a merge does

    def expect(self, blocks: int) -> None:
        """Make the file long enough for so many new blocks: growing for each few of them costs syncs."""
        with self._lock:
            self._check()
            blocks = min(blocks, self._unused)
            if blocks <= 0:
                return
            self._prepare_growth()
            image = self._image
            stop = self._end + blocks * round_up_to_sector(image.bitmap_size + image.block_size + _ALIGNMENT)
            if stop > self._footer_at:
                self._grow(stop)

    def copy_in(self, block: int, within: int, source_fd: int, source_offset: int, length: int) -> None:
        """Copy whole sectors of another file into a block, allocating it; holes replace what was there."""
        with self._lock:
            offset, _ = self._allocated(block)
        self._files.copy_range(source_fd, source_offset, self._fd, offset + within, length)
        with self._lock:
            self.set_written(block, within, length)

    # What the chain does

    def write(self, block: int, within: int, data: Buffer) -> bool:
        """Write whole sectors into a block, allocating it.

        Returns False when the sectors may be new to the block: the caller then takes the lock, calls
        `set_written` and corrects its map.
        """
        if self._full[block] and self._checked:
            offset = self._bat[block] * SECTOR + self._image.bitmap_size
            self._files.pwrite(self._fd, data, offset + within)
            self._data_written = True  # only now: a flush that runs meanwhile must not count it as its own
            return True
        with self._lock:
            offset, _ = self._allocated(block)
        self._files.pwrite(self._fd, data, offset + within)
        return False

    def punch(self, block: int, within: int, length: int, *, allocate: bool) -> bool:
        """Make whole sectors of a block's data a hole; False if there is no block and none is wanted."""
        with self._lock:
            self._check()
            if self._bat[block] == UNUSED and not allocate:
                return False
            offset, is_new = self._allocated(block)
        if not is_new:
            self._files.punch(self._fd, offset + within, length)
        self._data_written = True
        return True

    def set_written(self, block: int, within: int, length: int) -> None:
        """Note that these sectors are now in the leaf; the lock is held."""
        self._data_written = True
        if self._full[block]:
            return
        bitmap = self._bitmaps.get(block)
        if not isinstance(bitmap, bytearray):
            bitmap = bytearray(self.bitmap(block))
            self._bitmaps[block] = bitmap
        set_bits(bitmap, within // SECTOR, (within + length) // SECTOR)
        self._changed_bitmaps.add(block)
        if bitmap == self._full_bitmap:
            self._bitmaps[block] = self._full_bitmap
            self._full[block] = 1

    def relieve(self, *, ordered: bool = True) -> None:
        """Write the metadata when much of it has gathered.

        Not `ordered`, no sync puts the data before it: for who knows that nobody reads these sectors from
        this file until the next flush.
        """
        if len(self._changed_bitmaps) >= _UNSAVED_BLOCKS:
            self._save(sync=self._published and ordered)

    def flush(self) -> None:
        """Make every completed write durable. Fails for good once a sync has failed."""
        self._save(sync=True)

    def give_up(self) -> None:
        """Memory ran out in a change: promise nothing of what came since the last flush; no other follows."""
        self._failed = self._failed or _NO_MEMORY

    def check(self) -> None:
        """Raise OSError if no flush will succeed any more."""
        if self._failed is not None:
            raise OSError(
                self._failed.errno,
                f"{self._image.path}: an earlier write or sync failed: {self._failed.strerror}",
            )

    def finish(self) -> None:
        """Flush, and put the footer where the last block ends.

        On a full disk there may be no room for it there; then it stays where it is, as good as before, and
        whoever writes to the image next moves it.
        """
        self.flush()
        if not self._growing:
            return
        try:
            self._cut()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self._failed is not None:
                raise
            return
        self._sync()

    # Allocation; the lock is held

    def _check(self) -> None:
        """Look at the whole BAT once before the first write."""
        if self._checked:
            return
        image = self._image
        whole = (image.bitmap_size + image.block_size) // SECTOR
        in_use = sorted(entry for entry in self._bat if entry != UNUSED)
        last_block = self._bat[-1] if image.blocks else UNUSED  # may be cut off where the disk ends
        cut_off = whole - (image.blocks * image.block_size - image.size) // SECTOR
        for entry, following in pairwise(in_use):
            if following - entry < (cut_off if entry == last_block else whole):
                one, other = self._bat.index(entry), self._bat.index(following)
                raise CorruptImage(image.path, f"block {one} and block {other} overlap")
        ends = [stop for _, stop in image.metadata]
        if in_use:
            image.block_offset(self._bat.index(in_use[-1]))  # raises when it is beyond the end
            ends.append((in_use[-1] + whole) * SECTOR)
        for first, last in image.metadata:
            near = bisect_left(in_use, first // SECTOR - whole + 1)
            for entry in in_use[near : bisect_left(in_use, -(-last // SECTOR))]:
                image.block_offset(self._bat.index(entry))  # raises when it is in the metadata
        self._end = round_up_to_sector(max(ends))
        self._unused = image.blocks - len(in_use)
        self._checked = True

    def _allocated(self, block: int) -> tuple[int, bool]:
        """Return where the data of a block begins, and whether the block was allocated just now."""
        self._check()
        image = self._image
        entry = self._bat[block]
        if entry != UNUSED:
            return entry * SECTOR + image.bitmap_size, False
        self._prepare_growth()
        start = self._end + -(self._end + image.bitmap_size) % _ALIGNMENT
        stop = start + image.bitmap_size + image.block_size
        if stop // SECTOR >= UNUSED:
            raise ImageTooLarge(image.path, "the file has reached the 2 TiB that a VHD can address")
        if stop > self._footer_at:
            self._grow(stop)
        # The space of the bitmap is taken now, so that a full disk refuses this write and not a later flush.
        self._files.pwrite(self._fd, bytes(image.bitmap_size), start)
        self._end = stop
        self._unused -= 1
        self._bat[block] = start // SECTOR
        self._bitmaps[block] = bytearray(image.bitmap_bytes)
        self._changed_bitmaps.add(block)
        self._changed_entries.add(block)
        return start + image.bitmap_size, True

    def _prepare_growth(self) -> None:
        """Cut off what a crash may have left behind the last block: new blocks begin as zeroes."""
        if self._growing:
            return
        self._clear_false_batmap()
        if self._end < self._footer_at:
            self._cut()
        self._growing = True  # only now: after a failure the next block tries it again

    def _cut(self) -> None:
        self._files.pwrite(self._fd, self._footer, self._end)
        if self._published:
            self._sync()
        self._files.truncate(self._fd, self._end + SECTOR)
        self._footer_at = self._end

    def _grow(self, stop: int) -> None:
        """Put the footer behind `stop`, with room for more blocks but not for more than the disk has."""
        image = self._image
        block = round_up_to_sector(image.bitmap_size + image.block_size + _ALIGNMENT)
        growth = _GROWTH
        if self._published:
            growth = max(growth, min(self._footer_at // 4, _LARGEST_GROWTH))
        old = self._footer_at
        new = max(stop, min(old + growth, self._end + self._unused * block)) // SECTOR * SECTOR
        self._files.pwrite(self._fd, self._footer, new)
        if self._published:
            self._sync()  # or a crash could keep data and lose the only footer
        self._files.pwrite(self._fd, bytes(SECTOR), old)
        self._footer_at = new

    def _clear_false_batmap(self) -> None:
        """A batmap bit says that the bitmap of a block is full, which is untrue of a block yet to come."""
        image = self._image
        batmap = image.batmap
        if batmap is None:
            return
        length = min(-(-image.blocks // 8), batmap.map_sectors * SECTOR)
        bits = pread_exactly(self._fd, length, batmap.map_offset)
        if not any(bits):
            return
        if any(
            entry == UNUSED and bits[block >> 3] & (0x80 >> (block & 7))
            for block, entry in enumerate(self._bat)
            if block >> 3 < len(bits)
        ):
            assert image.header is not None
            cleared = BatmapHeader(batmap.map_offset, batmap.map_sectors, reserved=batmap.reserved)
            self._files.pwrite(self._fd, cleared.pack(), image.header.table_end)
            self._files.punch(self._fd, batmap.map_offset, batmap.map_sectors * SECTOR)

    # Metadata

    def _save(self, *, sync: bool) -> None:
        """Write bitmaps and BAT entries; with `sync` in the order that a crash at any point forgives."""
        with self._flush_lock:
            self.check()
            try:
                self._save_changes(sync)
            except OSError as error:
                self._failed = self._failed or error
                raise
            except MemoryError:
                self.give_up()
                raise

    def _save_changes(self, sync: bool) -> None:
        with self._lock:
            bitmaps = [
                (block, self._bat[block] * SECTOR, bytes(self._bitmaps[block]))
                for block in sorted(self._changed_bitmaps)
            ]
            entries = sorted(self._changed_entries)
            written = self._data_written
            self._changed_bitmaps = set()
            self._changed_entries = set()
            if written:  # else what a write without the lock notes just now would be forgotten
                self._data_written = False
        if not (bitmaps or written):
            return
        self._write_metadata(bitmaps, entries, sync)
        with self._lock:
            for block, _, _ in bitmaps:
                if block not in self._changed_bitmaps:
                    self._bitmaps.pop(block, None)
            if not sync:
                self._data_written = True

    def _sync(self) -> None:
        try:
            self._files.datasync(self._fd)
        except OSError as error:
            self._failed = error
            raise

    def _sync_all(self) -> None:
        """Sync, and fail with a growth, which has the lock: the kernel tells one of two of a lost page."""
        self._sync()
        with self._lock:
            self.check()

    def _write_metadata(self, bitmaps: list[tuple[int, int, bytes]], entries: list[int], sync: bool) -> None:
        if not bitmaps:
            if sync:
                self._sync_all()
            return
        if sync and self._published:
            self._sync_all()
        padding = bytes(self._image.bitmap_size - self._image.bitmap_bytes)
        for _, offset, bitmap in bitmaps:
            self._files.pwrite(self._fd, bitmap + padding, offset)
        assert self._image.header is not None
        table = self._image.header.table_offset
        for first, last in _runs(entries):
            values = array("I", self._bat[first:last])
            if sys.byteorder == "little":
                values.byteswap()
            self._files.pwrite(self._fd, values.tobytes(), table + 4 * first)
        if sync:
            self._sync_all()


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return sorted numbers as runs [first, last)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
