"""Writes that an image refuses, and what is in the file after one that failed."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.images.chain import open_chain_files, open_disk
from gateway.images.errors import CorruptImage, ImageTooLarge
from gateway.images.files import Buffer, FileCalls
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import UNUSED
from tests.images.damaged import Vhd
from tests.images.disks import entries, libvhdi_reads, open_leaf, pattern, put, read, read_all
from tests.images.watched_calls import Watched

MIB = 1 << 20
SIZE = 8 * MIB
DATA = pattern(2 * MIB)


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


@pytest.fixture
def odd(tmp_path: Path) -> Vhd:
    """Two blocks, and half of one, which other programs cut off where the disk ends."""
    path = tmp_path / "odd.vhd"
    create_dynamic(str(path), 5 * MIB)
    put(path, (0, DATA), (2 * MIB, DATA), (4 * MIB, DATA[:MIB]))
    return Vhd(path)


def test_a_block_may_begin_where_the_disk_ends_in_the_last_one_but_not_before(odd: Vhd) -> None:
    last = entries(odd.path)[2]
    lengthen(odd)
    odd.set_entry(0, last + CUT_OFF)
    put(odd.path, (0, DATA[:512]), (4 * MIB, DATA[:MIB]))
    odd.set_entry(0, last + CUT_OFF - 1)
    assert_refuses_writes(odd, "block 2 and block 0 overlap")


def test_only_the_last_block_may_be_cut_off(odd: Vhd) -> None:
    odd.set_entry(1, entries(odd.path)[0] + CUT_OFF)
    assert_refuses_writes(odd, "block 0 and block 1 overlap")


def test_a_block_whose_last_sector_is_metadata_is_found(child: Vhd) -> None:
    put(child.path, (0, DATA))
    header, place = child.header(), entries(child.path)[2] * 512 + 2 * MIB
    child.set_header(locators=(replace(header.locators[0], data_offset=place), *header.locators[1:]))
    assert_refuses_writes(child, "block 2 is said to lie in the metadata")


def test_a_block_in_the_metadata_is_found_behind_a_last_block_that_ends_before_it(odd: Vhd) -> None:
    header = odd.header()
    table = odd.get(header.table_offset, 512)
    place = odd.length
    lengthen(odd)
    odd.put(place, table)
    odd.set_header(table_offset=place)
    odd.set_entry(2, place // 512 - CUT_OFF)
    odd.set_entry(0, place // 512)
    odd.set_entry(1, place // 512 + (512 + 2 * MIB) // 512)
    assert_refuses_writes(odd, "block 0 is said to lie in the metadata")


CUT_OFF = (512 + MIB) // 512


def lengthen(vhd: Vhd) -> None:
    footer = vhd.get(-512, 512)
    vhd.truncate(vhd.length + 6 * MIB)
    vhd.put(-512, footer)


def assert_refuses_writes(vhd: Vhd, why: str) -> None:
    before = vhd.path.read_bytes()
    disk = open_leaf(vhd.path, writable=True)
    with pytest.raises(CorruptImage, match=why):
        disk.pwrite(b"x" * 512, 4 * MIB)
    disk.close()
    assert vhd.path.read_bytes() == before


def test_no_block_comes_to_lie_where_its_entry_would_say_that_there_is_none(image: Path) -> None:
    put(image, (0, DATA[:512]))
    vhd = Vhd(image)
    footer, block = vhd.get(-512, 512), (512 + 2 * MIB) // 512
    last = UNUSED + 1 - 8 - block  # the last block that ends before 2 TiB, with its data aligned
    vhd.set_entry(0, last - 8 - 4096)
    vhd.truncate((last - 7) * 512 + 512)
    vhd.put(-512, footer)
    disk = open_leaf(image, writable=True)
    disk.pwrite(DATA[:512], 2 * MIB)
    with pytest.raises(ImageTooLarge, match="2 TiB"):
        disk.pwrite(DATA[:512], 4 * MIB)
    disk.close()
    assert entries(image)[1:] == [last, UNUSED, UNUSED]
    assert libvhdi_reads([image])[2 * MIB : 2 * MIB + 512] == DATA[:512]


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
    with pytest.raises(OSError, match=r"earlier (write or )?sync failed"):
        disk.flush()
    with pytest.raises(OSError, match=r"earlier (write or )?sync failed"):
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
