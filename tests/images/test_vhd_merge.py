"""A VHD merged into the one it stands on, against plain bytes, libvhdi and crashes at every call."""

import errno
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.images.errors import CorruptImage, ImageError, UnsupportedImage
from gateway.images.files import FILES, FileCalls, FileIdentity, identity_of
from gateway.images.vhd import merge as merge_module
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.image import VhdFile, open_vhd
from gateway.images.vhd.merge import Merge, extra_space
from gateway.images.vhd.relink import set_parent
from tests.crash import RecordingFileCalls
from tests.images.disks import entries, inspect, libvhdi_reads, make_child, make_next, open_leaf, read_all
from tests.images.test_vhd_model import STEPS, Step, apply

SECTOR = 512
MIB = 1 << 20
BLOCK = 2 * MIB
BLOCK_SIZES = st.sampled_from([4096, 4096, 8192, 32768, BLOCK])


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def never() -> bool:
    return False


def stop_after(blocks: int) -> Callable[[], bool]:
    calls = iter([False] * blocks)
    return lambda: next(calls, True)


def cached(path: Path) -> int:
    """How many bytes of a file are in the page cache."""
    fincore = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(fincore, check=True, capture_output=True, text=True).stdout)


@contextmanager
def opened(child: Path, parent: Path, files: FileCalls = FILES) -> Iterator[tuple[VhdFile, VhdFile]]:
    child_fd = os.open(child, os.O_RDONLY)
    parent_fd = files.open(str(parent), os.O_RDWR)
    try:
        yield open_vhd(child_fd, str(child)), open_vhd(parent_fd, str(parent))
    finally:
        files.close(parent_fd)
        os.close(child_fd)


def merge(child: Path, parent: Path, files: FileCalls = FILES) -> None:
    with opened(child, parent, files) as (upper, lower):
        work = Merge(upper, lower, files=files)
        assert work.copy_some(never)
        work.finish()
        assert work.done == work.total


def content(path: Path) -> bytes:
    disk = open_leaf(path)
    try:
        return read_all(disk)
    finally:
        disk.close()


def put(path: Path, *writes: tuple[int, bytes]) -> None:
    disk = open_leaf(path, writable=True)
    for offset, data in writes:
        disk.pwrite(data, offset)
    disk.close()


def trim(path: Path, offset: int, length: int) -> None:
    disk = open_leaf(path, writable=True)
    disk.zero(offset, length, trim=True)
    disk.close()


class TestAgainstPlainBytes:
    @settings(max_examples=80, deadline=None)
    @given(data=st.data())
    def test_a_chain_reads_the_same_before_while_and_after_its_nodes_are_merged(
        self, data: st.DataObject
    ) -> None:
        depth = data.draw(st.integers(2, 4))
        kind = data.draw(st.sampled_from(["dynamic", "dynamic", "fixed", "raw"]))
        grain = data.draw(st.sampled_from([512, 4096]))
        sizes = sorted(data.draw(st.lists(st.integers(1, 200), min_size=depth, max_size=depth)), reverse=True)
        # A disk that ends within a grain leaves bits that libvhdi misreads once they are in a larger one.
        sizes = [-(-sectors * SECTOR // grain) * grain // SECTOR for sectors in sizes]
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            paths: list[Path] = []
            model = bytearray()
            for number, sectors in enumerate(sizes):
                size = sectors * SECTOR
                path = make_next(paths, directory, kind, size, block_size=data.draw(BLOCK_SIZES))
                model = model[:size].ljust(size, b"\0")
                steps = data.draw(st.lists(STEPS, max_size=8))
                disk = open_leaf(path, writable=True)
                for step in steps:
                    apply(step, disk, model, number * 1000, grain)
                disk.close()
            lowest = 1 if kind == "raw" else 0
            while len(paths) - lowest > 1 and data.draw(st.booleans(), label="merge"):
                upper = data.draw(st.integers(lowest + 1, len(paths) - 1))
                self.merge_in_steps(paths, upper, bytes(model), data)
                child = paths.pop(upper)
                if upper < len(paths):
                    set_parent(str(paths[upper]), str(paths[upper - 1]))
                child.unlink()
                now = content(paths[-1])
                assert now[: len(model)] == model
                model = bytearray(now)  # where the leaf was the smaller one, there is more of it now
                for path in paths[lowest:]:
                    assert check_vhd(str(path)).errors == ()
                if grain == 4096 and kind != "raw":
                    assert libvhdi_reads(paths[::-1]) == model

    def merge_in_steps(self, paths: list[Path], upper: int, model: bytes, data: st.DataObject) -> None:
        child, parent = paths[upper], paths[upper - 1]
        position = 0
        finished = False
        stored = parent.stat().st_blocks
        with opened(child, parent) as (above, below):
            growth = extra_space(above, below)
        while not finished:
            with opened(child, parent) as (above, below):
                work = Merge(above, below, first_block=position)
                finished = work.copy_some(stop_after(data.draw(st.integers(0, 8), label="blocks")))
                if data.draw(st.booleans(), label="flush"):
                    work.flush()
                    position = work.position
                if finished:
                    work.finish()
                    assert work.done == work.total
            assert content(paths[-1]) == model
            assert check_vhd(str(parent)).errors == ()
        assert parent.stat().st_blocks * 512 <= stored * 512 + growth + 2 * 4096  # and a footer's page

    @settings(max_examples=60, deadline=None)
    @given(
        steps=st.lists(STEPS, min_size=1, max_size=10),
        more=st.lists(STEPS, max_size=10),
        block_sizes=st.tuples(BLOCK_SIZES, BLOCK_SIZES),
    )
    def test_the_parent_of_a_merged_leaf_holds_its_bytes(
        self, steps: list[Step], more: list[Step], block_sizes: tuple[int, int]
    ) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            parent, leaf = Path(directory) / "p.vhd", Path(directory) / "l.vhd"
            model = bytearray(200 * SECTOR)
            create_dynamic(str(parent), len(model), block_size=block_sizes[0])
            for path, chosen in ((parent, steps), (leaf, more)):
                if path == leaf:
                    make_child(leaf, parent, block_size=block_sizes[1])
                disk = open_leaf(path, writable=True)
                for number, step in enumerate(chosen):
                    apply(step, disk, model, number * 100, 512)
                disk.close()
            merge(leaf, parent)
            assert content(parent) == model


class TestWhatIsCopied:
    def test_libvhdi_reads_a_merged_parent(self, tmp_path: Path) -> None:
        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 16 * MIB)
        put(parent, (0, noise(5 * MIB)), (11 * MIB, noise(MIB, 2)))
        make_child(child, parent)
        put(child, (3 * MIB, noise(6 * MIB, 3)), (11 * MIB + 8192, noise(4096, 4)))
        trim(child, MIB, MIB)
        before = content(child)
        merge(child, parent)
        assert libvhdi_reads([parent]) == before
        assert check_vhd(str(parent)).problems == ()

    def test_a_child_that_is_larger_than_its_grandchild_stays_hidden_beyond_it(self, tmp_path: Path) -> None:
        base, child, leaf = (tmp_path / name for name in ("p.vhd", "c.vhd", "k.vhd"))
        create_dynamic(str(base), 8 * MIB)
        put(base, (0, noise(8 * MIB)))
        make_child(child, base, size=5 * MIB + SECTOR)
        put(child, (5 * MIB, noise(SECTOR, 2)))
        with child.open("r+b") as out:  # some programs set all bits of the last block
            out.seek(entries(child)[2] * SECTOR)
            out.write(b"\xff" * SECTOR)
        make_child(leaf, child)
        before = content(leaf)
        beyond = content(base)[5 * MIB + SECTOR :]
        merge(child, base)
        assert content(leaf) == before == content(base)[: len(before)]
        assert content(base)[len(before) :] == beyond

    def test_a_hole_of_the_child_takes_the_parents_data_away_and_its_space(self, tmp_path: Path) -> None:
        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 8 * MIB)
        put(parent, (0, noise(8 * MIB)))
        make_child(child, parent)
        trim(child, 0, 4 * MIB)
        trim(child, 4 * MIB, 8192)
        trim(child, 5 * MIB, MIB)
        stored = parent.stat().st_blocks * 512
        merge(child, parent)
        assert (
            content(parent)
            == bytes(4 * MIB + 8192)
            + noise(8 * MIB)[4 * MIB + 8192 : 5 * MIB]
            + bytes(MIB)
            + noise(8 * MIB)[6 * MIB :]
        )
        assert parent.stat().st_blocks * 512 <= stored - 5 * MIB

    def test_whole_blocks_go_by_one_call_each(self, tmp_path: Path) -> None:
        copied: list[int] = []

        class Watched(FileCalls):
            def copy_range(
                self, source_fd: int, source_offset: int, fd: int, offset: int, length: int
            ) -> None:
                copied.append(length)
                super().copy_range(source_fd, source_offset, fd, offset, length)

        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 16 * MIB)
        make_child(child, parent)
        put(child, (0, noise(BLOCK)), (4 * MIB, noise(3 * BLOCK)), (14 * MIB, noise(4096)))
        merge(child, parent, Watched())
        assert copied == [BLOCK] * 4

    def test_a_file_grows_once_for_all_blocks_that_are_copied(self, tmp_path: Path) -> None:
        syncs: list[int] = []

        class Watched(FileCalls):
            def datasync(self, fd: int) -> None:
                syncs.append(fd)
                super().datasync(fd)

        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 160 * MIB)
        make_child(child, parent)
        put(child, *((block * BLOCK, b"x" * SECTOR) for block in range(80)))
        files = Watched()
        with opened(child, parent, files) as (upper, lower):
            work = Merge(upper, lower, files=files)
            assert work.copy_some(never)
            assert len(syncs) == 1
            work.flush()
        assert content(parent) == content(child)

    def test_metadata_is_written_on_the_way_without_a_sync(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gateway.images.vhd.writer._UNSAVED_BLOCKS", 3)
        syncs: list[int] = []

        class Watched(FileCalls):
            def datasync(self, fd: int) -> None:
                syncs.append(fd)
                super().datasync(fd)

        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 10 * 4096, block_size=4096)
        make_child(child, parent, block_size=4096)
        put(child, (0, noise(10 * 4096)))
        with opened(child, parent) as (upper, lower):
            work = Merge(upper, lower, files=Watched())
            assert work.copy_some(never)
            assert len(syncs) == 1
            assert sum(entry != 0xFFFFFFFF for entry in entries(parent)) == 9
            work.flush()

    def test_writing_back_begins_on_the_way(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(merge_module, "_WRITE_BACK", 4 * MIB)
        started: list[int] = []

        class Watched(FileCalls):
            def start_writeback(self, fd: int, offset: int, length: int) -> None:
                super().start_writeback(fd, offset, length)
                started.append(fd)

        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 16 * MIB)
        make_child(child, parent)
        put(child, (0, noise(10 * MIB)))
        merge(child, parent, Watched())
        assert len(started) == 2

    def test_the_page_cache_forgets_the_child_on_the_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(merge_module, "_WRITE_BACK", 4 * MIB)
        forgotten: set[FileIdentity] = set()

        class Watched(FileCalls):
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
        merge(child, parent, Watched())
        assert cached(child) <= 3 * MIB  # the last 2 MiB, and what lies around them
        assert forgotten == {identity}  # not the parent
        assert cached(parent) >= 9 * MIB


class TestStopping:
    def scene(self, tmp_path: Path) -> tuple[Path, Path]:
        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 20 * 4096, block_size=4096)
        make_child(child, parent, block_size=4096)
        put(child, *((block * 4096, noise(4096)) for block in (2, 3, 7, 11)))
        return child, parent

    def test_stop_is_asked_before_every_block(self, tmp_path: Path) -> None:
        with opened(*self.scene(tmp_path)) as (child, parent):
            work = Merge(child, parent)
            assert (work.total, work.done, work.position) == (4 * 4096, 0, 2)
            seen = []
            for _ in range(4):
                assert not work.copy_some(stop_after(1)) or work.done == work.total
                seen.append((work.done, work.position))
            assert seen == [(4096, 3), (8192, 7), (3 * 4096, 11), (4 * 4096, 20)]
            assert work.copy_some(stop_after(0))

    def test_nothing_is_written_before_stop_was_asked(self, tmp_path: Path) -> None:
        child, parent = self.scene(tmp_path)
        before = parent.read_bytes()
        with opened(child, parent) as (upper, lower):
            work = Merge(upper, lower)
            assert not work.copy_some(stop_after(0))
            work.finish()
        assert parent.read_bytes() == before

    def test_a_later_merge_begins_where_an_earlier_one_stopped(self, tmp_path: Path) -> None:
        child, parent = self.scene(tmp_path)
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


class TestRefusals:
    def test_a_parent_smaller_than_the_child(self, tmp_path: Path) -> None:
        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 4 * MIB)
        make_child(child, parent, size=6 * MIB)
        with opened(child, parent) as pair:
            with pytest.raises(ImageError, match="more than its parent"):
                Merge(*pair)
            with pytest.raises(ImageError, match="more than its parent"):
                extra_space(*pair)

    def test_an_image_that_stands_on_another_one(self, tmp_path: Path) -> None:
        parent, child, other = (tmp_path / name for name in ("p.vhd", "c.vhd", "o.vhd"))
        create_dynamic(str(parent), 4 * MIB)
        create_dynamic(str(other), 4 * MIB)
        make_child(child, parent)
        with opened(child, other) as pair, pytest.raises(CorruptImage, match=r"o\.vhd is not its parent"):
            Merge(*pair)

    @pytest.mark.parametrize("create", [create_dynamic, create_fixed])
    def test_an_image_that_stands_on_none(self, tmp_path: Path, create: Callable[..., None]) -> None:
        parent, child = tmp_path / "p.vhd", tmp_path / "c.vhd"
        create_dynamic(str(parent), 4 * MIB)
        create(str(child), 4 * MIB)
        with opened(child, parent) as pair, pytest.raises(UnsupportedImage, match="stands on no other"):
            Merge(*pair)

    @pytest.mark.parametrize("damaged", ["footer", "overlap"])
    def test_a_parent_that_a_write_would_destroy(self, tmp_path: Path, damaged: str) -> None:
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
        self, tmp_path: Path, create: Callable[..., None], when: str
    ) -> None:
        class Cutting(FileCalls):
            def copy_range(
                self, source_fd: int, source_offset: int, fd: int, offset: int, length: int
            ) -> None:
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

    def test_a_full_disk_leaves_the_chain_as_it_was(self, tmp_path: Path) -> None:
        class Full(FileCalls):
            room = 3

            def copy_range(
                self, source_fd: int, source_offset: int, fd: int, offset: int, length: int
            ) -> None:
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
    def test_a_failed_sync_is_never_followed_by_a_good_one(
        self, tmp_path: Path, create: Callable[..., None]
    ) -> None:
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
            with pytest.raises(OSError, match="earlier sync failed"):
                work.flush()


class TestCrashes:
    """grandparent <- parent <- child <- leaf; the child is merged into the parent."""

    NAMES = ("k.vhd", "c.vhd", "p.vhd", "g.vhd")

    def scene(self, root: Path, rng: random.Random, block_sizes: tuple[int, int], kind: str) -> bytes:
        """Build the chain; everything written is whole pages, which libvhdi reads right."""
        size = 12 * 8192
        leaf, child, parent, base = (root / name for name in self.NAMES)

        def scribble(path: Path, pages: int) -> None:
            disk = open_leaf(path, writable=True)
            for _ in range(pages):
                offset = rng.randrange(size // 4096) * 4096
                length = min(rng.choice((1, 2, 5)) * 4096, size - offset)
                if rng.random() < 0.3:
                    disk.zero(offset, length, trim=True)
                else:
                    disk.pwrite(rng.randbytes(length), offset)
            disk.close()

        if kind == "fixed":
            create_fixed(str(parent), size)
        else:
            create_dynamic(str(base), size, block_size=8192)
            scribble(base, 6)
            make_child(parent, base, block_size=block_sizes[0])
        scribble(parent, 5)
        make_child(child, parent, block_size=block_sizes[1])
        scribble(child, 8)
        make_child(leaf, child, block_size=8192)
        scribble(leaf, 3)
        return content(leaf)

    def sweep(
        self,
        scratch: Path,
        seed: int,
        block_sizes: tuple[int, int],
        kind: str,
        *,
        per_point: int,
        look_closer_every: int,
    ) -> None:
        rng = random.Random(seed)
        root = scratch / "sr"
        root.mkdir()
        before = self.scene(root, rng, block_sizes, kind)
        files = RecordingFileCalls(root)
        work = None
        with opened(root / "c.vhd", root / "p.vhd", files) as (child, parent):
            work = Merge(child, parent, files=files)
            while not work.copy_some(stop_after(3)):
                work.flush()
            work.finish()
        files.mark("merged")
        states = [
            files.kill_states(scratch / "kill"),
            files.power_states(scratch / "power", rng, per_point),
        ]
        for number, state in enumerate(state for kind_of in states for state in kind_of):
            chain = [state.directory / name for name in self.NAMES if (state.directory / name).exists()]
            assert content(chain[0]) == before, state
            assert check_vhd(str(chain[2])).errors == (), state
            if number % look_closer_every and "merged" not in state.marks:
                continue
            assert libvhdi_reads(chain) == before, state
            if "merged" not in state.marks:
                merge(chain[1], chain[2])
            set_parent(str(chain[0]), str(chain[2]))
            chain.pop(1).unlink()
            assert content(chain[0]) == before == libvhdi_reads(chain), state

    @pytest.mark.parametrize("kind", ["sparse", "fixed"])
    @pytest.mark.parametrize("block_sizes", [(8192, 8192), (4096, 16384), (16384, 4096)])
    def test_the_chain_reads_the_same_after_a_crash_at_any_call(
        self, in_memory: Path, block_sizes: tuple[int, int], kind: str
    ) -> None:
        self.sweep(in_memory, 1, block_sizes, kind, per_point=2, look_closer_every=5)

    def test_the_chain_reads_the_same_when_metadata_was_written_before_the_data_is_safe(
        self, in_memory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gateway.images.vhd.writer._UNSAVED_BLOCKS", 2)
        self.sweep(in_memory, 2, (8192, 8192), "sparse", per_point=4, look_closer_every=5)

    @pytest.mark.long
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("kind", ["sparse", "fixed"])
    @pytest.mark.parametrize("block_sizes", [(4096, 4096), (8192, 8192), (4096, 16384), (16384, 4096)])
    @pytest.mark.parametrize("unsaved", [1, 2, 4096])
    def test_the_chain_reads_the_same_after_a_crash_at_any_call_in_many_states(
        self,
        in_memory: Path,
        monkeypatch: pytest.MonkeyPatch,
        block_sizes: tuple[int, int],
        kind: str,
        unsaved: int,
    ) -> None:
        monkeypatch.setattr("gateway.images.vhd.writer._UNSAVED_BLOCKS", unsaved)
        for seed in range(10, 15):
            path = in_memory / str(seed)
            path.mkdir()
            self.sweep(path, seed, block_sizes, kind, per_point=8, look_closer_every=1)
