"""Merges that are refused, and the chain after one that failed on the way."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.images.errors import CorruptImage, ImageError, UnsupportedImage
from gateway.images.files import FileCalls
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.merge import Merge, extra_space
from tests.images.disks import content, entries, inspect, make_child, noise, put
from tests.images.merges import merge, never, opened

SECTOR = 512
MIB = 1 << 20
BLOCK = 2 * MIB


def test_a_parent_smaller_than_the_child(tmp_path: Path) -> None:
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 4 * MIB)
    make_child(child, parent, size=6 * MIB)
    with opened(child, parent) as pair:
        with pytest.raises(ImageError, match="more than its parent"):
            Merge(*pair)
        with pytest.raises(ImageError, match="more than its parent"):
            extra_space(*pair)


def test_a_fixed_parent_needs_the_space_of_its_holes_and_no_more(tmp_path: Path) -> None:
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_fixed(str(parent), 2 * BLOCK)
    make_child(child, parent)
    put(child, (0, noise(SECTOR)))
    with opened(child, parent) as pair:
        assert extra_space(*pair) == BLOCK
        put(parent, (0, noise(2 * BLOCK)))
        assert extra_space(*pair) == 0


def test_an_image_that_stands_on_another_one(tmp_path: Path) -> None:
    parent, child, other = (tmp_path / name for name in ("p.vhd", "c.vhd", "o.vhd"))
    create_dynamic(str(parent), 4 * MIB)
    create_dynamic(str(other), 4 * MIB)
    make_child(child, parent)
    with opened(child, other) as pair, pytest.raises(CorruptImage, match=r"o\.vhd is not its parent"):
        Merge(*pair)


@pytest.mark.parametrize("create", [create_dynamic, create_fixed])
def test_an_image_that_stands_on_none(tmp_path: Path, create: Callable[..., None]) -> None:
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 4 * MIB)
    create(str(child), 4 * MIB)
    with opened(child, parent) as pair, pytest.raises(UnsupportedImage, match="stands on no other"):
        Merge(*pair)


@pytest.mark.parametrize("damaged", ["footer", "overlap"])
def test_a_parent_that_a_write_would_destroy(tmp_path: Path, damaged: str) -> None:
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 8 * MIB)
    put(parent, (0, noise(4 * MIB)))
    make_child(child, parent)
    put(child, (6 * MIB, noise(SECTOR)))
    header = inspect(parent).header
    assert header is not None
    with parent.open("r+b") as out:
        if damaged == "footer":
            out.seek(-512, os.SEEK_END)
            out.write(bytes(512))
        else:
            out.seek(header.table_offset)
            first = out.read(4)
            out.write(first)
    before = parent.read_bytes()
    with (
        opened(child, parent) as (upper, lower),
        pytest.raises(CorruptImage, match=r"repair it|overlap"),
    ):
        Merge(upper, lower).copy_some(never)
    assert parent.read_bytes() == before


@pytest.mark.parametrize("create", [create_dynamic, create_fixed])
@pytest.mark.parametrize("when", ["before", "while"])
def test_a_child_that_loses_its_end_is_not_taken_for_zeroes(
    tmp_path: Path, create: Callable[..., None], when: str
) -> None:
    class Cutting(FileCalls):
        def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
            if when == "while":
                os.truncate(child, source_offset + 4096)
            super().copy_range(source_fd, source_offset, fd, offset, length)

    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create(str(parent), 8 * MIB)
    put(parent, (0, noise(8 * MIB)))
    make_child(child, parent)
    put(child, (0, noise(4 * MIB, 2)))
    with opened(child, parent) as (upper, lower):
        work = Merge(upper, lower, files=Cutting())
        if when == "before":
            os.truncate(child, entries(child)[1] * SECTOR + SECTOR + 4096)
        with pytest.raises(CorruptImage, match=r"c\.vhd: the file was cut shorter"):
            work.copy_some(never)
        assert work.done == 0
        work.finish()
    if when == "before":
        assert content(parent) == noise(8 * MIB)


def test_a_full_disk_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    class Full(FileCalls):
        room = 3

        def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
            self.room -= 1
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().copy_range(source_fd, source_offset, fd, offset, length)

    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 16 * MIB)
    put(parent, (0, noise(3 * MIB)))
    make_child(child, parent)
    put(child, (0, noise(16 * MIB, 2)))
    files = Full()
    with opened(child, parent) as (upper, lower):
        work = Merge(upper, lower, files=files)
        with pytest.raises(OSError, match="No space"):
            work.copy_some(never)
        assert work.done == 3 * BLOCK
        work.finish()
    assert content(child) == noise(16 * MIB, 2)
    assert check_vhd(str(parent)).problems == ()
    merge(child, parent)
    assert content(parent) == noise(16 * MIB, 2)


@pytest.mark.parametrize("create", [create_dynamic, create_fixed])
def test_a_failed_sync_is_never_followed_by_a_good_one(tmp_path: Path, create: Callable[..., None]) -> None:
    class Failing(FileCalls):
        broken = False

        def datasync(self, fd: int) -> None:
            if self.broken:
                self.broken = False
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().datasync(fd)

    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create(str(parent), 4 * MIB)
    make_child(child, parent)
    put(child, (0, noise(4 * MIB)))
    files = Failing()
    with opened(child, parent) as (upper, lower):
        work = Merge(upper, lower, files=files)
        work.copy_some(never)
        files.broken = True
        with pytest.raises(OSError, match="Input/output"):
            work.flush()
        with pytest.raises(OSError, match=r"earlier (write or )?sync failed"):
            work.flush()
