"""A chain of VHDs against a bytearray, and against libvhdi, which knows nothing of us."""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.images.disk import Disk
from gateway.images.vhd.create import create_dynamic, create_fixed
from tests.images.disks import (
    assert_extents_true,
    libvhdi_reads,
    make_child,
    open_leaf,
    pattern,
    read,
    read_all,
    read_by_segments,
)

SECTOR = 512
NOISE = pattern(1 << 17)


@dataclass(frozen=True)
class Step:
    what: str
    where: int  # in 1/1024 of the disk
    length: int


@dataclass(frozen=True)
class LevelPlan:
    sectors: int
    block_size: int
    steps: tuple[Step, ...]


STEPS = st.builds(
    Step,
    what=st.sampled_from(["write", "write", "write", "zero", "trim", "trim", "flush", "reopen", "read"]),
    where=st.integers(0, 1023),
    length=st.one_of(st.integers(1, 1500), st.sampled_from([512, 4096, 8192, 16384, 65536])),
)
LEVELS = st.builds(
    LevelPlan,
    sectors=st.one_of(st.integers(1, 200), st.sampled_from([128, 200])),
    block_size=st.sampled_from([4096, 4096, 8192, 32768, 2 << 20]),
    steps=st.lists(STEPS, max_size=8).map(tuple),
)


def apply(step: Step, disk: Disk, model: bytearray, seed: int, grain: int) -> None:
    offset = disk.size * step.where // 1024
    length = min(step.length, disk.size - offset)
    offset -= offset % grain
    length = min(-(-length // grain) * grain, disk.size - offset)
    if step.what == "write":
        data = NOISE[seed : seed + length]
        disk.pwrite(memoryview(data), offset)
        model[offset : offset + length] = data
    elif step.what in ("zero", "trim"):
        disk.zero(offset, length, trim=step.what == "trim")
        model[offset : offset + length] = bytes(length)
    elif step.what == "flush":
        disk.flush()
    assert read(disk, offset, length) == model[offset : offset + length]


def resized(model: bytearray, size: int) -> bytearray:
    return model[:size].ljust(size, b"\0")


@settings(max_examples=250)
@given(
    root=st.sampled_from(["dynamic", "fixed", "raw"]),
    levels=st.lists(LEVELS, min_size=1, max_size=4),
    odd=st.integers(0, 511),
    grain=st.sampled_from([1, 512, 4096]),
    published=st.booleans(),
)
def test_a_chain_reads_as_a_bytearray_would(
    root: str, levels: list[LevelPlan], odd: int, grain: int, published: bool
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        here = Path(directory)
        model = bytearray()
        paths: list[Path] = []
        for number, plan in enumerate(levels):
            size = plan.sectors * SECTOR
            path = here / f"{number}.vhd"
            if number:
                make_child(path, paths[-1], size=size, block_size=plan.block_size)
            elif root == "dynamic":
                create_dynamic(str(path), size, block_size=plan.block_size)
            elif root == "fixed":
                create_fixed(str(path), size)
            else:
                path = here / f"{number}.raw"
                size += odd
                path.touch()
                with path.open("r+b") as file:
                    file.truncate(size)
            paths.append(path)
            model = resized(model, size)
            disk = open_leaf(path, writable=True, published=published)
            assert disk.size == size
            for step in plan.steps:
                apply(step, disk, model, number * 1000, grain)
                if step.what == "reopen":
                    disk.close()
                    disk = open_leaf(path, writable=True, published=published)
            assert read_all(disk) == model
            assert read_by_segments(disk, 0, size) == model
            assert_extents_true(disk, bytes(model))
            disk.close()
        leaf = open_leaf(paths[-1])
        assert read_all(leaf) == model
        assert read_by_segments(leaf, 0, leaf.size) == model
        for start, stop in itertools.pairwise(range(0, leaf.size, 777)):
            assert read(leaf, start, stop - start) == model[start:stop]
        leaf.close()
        sizes = [plan.sectors for plan in levels]
        # libvhdi takes the clear bits after the last set one of a bitmap's byte for set ones.
        if grain == 4096 and root != "raw" and sizes == sorted(sizes, reverse=True):
            assert libvhdi_reads(paths[::-1]) == model
