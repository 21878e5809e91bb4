"""By which calls a merge copies, when it syncs and what it lets the kernel forget; stopping and going on."""

import os
from pathlib import Path

import pytest

from gateway.images.files import FileCalls, FileIdentity, identity_of
from gateway.images.vhd import merge as merge_module
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.merge import Merge
from tests.images.disks import content, entries, make_child, noise, put
from tests.images.merges import merge, never, opened, stop_after
from tests.images.watched_calls import Watched
from tests.page_cache import cached

SECTOR = 512
MIB = 1 << 20
BLOCK = 2 * MIB


def test_whole_blocks_go_by_one_call_each(tmp_path: Path) -> None:
    copied: list[int] = []

    class Copying(FileCalls):
        def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
            copied.append(length)
            super().copy_range(source_fd, source_offset, fd, offset, length)

    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 16 * MIB)
    make_child(child, parent)
    put(child, (0, noise(BLOCK)), (4 * MIB, noise(3 * BLOCK)), (14 * MIB, noise(4096)))
    merge(child, parent, Copying())
    assert copied == [BLOCK] * 4


def test_a_file_grows_once_for_all_blocks_that_are_copied(tmp_path: Path) -> None:
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 160 * MIB)
    make_child(child, parent)
    put(child, *((block * BLOCK, b"x" * SECTOR) for block in range(80)))
    files = Watched()
    with opened(child, parent, files) as (upper, lower):
        work = Merge(upper, lower, files=files)
        assert work.copy_some(never)
        assert files.syncs == 1
        work.flush()
    assert content(parent) == content(child)


def test_metadata_is_written_on_the_way_without_a_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.images.vhd.writer._UNSAVED_BLOCKS", 3)
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 10 * 4096, block_size=4096)
    make_child(child, parent, block_size=4096)
    put(child, (0, noise(10 * 4096)))
    files = Watched()
    with opened(child, parent) as (upper, lower):
        work = Merge(upper, lower, files=files)
        assert work.copy_some(never)
        assert files.syncs == 1
        assert sum(entry != 0xFFFFFFFF for entry in entries(parent)) == 9
        work.flush()


def test_writing_back_begins_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "_WRITE_BACK", 4 * MIB)
    started: list[int] = []

    class WritingBack(FileCalls):
        def start_writeback(self, fd: int, offset: int, length: int) -> None:
            super().start_writeback(fd, offset, length)
            started.append(fd)

    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 16 * MIB)
    make_child(child, parent)
    put(child, (0, noise(10 * MIB)))
    merge(child, parent, WritingBack())
    assert len(started) == 2


def test_the_page_cache_forgets_the_child_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "_WRITE_BACK", 4 * MIB)
    forgotten: set[FileIdentity] = set()

    class Forgetting(FileCalls):
        def forget(self, fd: int, offset: int, length: int) -> None:
            super().forget(fd, offset, length)
            forgotten.add(identity_of(fd))

    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 16 * MIB)
    make_child(child, parent)
    put(child, (0, noise(10 * MIB)))
    with child.open("rb") as file:
        os.fsync(file.fileno())  # what is still to be written stays
        identity = identity_of(file.fileno())
    assert cached(child) >= 9 * MIB  # on a busy machine the kernel may have taken some pages
    merge(child, parent, Forgetting())
    assert cached(child) <= 3 * MIB  # the last 2 MiB, and what lies around them
    assert forgotten == {identity}  # not the parent
    assert cached(parent) >= 9 * MIB


def scene(tmp_path: Path) -> tuple[Path, Path]:
    parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
    create_dynamic(str(parent), 20 * 4096, block_size=4096)
    make_child(child, parent, block_size=4096)
    put(child, *((block * 4096, noise(4096)) for block in (2, 3, 7, 11)))
    return child, parent


def test_stop_is_asked_before_every_block(tmp_path: Path) -> None:
    with opened(*scene(tmp_path)) as (child, parent):
        work = Merge(child, parent)
        assert (work.total, work.done, work.position) == (4 * 4096, 0, 2)
        seen = []
        for _ in range(4):
            assert not work.copy_some(stop_after(1)) or work.done == work.total
            seen.append((work.done, work.position))
        assert seen == [(4096, 3), (8192, 7), (3 * 4096, 11), (4 * 4096, 20)]
        assert work.copy_some(stop_after(0))


def test_nothing_is_written_before_stop_was_asked(tmp_path: Path) -> None:
    child, parent = scene(tmp_path)
    before = parent.read_bytes()
    with opened(child, parent) as (upper, lower):
        work = Merge(upper, lower)
        assert not work.copy_some(stop_after(0))
        work.finish()
    assert parent.read_bytes() == before


def test_a_later_merge_begins_where_an_earlier_one_stopped(tmp_path: Path) -> None:
    child, parent = scene(tmp_path)
    with opened(child, parent) as (upper, lower):
        work = Merge(upper, lower)
        assert not work.copy_some(stop_after(2))
        work.flush()
        position = work.position
    with opened(child, parent) as (upper, lower):
        work = Merge(upper, lower, first_block=position)
        assert (work.total, work.done) == (4 * 4096, 2 * 4096)
        assert work.copy_some(never)
        work.finish()
    assert content(parent) == content(child)
