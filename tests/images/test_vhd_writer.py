"""The order in which an image grows, and what every foreign reader finds after each step of it."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from gateway.images.chain import open_chain_files, open_disk
from gateway.images.disk import Disk, ExtentKind, FileRange, Hole
from gateway.images.errors import CorruptImage
from gateway.images.files import Buffer, FileCalls
from gateway.images.vhd.create import create_dynamic, set_hidden
from gateway.images.vhd.format import SECTOR, UNUSED, BatmapHeader, Footer
from tests.images.disks import (
    entries,
    inspect,
    libvhdi_reads,
    make_child,
    open_leaf,
    pattern,
    read,
    read_all,
)

MIB = 1 << 20
SIZE = 8 * MIB
DATA = pattern(2 * MIB)


class Watched(FileCalls):
    """File calls that note what they do and let somebody look after each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.fail_sync = False

    def seen(self) -> None:
        """Called after each call."""

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        super().pwrite(fd, data, offset)
        self.calls.append(("pwrite", offset, len(data)))
        self.seen()

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self.calls.append(("truncate", size, 0))
        self.seen()

    def punch(self, fd: int, offset: int, length: int) -> None:
        super().punch(fd, offset, length)
        self.calls.append(("punch", offset, length))
        self.seen()

    def datasync(self, fd: int) -> None:
        if self.fail_sync:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().datasync(fd)
        self.calls.append(("datasync", 0, 0))
        self.seen()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), SIZE)
    return path


def test_footer_goes_first_and_the_table_last_between_two_syncs(image: Path) -> None:
    files = Watched()
    end = inspect(image).data_end
    disk = open_leaf(image, writable=True, files=files)
    disk.pwrite(DATA[:MIB], 0)
    grown = files.calls[0][1]
    start = -(-(end + 512) // 4096) * 4096
    assert files.calls == [
        ("pwrite", grown, 512),  # the footer, behind room for all four blocks
        ("datasync", 0, 0),
        ("pwrite", end, 512),  # where the old footer was: zeroes
        ("pwrite", start - 512, 512),  # the bitmap, still empty: its space is taken
        ("pwrite", start, MIB),
    ]
    assert grown > start + 4 * 2 * MIB
    files.calls.clear()
    disk.flush()
    assert files.calls == [
        ("datasync", 0, 0),
        ("pwrite", start - 512, 512),  # the bitmap
        ("pwrite", 1536, 4),  # the BAT entry
        ("datasync", 0, 0),
    ]
    files.calls.clear()
    disk.flush()
    assert files.calls == []
    disk.close()
    assert image.stat().st_size == start + 2 * MIB + 512


def test_an_unpublished_file_costs_one_sync(image: Path) -> None:
    files = Watched()
    disk = open_leaf(image, writable=True, files=files, published=False)
    for offset in range(0, SIZE, MIB):
        disk.pwrite(DATA[:MIB], offset)
    disk.flush()
    assert [call[0] for call in files.calls].count("datasync") == 1
    disk.close()


def test_every_reader_opens_the_file_after_every_step(image: Path, tmp_path: Path) -> None:
    sizes = set()
    reads = []

    class Reading(Watched):
        def seen(self) -> None:
            copy = tmp_path / "copy.vhd"
            shutil.copy(image, copy)
            ours = open_leaf(copy)
            reads.append(read_all(ours))
            ours.close()
            sizes.add(ours.size)
            assert libvhdi_reads([copy]) == reads[-1]

    disk = open_leaf(image, writable=True, files=Reading())
    disk.pwrite(DATA, MIB)
    disk.flush()
    assert reads[-1][MIB : 3 * MIB] == DATA
    disk.pwrite(DATA[:4096], 5 * MIB)
    disk.close()
    assert sizes == {SIZE}
    assert reads[-1][5 * MIB : 5 * MIB + 4096] == DATA[:4096]
    reopened = open_leaf(image, writable=True, files=Reading())
    reopened.pwrite(DATA[:4096], 7 * MIB)
    reopened.close()


def test_data_of_a_block_is_aligned_for_reflinks(image: Path) -> None:
    disk = open_leaf(image, writable=True)
    for offset in range(0, SIZE, 2 * MIB):
        disk.pwrite(b"x", offset)
    assert all(
        segment.offset % 4096 == 0 for segment in disk.segments(0, SIZE) if isinstance(segment, FileRange)
    )
    disk.close()
    assert all(entry * SECTOR % 4096 == 4096 - 512 for entry in entries(image))


def test_nothing_but_the_image_is_written_when_nothing_is_written(image: Path) -> None:
    before = image.read_bytes()
    files = Watched()
    disk = open_leaf(image, writable=True, files=files)
    disk.zero(0, SIZE, trim=True)
    read_all(disk)
    disk.flush()
    disk.close()
    assert files.calls == []
    assert image.read_bytes() == before


def test_leftovers_of_a_crash_are_cut_off_before_growing(image: Path) -> None:
    footer = inspect(image).footer
    end = inspect(image).data_end
    with image.open("r+b") as file:
        file.seek(end)
        file.write(b"\xff" * (3 * MIB) + footer.pack())
    disk = open_leaf(image, writable=True)
    disk.pwrite(b"x" * 512, 1024)
    assert read(disk, 0, 2 * MIB) == (bytes(1024) + b"x" * 512).ljust(2 * MIB, b"\0")
    disk.close()
    block = entries(image)[0] * SECTOR
    assert image.read_bytes()[block : block + 512] == bytes([0b00100000]) + bytes(511)
    assert not any(image.read_bytes()[block + 512 + 1536 : -512])


def test_leftovers_of_a_crash_are_cut_off_also_when_that_failed_at_first(tmp_path: Path, image: Path) -> None:
    class FullAtFirst(FileCalls):
        refusals = 1

        def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().pwrite(fd, data, offset)

    parent = open_leaf(image, writable=True)
    parent.pwrite(DATA, 0)
    parent.close()
    child = tmp_path / "b.vhd"
    make_child(child, image)
    footer, end = inspect(child).footer, inspect(child).data_end
    with child.open("r+b") as file:
        file.seek(end)
        file.write(b"\xff" * (3 * MIB) + footer.pack())
    disk = open_leaf(child, writable=True, files=FullAtFirst())
    with pytest.raises(OSError, match="No space"):
        disk.pwrite(b"x" * 512, 0)
    disk.zero(0, 2 * MIB, trim=True)
    assert not any(read(disk, 0, 2 * MIB))
    disk.close()
    assert not any(libvhdi_reads([child, image]))


def test_partial_first_write_marks_only_its_sectors(tmp_path: Path, image: Path) -> None:
    parent = open_leaf(image, writable=True)
    parent.pwrite(DATA, 0)
    parent.close()
    child = tmp_path / "b.vhd"
    make_child(child, image)
    disk = open_leaf(child, writable=True)
    disk.pwrite(b"n" * 1024, 1536)
    disk.pwrite(b"s" * 10, 5 * 512 + 7)
    disk.close()
    block = entries(child)[0] * SECTOR
    assert child.read_bytes()[block : block + 512] == bytes([0b00011100]) + bytes(511)
    disk = open_leaf(child)
    expected = bytearray(DATA)
    expected[1536:2560] = b"n" * 1024
    expected[2567:2577] = b"s" * 10
    assert read(disk, 0, 2 * MIB) == expected
    disk.close()


def test_zero_over_a_parent_is_a_block_with_a_hole(tmp_path: Path, image: Path) -> None:
    parent = open_leaf(image, writable=True)
    parent.pwrite(DATA, 0)
    parent.close()
    child = tmp_path / "b.vhd"
    make_child(child, image)
    disk = open_leaf(child, writable=True)
    disk.zero(0, SIZE, trim=True)
    assert not any(read_all(disk))
    disk.close()
    assert [entry != UNUSED for entry in entries(child)] == [True, False, False, False]
    assert child.stat().st_blocks * 512 < 128 * 1024
    disk = open_leaf(child)
    assert [extent.kind for extent in disk.extents(0, SIZE)] == [ExtentKind.ZERO, ExtentKind.HOLE]
    assert not any(read_all(disk))
    disk.close()
    assert not any(libvhdi_reads([child, image]))


def test_zero_over_a_hole_of_a_raw_parent_needs_no_block(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(SIZE)
        file.seek(4 * MIB)
        file.write(DATA[:4096])
    child = tmp_path / "b.vhd"
    make_child(child, base)
    disk = open_leaf(child, writable=True)
    disk.zero(0, SIZE, trim=True)
    assert not any(read_all(disk))
    disk.close()
    assert [entry != UNUSED for entry in entries(child)] == [False, False, True, False]


def test_zero_without_trim_reserves_space(image: Path) -> None:
    disk = open_leaf(image, writable=True)
    disk.zero(0, 2 * MIB, trim=False)
    disk.close()
    assert image.stat().st_blocks * 512 >= 2 * MIB


def test_trim_gives_space_back(image: Path) -> None:
    disk = open_leaf(image, writable=True)
    disk.pwrite(DATA, 0)
    disk.flush()
    disk.zero(4096, 2 * MIB - 8192, trim=True)
    disk.close()
    assert image.stat().st_blocks * 512 < 128 * 1024
    assert [type(part) for part in open_segments(image)] == [FileRange, Hole]


def open_segments(path: Path) -> list[FileRange | Hole]:
    disk = open_leaf(path)
    parts = list(disk.segments(0, disk.size))
    disk.close()
    return parts


def test_a_false_batmap_is_cleared_before_a_block_is_added(image: Path) -> None:
    header = inspect(image).header
    assert header is not None
    map_at = header.table_end + 512
    with image.open("r+b") as file:
        file.seek(map_at)
        file.write(b"\xf0")
        file.seek(header.table_end)
        file.write(BatmapHeader(map_at, 1, ~0xF0 & 0xFFFFFFFF).pack())
    disk = open_leaf(image, writable=True)
    disk.pwrite(b"x" * 512, 0)
    disk.close()
    content = image.read_bytes()
    assert content[map_at : map_at + 512] == bytes(512)
    batmap = BatmapHeader.unpack(content[header.table_end : map_at], "x")
    assert batmap.map_checksum == 0xFFFFFFFF


def test_a_batmap_that_claims_most_of_a_huge_file_is_cleared_in_no_memory(image: Path) -> None:
    header, footer = inspect(image).header, inspect(image).footer
    assert header is not None
    map_at, end = header.table_end + 512, 1 << 40
    with image.open("r+b") as file:
        file.seek(header.table_end)
        file.write(BatmapHeader(map_at, (end - map_at) // SECTOR, ~0xF0 & 0xFFFFFFFF).pack() + b"\xf0")
        file.seek(end)
        file.write(footer.pack())
    disk = open_leaf(image, writable=True)
    disk.pwrite(b"x" * 512, 0)
    disk.close()
    with image.open("rb") as file:
        file.seek(map_at)
        assert not any(file.read(4096))
    assert image.stat().st_blocks * 512 < MIB


def test_overlapping_blocks_can_be_read_but_not_written(image: Path) -> None:
    disk = open_leaf(image, writable=True)
    disk.pwrite(DATA, 0)
    disk.pwrite(DATA, 2 * MIB)
    disk.close()
    first = entries(image)[0]
    with image.open("r+b") as file:
        file.seek(1536 + 4)
        file.write((first + 1).to_bytes(4, "big"))
    before = image.read_bytes()
    disk = open_leaf(image, writable=True)
    read(disk, 0, 512)
    with pytest.raises(CorruptImage, match=r"block 0 and block 1 overlap"):
        disk.pwrite(b"x" * 512, 0)
    with pytest.raises(CorruptImage, match=r"block 0 and block 1 overlap"):
        disk.zero(0, 512, trim=True)
    disk.close()
    assert image.read_bytes() == before


def test_an_image_without_its_last_footer_is_read_but_not_written(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 300)
    disk = open_leaf(image)
    assert disk.size == SIZE
    disk.close()
    with pytest.raises(CorruptImage, match="repair"):
        open_leaf(image, writable=True)


def test_a_read_only_disk_refuses_to_change(image: Path) -> None:
    disk = open_leaf(image)
    with pytest.raises(PermissionError):
        disk.pwrite(b"x", 0)
    with pytest.raises(PermissionError):
        disk.zero(0, 1, trim=True)
    disk.close()
    chain = open_chain_files(str(image), writable=False)
    with pytest.raises(PermissionError):
        open_disk(chain, read_only=False)
    chain.close()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1)])
def test_requests_beyond_the_disk_are_refused(image: Path, offset: int, length: int) -> None:
    disk = open_leaf(image, writable=True)
    with pytest.raises(ValueError, match="not on a disk"):
        disk.pread_into(bytearray(length), offset)
    with pytest.raises(ValueError, match="not on a disk"):
        disk.pwrite(bytes(length), offset)
    with pytest.raises(ValueError, match="not on a disk"):
        disk.zero(offset, length, trim=True)
    with pytest.raises(ValueError, match="not on a disk"):
        disk.segments(offset, length)
    disk.close()


def test_a_sync_that_failed_fails_for_good(image: Path) -> None:
    files = Watched()
    disk = open_leaf(image, writable=True, files=files)
    disk.pwrite(DATA, 0)
    files.fail_sync = True
    with pytest.raises(OSError, match="Input/output"):
        disk.flush()
    files.fail_sync = False
    with pytest.raises(OSError, match="earlier sync failed"):
        disk.flush()
    with pytest.raises(OSError, match="earlier sync failed"):
        disk.close()
    assert entries(image) == [UNUSED] * 4


class FullDisk(FileCalls):
    """Has room for so many calls that take new space."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken: set[int] = set()

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        pages = set(range(offset // 4096, -(-(offset + len(data)) // 4096)))
        if len(self.taken | pages) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.taken |= pages
        super().pwrite(fd, data, offset)


@pytest.mark.parametrize("room", range(3, 9))
def test_a_full_disk_refuses_a_write_and_keeps_what_was_written_before(image: Path, room: int) -> None:
    head = {0, 1}
    files = FullDisk(room)
    files.taken |= head
    disk = open_leaf(image, writable=True, files=files)
    written = 0
    with pytest.raises(OSError, match="No space"):
        for offset in range(0, SIZE, 2 * MIB):
            disk.pwrite(DATA[:4096], offset)
            written += 1
    disk.flush()
    disk.close()
    expected = b"".join(
        (DATA[:4096] if block < written else bytes(4096)) + bytes(2 * MIB - 4096) for block in range(4)
    )
    disk = open_leaf(image, writable=True)
    assert read_all(disk) == expected
    disk.pwrite(DATA[:4096], 6 * MIB)
    disk.close()
    assert libvhdi_reads([image])[6 * MIB : 6 * MIB + 4096] == DATA[:4096]


def test_threads_write_and_read_different_parts_at_once(image: Path) -> None:
    disk = open_leaf(image, writable=True)
    failures: list[str] = []

    def work(number: int) -> None:
        for step in range(100):
            offset = (step * 8 + number) * 4096 + number
            data = bytes([number + 1]) * 3000
            disk.pwrite(data, offset)
            if read(disk, offset, 3000) != data:
                failures.append(f"thread {number} at {offset}")
            if step % 25 == 0:
                disk.flush()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disk.close()
    assert failures == []
    check_threads(open_leaf(image))


def check_threads(disk: Disk) -> None:
    for step in range(100):
        for number in range(8):
            assert read(disk, (step * 8 + number) * 4096 + number, 3000) == bytes([number + 1]) * 3000
    disk.close()


def test_the_hidden_flag_is_set_in_both_footers(image: Path) -> None:
    for hidden in (True, False):
        set_hidden(str(image), hidden)
        content = image.read_bytes()
        assert Footer.unpack(content[:512], "x").hidden is hidden
        assert Footer.unpack(content[-512:], "x").hidden is hidden
        assert libvhdi_reads([image]) == bytes(SIZE)
