"""Repairing what the checker finds, where that is possible without guessing.

Only what has a second copy, or can be counted anew, is repaired: footers from each other, bytes behind the
last footer, the batmap, the locators of a parent that is there. One repair gives something up and says so:
a block that is said to lie beyond the end of the file is lost already, and is marked unused.

Each step is synced before the next begins, and each leaves an image that is no worse than before. The one
write that could be torn is that of the header, two sectors that have no copy; it is done last. The trap: a
repair of a file in use would destroy it, so the file is locked as a writer locks it.
"""

import os
import struct
from dataclasses import replace
from typing import Final

from gateway.images.file_locks import FileUse, lock_file
from gateway.images.files import FILES, FileCalls, pread_exactly
from gateway.images.vhd.check_file import (
    batmap_checksum,
    check_open_vhd,
    earlier_footer,
    footer_at,
    lying_batmap_bits,
)
from gateway.images.vhd.check_parent import known_parent
from gateway.images.vhd.format import (
    FOOTER_SIZE,
    SECTOR,
    UNUSED,
    DiskType,
    Footer,
    round_up_to_sector,
)
from gateway.images.vhd.image import VhdFile, open_vhd
from gateway.images.vhd.locators import place_locators
from gateway.images.vhd.problems import CheckReport, ProblemKind

_LOCATOR_KINDS: Final = frozenset(
    {
        ProblemKind.PARENT_UNNAMED,
        ProblemKind.PARENT_MISSING,
        ProblemKind.PARENT_NAME_WRONG,
        ProblemKind.LOCATOR_MISSING,
        ProblemKind.LOCATOR_OUTSIDE,
        ProblemKind.LOCATOR_ABSOLUTE,
        ProblemKind.LOCATOR_WRONG,
    }
)
_BATMAP_KINDS: Final = frozenset({ProblemKind.BATMAP_DAMAGED, ProblemKind.BATMAP_WRONG})
_LOST_KINDS: Final = frozenset({ProblemKind.BLOCK_BEYOND_END, ProblemKind.BLOCK_CUT})
_FATAL_KINDS: Final = frozenset(
    {
        ProblemKind.BLOCK_IN_METADATA,
        ProblemKind.METADATA_OVERLAPS,
        ProblemKind.HEADER_WRONG,
        ProblemKind.UNSUPPORTED,
    }
)


def repair_vhd(path: str, files: FileCalls = FILES) -> CheckReport:
    """Repair what can be repaired of the VHD at `path`, durably, and check it again.

    The report holds what is still wrong and, in `repaired`, what was done. Raises FileInUse when anybody
    reads or writes the file, OSError.
    """
    fd = files.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        lock_file(fd, FileUse.WRITE, path)
        repair = _Repair(fd, path, files)
        repair.run()
        report = check_open_vhd(fd, path)
        return replace(report, repaired=tuple(repair.done))
    finally:
        files.close(fd)


class _Repair:
    def __init__(self, fd: int, path: str, files: FileCalls) -> None:
        self.fd = fd
        self.path = path
        self.files = files
        self.done: list[str] = []

    def run(self) -> None:
        kinds = self._repairable()
        if ProblemKind.FOOTER_NOT_AT_END in kinds and self._cut_behind_footer():
            kinds = self._repairable()
        if not kinds:
            return
        # Where a block lies over metadata, there is no knowing what a write to either would destroy.
        if kinds & _FATAL_KINDS:
            return
        if kinds & {ProblemKind.FOOTER_DAMAGED, ProblemKind.FOOTER_NOT_AT_END}:
            self._write_footer(open_vhd(self.fd, self.path))
        if kinds & {
            ProblemKind.FOOTER_COPY_DAMAGED,
            ProblemKind.FOOTERS_DIFFER,
            ProblemKind.FLAGS_DIFFER,
        }:
            self._write_copy(open_vhd(self.fd, self.path))
        if kinds & _LOST_KINDS:
            self._give_up_lost_blocks(open_vhd(self.fd, self.path))
        if kinds & _BATMAP_KINDS:
            self._write_batmap(open_vhd(self.fd, self.path))
        if kinds & _LOCATOR_KINDS:
            self._write_locators(open_vhd(self.fd, self.path))

    def _repairable(self) -> set[ProblemKind]:
        problems = check_open_vhd(self.fd, self.path).problems
        if not any(problem.repairable for problem in problems):
            return set()
        return {problem.kind for problem in problems}

    def _sync(self, done: str) -> None:
        self.files.datasync(self.fd)
        self.done.append(done)

    # Footers

    def _cut_behind_footer(self) -> bool:
        """Cut off what lies behind the only intact footer; False when the copy at 0 can serve."""
        copy = footer_at(self.fd, 0, self.path)
        if copy is not None and copy.disk_type is not DiskType.FIXED:
            return False
        size = os.fstat(self.fd).st_size
        found = earlier_footer(self.fd, size, self.path)
        if found is None:
            return False
        offset, footer = found
        if footer.disk_type is not DiskType.FIXED:
            # Nothing may be cut that a block needs: the copy is written first, and then counts.
            self.files.pwrite(self.fd, footer.pack(), 0)
            self._sync("wrote the copy of the footer at 0")
            return True
        self.files.truncate(self.fd, offset + FOOTER_SIZE)
        self._sync(f"cut {size - offset - FOOTER_SIZE} bytes off behind the footer at {offset}")
        return True

    def _write_footer(self, image: VhdFile) -> None:
        """Write the footer behind all that is in use, over a damaged one if nothing else is there."""
        size = os.fstat(self.fd).st_size
        offset = max(self._end_of_use(image), round_up_to_sector(size) - FOOTER_SIZE)
        self.files.pwrite(self.fd, image.footer.pack(), offset)
        self._sync(f"wrote the footer at {offset} from its copy")

    def _end_of_use(self, image: VhdFile) -> int:
        """Return where the last block or the metadata ends; of a block that was cut, what the file has."""
        end = max(stop for _, stop in image.metadata)
        size = os.fstat(self.fd).st_size
        whole = image.bitmap_size + image.block_size
        for block, entry in enumerate(image.bat):
            start = entry * SECTOR
            if entry == UNUSED or start >= size:
                continue
            # QEMU takes a file for cut short that lacks what the last block has beyond the end of the disk.
            beyond = max(0, (block + 1) * image.block_size - image.size)
            end = max(end, start + whole if start + whole - beyond <= size else size)
        return round_up_to_sector(end)

    def _write_copy(self, image: VhdFile) -> None:
        self.files.pwrite(self.fd, image.footer.pack(), 0)
        self._sync("wrote the copy of the footer at 0 from the footer")

    # Blocks

    def _give_up_lost_blocks(self, image: VhdFile) -> None:
        assert image.header is not None
        end = image.data_end
        lost: list[int] = []
        for block, entry in enumerate(image.bat):
            start = entry * SECTOR
            if entry == UNUSED:
                continue
            if start >= image.data_end:
                lost.append(block)
                continue
            end = max(end, start + image.bitmap_size + image.block_size)
        end = round_up_to_sector(end)
        if end > image.data_end:
            # The footer goes behind the cut block; where it was, the block reads as zeroes.
            self.files.pwrite(self.fd, image.footer.pack(), end)
            self._sync(f"wrote the footer at {end}, so that the cut block ends before it")
            self.files.pwrite(self.fd, bytes(min(FOOTER_SIZE, end - image.data_end)), image.data_end)
            self._sync(f"filled {end - image.data_end} lost bytes at {image.data_end} with zeroes")
        for block in lost:
            entry_offset = image.header.table_offset + 4 * block
            self.files.pwrite(self.fd, struct.pack(">I", UNUSED), entry_offset)
        if lost:
            shown = ", ".join(str(block) for block in lost[:20]) + (" ..." if len(lost) > 20 else "")
            self._sync(f"gave up the lost data of {len(lost)} blocks and marked them unused: {shown}")

    # The batmap

    def _write_batmap(self, image: VhdFile) -> None:
        assert image.header is not None
        header = image.batmap
        if header is None:
            return
        lies = list(lying_batmap_bits(image, header))
        for block in lies:
            offset = header.map_offset + block // 8
            byte = pread_exactly(self.fd, 1, offset)[0] & ~(0x80 >> block % 8)
            self.files.pwrite(self.fd, bytes((byte,)), offset)
        if lies:
            self._sync(f"cleared {len(lies)} wrong bits of the batmap")
        right = replace(header, map_checksum=batmap_checksum(self.fd, header))
        self.files.pwrite(self.fd, right.pack(), image.header.table_end)
        self._sync("wrote the batmap's checksum")

    # Locators

    def _write_locators(self, image: VhdFile) -> None:
        parent = known_parent(image)
        header = image.header
        if parent is None or header is None or image.footer_offset is None:
            return
        stored_name = parent.encode("utf-16-be")
        if len(stored_name) > SECTOR - 2:
            return
        locators, places = place_locators(image, header, parent)
        end = max(offset + len(data) for offset, data in places)
        if end > image.footer_offset:
            self._move_footer(image.footer, image.footer_offset, round_up_to_sector(end))
        for offset, data in places:
            self.files.pwrite(self.fd, data, offset)
        self.files.datasync(self.fd)
        new = replace(header, locators=locators, parent_name=stored_name.ljust(SECTOR, b"\0"))
        self.files.pwrite(self.fd, new.pack(), image.footer.data_offset)
        self._sync(f"wrote the parent locators: the parent is {parent}")

    def _move_footer(self, footer: Footer, old: int, new: int) -> None:
        self.files.pwrite(self.fd, footer.pack(), new)
        self._sync(f"moved the footer from {old} to {new}")
