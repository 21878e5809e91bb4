"""What a write, a zero and a trim leave in the blocks of an image, over a parent and from many threads."""

import threading
from pathlib import Path

from gateway.images.disk import Disk, ExtentKind, FileRange, Hole
from gateway.images.vhd.create import set_hidden
from gateway.images.vhd.format import SECTOR, UNUSED, Footer
from tests.images.disks import entries, libvhdi_reads, make_child, open_leaf, pattern, read, read_all

MIB = 1 << 20
SIZE = 8 * MIB
DATA = pattern(2 * MIB)


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
