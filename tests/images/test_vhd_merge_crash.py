"""Merges that a kill or a power failure ends at any call: the chain reads on, and merging again finishes."""

import random
from pathlib import Path

import pytest

from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.merge import Merge
from gateway.images.vhd.relink import set_parent
from tests.crash import RecordingFileCalls
from tests.images.disks import content, libvhdi_reads, make_child, open_leaf
from tests.images.merges import merge, opened, stop_after


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
