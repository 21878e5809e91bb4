"""The order in which an image grows: every foreign reader opens it after each step.

The trap is what already lies where a block will be: leftovers of a crash, an old footer, a false batmap.
"""

import errno
import os
import shutil
from pathlib import Path

import pytest

from gateway.images.disk import FileRange
from gateway.images.files import Buffer, FileCalls
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import SECTOR, BatmapHeader
from tests.images.disks import (
    entries,
    inspect,
    libvhdi_reads,
    make_child,
    open_leaf,
    pattern,
    put,
    read,
    read_all,
)
from tests.images.watched_calls import Watched

MIB = 1 << 20
SIZE = 8 * MIB
DATA = pattern(2 * MIB)


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
    assert files.syncs == 1
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


def test_a_batmap_may_be_shorter_than_the_table(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    create_dynamic(str(image), 4097 * 4096, block_size=4096)
    put(image, (0, DATA[:4096]))
    header = inspect(image).header
    assert header is not None
    map_at = header.table_end + 512
    with image.open("r+b") as file:
        file.seek(header.table_end)
        file.write(BatmapHeader(map_at, 1, ~0x80 & 0xFFFFFFFF).pack() + b"\x80")
    put(image, (4096 * 4096, DATA[:4096]))
    assert libvhdi_reads([image])[-4096:] == DATA[:4096]


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
