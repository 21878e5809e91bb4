"""A damaged or hostile VHD gives one known error or other bytes of the same disk, and nothing else."""

import os
import random
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.images.chain import open_chain_files, open_disk
from gateway.images.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedImage
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.format import UNUSED, DiskType, Footer
from tests.images.disks import entries, inspect, make_child, open_leaf, put, read, read_all

MIB = 1 << 20
SIZE = 4 * MIB
SECRET = b"bytes of another file "


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    directory = tmp_path / "sr"
    directory.mkdir()
    root, leaf, overlay = directory / "root.vhd", directory / "leaf.vhd", directory / "overlay.vhd"
    (directory / "rooted.raw").write_bytes(b"r" * SIZE)
    create_dynamic(str(root), SIZE)
    for path, parent in ((root, None), (leaf, root), (overlay, directory / "rooted.raw")):
        if parent is not None:
            make_child(path, parent)
        disk = open_leaf(path, writable=True)
        disk.pwrite(b"A" * 8192, 0)
        disk.pwrite(b"B" * 1536, 3 * MIB + 512)
        disk.close()
    secret = (SECRET * (SIZE // len(SECRET) + 1))[:SIZE]
    for name in ("booted.raw", "rooted2.raw"):
        (directory / name).write_bytes(secret)
    create_dynamic(str(directory / "boot.vhd"), SIZE)
    disk = open_leaf(directory / "boot.vhd", writable=True)
    disk.pwrite(secret, 0)
    disk.close()
    return directory


def read_or_refuse(path: Path) -> bytes | None:
    try:
        chain = open_chain_files(str(path), writable=False)
    except ImageError:
        return None
    try:
        disk = open_disk(chain)
    except ImageError:
        chain.close()
        return None
    try:
        assert disk.size <= SIZE or not any(read(disk, SIZE, min(disk.size - SIZE, MIB)))
        content = bytearray()
        for offset in range(0, min(disk.size, SIZE), MIB):
            content += read(disk, offset, min(MIB, disk.size - offset))
            list(disk.segments(offset, min(MIB, disk.size - offset)))
        return bytes(content)
    except ImageError:
        return None
    finally:
        disk.close()


def flip_and_read(repository: Path, rounds: int, seed: int) -> int:
    chance = random.Random(seed)
    survived = 0
    targets = {name: (repository / name).read_bytes() for name in ("root.vhd", "leaf.vhd", "overlay.vhd")}
    for _ in range(rounds):
        name = chance.choice(sorted(targets))
        original = targets[name]
        interesting = [
            (0, 512),
            (512, 1536),
            (1536, 2048),
            (2048, 4608),
            (len(original) - 512, len(original)),
        ]
        damaged = bytearray(original)
        for _ in range(chance.choice([1, 1, 2, 3, 8])):
            first, last = chance.choice(interesting)
            damaged[chance.randrange(first, last)] = chance.randrange(256)
        (repository / name).write_bytes(damaged)
        content = read_or_refuse(repository / ("leaf.vhd" if name == "root.vhd" else name))
        if content is not None:
            survived += 1
            assert SECRET not in content
        (repository / name).write_bytes(original)
    return survived


def test_flipped_bytes_give_an_error_or_bytes_of_the_same_disk(repository: Path) -> None:
    assert flip_and_read(repository, 120, seed=1) > 0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_of_many_kinds(repository: Path, seed: int) -> None:
    flip_and_read(repository, 500, seed)


def test_truncation_anywhere_gives_an_error_or_bytes_of_the_same_disk(repository: Path) -> None:
    path = repository / "leaf.vhd"
    original = path.read_bytes()
    for length in [
        0,
        1,
        511,
        512,
        1024,
        1536,
        1540,
        2048,
        4096,
        *range(5000, len(original), len(original) // 7),
    ]:
        path.write_bytes(original[:length])
        content = read_or_refuse(path)
        assert content is None or SECRET not in content


def change(
    path: Path, *, footer: dict[str, object] | None = None, header: dict[str, object] | None = None
) -> None:
    image = inspect(path)
    assert image.header is not None
    assert image.footer_offset is not None
    new_footer = replace(image.footer, **(footer or {})).pack()  # type: ignore[arg-type]  # any field of it
    new_header = replace(image.header, **(header or {})).pack()  # type: ignore[arg-type]  # any field of it
    with path.open("r+b") as file:
        file.write(new_footer + new_header)
        file.seek(image.footer_offset)
        file.write(new_footer)


@pytest.mark.parametrize(
    ("footer", "header", "error", "text"),
    [
        (
            {"current_size": 2040 << 30},
            {"max_table_entries": UNUSED, "block_size": 1 << 18},
            CorruptImage,
            "outside the file",
        ),
        (
            {"current_size": 2040 << 30},
            {"max_table_entries": UNUSED, "block_size": 4096},
            UnsupportedImage,
            "at most 16777216",
        ),
        ({"current_size": 2040 << 30}, {}, CorruptImage, "room for 2 of"),
        ({"current_size": (2040 << 30) + 512}, {}, ImageTooLarge, "2040 GiB"),
        ({"current_size": 2**64 - 512}, {}, ImageTooLarge, "2040 GiB"),
        ({"current_size": SIZE - 1}, {}, CorruptImage, "multiple of 512"),
        ({"data_offset": 2**64 - 512}, {}, CorruptImage, "outside the file"),
        ({"data_offset": 2**63}, {}, CorruptImage, "outside the file"),
        ({"data_offset": 0}, {}, CorruptImage, "outside the file"),
        ({}, {"table_offset": 2**64 - 512}, CorruptImage, "outside the file"),
        ({}, {"table_offset": 0}, CorruptImage, "outside the file"),
        ({}, {"table_offset": 1024}, CorruptImage, "in the dynamic disk header"),
        ({}, {"max_table_entries": 1}, CorruptImage, "room for 1 of 2"),
        ({}, {"block_size": 512}, UnsupportedImage, "block size"),
        ({}, {"block_size": 3 << 20}, UnsupportedImage, "block size"),
        ({}, {"block_size": 512 << 20}, UnsupportedImage, "block size"),
    ],
)
def test_contradicting_sizes_are_refused_before_memory_is_taken(
    repository: Path, footer: dict[str, object], header: dict[str, object], error: type[ImageError], text: str
) -> None:
    path = repository / "root.vhd"
    change(path, footer=footer, header=header)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=text):
            open_chain_files(str(path), writable=False)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("entry", "text"),
    [(0, "metadata"), (1, "metadata"), (3, "metadata"), (4, "metadata"), (0xFFFFFFFE, "beyond")],
)
def test_a_table_entry_outside_the_blocks_is_corrupt_when_its_block_is_used(
    repository: Path, entry: int, text: str
) -> None:
    path = repository / "root.vhd"
    with path.open("r+b") as file:
        file.seek(1536)
        file.write(entry.to_bytes(4, "big"))
    disk = open_leaf(path)
    assert read(disk, 3 * MIB + 512, 4) == b"BBBB"
    with pytest.raises(CorruptImage, match=f"block 0 is said to lie.* {text}"):
        read(disk, 0, 4)
    with pytest.raises(CorruptImage, match="block 0"):
        list(disk.extents(0, SIZE))
    disk.close()
    disk = open_leaf(path, writable=True)
    before = path.read_bytes()
    with pytest.raises(CorruptImage, match="block 0"):
        disk.pwrite(b"x", 3 * MIB)
    disk.close()
    assert path.read_bytes() == before


def test_a_block_that_reaches_into_the_footer_is_corrupt(repository: Path) -> None:
    path = repository / "root.vhd"
    last = max(entry for entry in entries(path) if entry != UNUSED)
    block = entries(path).index(last)
    with path.open("r+b") as file:
        file.seek(1536 + 4 * block)
        file.write((last + 1).to_bytes(4, "big"))
    disk = open_leaf(path)
    with pytest.raises(CorruptImage, match="beyond the end"):
        read_all(disk)
    disk.close()


def test_a_fixed_disk_without_its_footer_is_not_the_one_that_lies_in_it(tmp_path: Path) -> None:
    path = tmp_path / "fixed.vhd"
    create_fixed(str(path), 4 << 20)
    put(path, (0, Footer.new(1 << 20, DiskType.FIXED).pack()))
    os.truncate(path, 4 << 20)
    with pytest.raises(CorruptImage, match="footer of a fixed disk is damaged"):
        open_leaf(path)


def test_the_most_fragmented_bitmap_is_read_right_and_takes_bounded_memory(tmp_path: Path) -> None:
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), SIZE)
    disk = open_leaf(parent, writable=True)
    disk.pwrite(b"p" * SIZE, 0)
    disk.close()
    make_child(child, parent)
    disk = open_leaf(child, writable=True)
    disk.pwrite(b"c" * SIZE, 0)
    disk.close()
    with child.open("r+b") as file:
        for entry in entries(child):
            file.seek(entry * 512)
            file.write(b"\xaa" * 512)
    disk = open_leaf(child)
    assert read_all(disk) == (b"c" * 512 + b"p" * 512) * (SIZE // 1024)
    assert len(list(disk.segments(0, SIZE))) == SIZE // 512
    disk.close()


def test_a_file_cut_shorter_while_it_is_open_is_an_error(repository: Path) -> None:
    path = repository / "root.vhd"
    disk = open_leaf(path)
    read(disk, 0, 512)
    shutil.copy(path, repository / "spare")
    with path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(CorruptImage, match="cut shorter"):
        read(disk, 0, 512)
    with pytest.raises(CorruptImage, match="cut shorter"):
        read(disk, 3 * MIB, 512)
    disk.close()
