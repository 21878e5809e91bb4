"""A VHD merged into the one it stands on reads the same, for us against plain bytes and for libvhdi."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.merge import Merge, extra_space
from gateway.images.vhd.relink import set_parent
from tests.images.disks import content, entries, libvhdi_reads, make_child, make_next, noise, open_leaf, put
from tests.images.merges import merge, opened, stop_after
from tests.images.test_vhd_model import STEPS, Step, apply

SECTOR = 512
MIB = 1 << 20
BLOCK = 2 * MIB
BLOCK_SIZES = st.sampled_from([4096, 4096, 8192, 32768, BLOCK])


def trim(path: Path, offset: int, length: int) -> None:
    disk = open_leaf(path, writable=True)
    disk.zero(offset, length, trim=True)
    disk.close()


class TestAgainstPlainBytes:
    @settings(max_examples=80)
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

    @settings(max_examples=60)
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
