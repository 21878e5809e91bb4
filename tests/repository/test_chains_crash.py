"""The random lives of chains_story.py, killed or without power after any file call.

After a restart every VDI reads what was promised, those of the step that was being done the old or the new,
and merges go on to their end.
"""

import os
import random
import shutil
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from gateway.core.leases import Leases
from gateway.images.chain import open_chain_files
from gateway.repository.directory import SRDirectory
from gateway.repository.fork import unfinished_forks
from gateway.repository.repository import Repository
from tests.crash import CrashState, RecordingFileCalls
from tests.repository.chains_story import MIB, PLACES, STEPS, Interrupting, Promise, Step, begin, told
from tests.repository.coalesce_house import open_house_in
from tests.repository.test_crash import states
from tests.repository.vdis import sound_content


class Recorder(Interrupting, RecordingFileCalls):
    """Remembers all calls, and interrupts a copy when it is told to."""


def random_steps(rng: random.Random, count: int) -> list[Step]:
    """Anything, after merges of both kinds that are interrupted first and done then."""
    # Behind the first of two blocks; inline, a journal is written before.
    inline, leaf = (Step("interrupted coalesce", 0, 0, calls) for calls in (1, 0))
    merged = [Step("write", 0, 0, 2), Step("complete coalesce", 0, 0, 1)]  # also of what rests after that
    grown = [Step("fill", 0, 0, 5), Step("fill", 0, 2 * MIB, 6), Step("snapshot", 0, 0, 1)]
    # Snapshots come behind the first VDI.
    destroyed = Step("destroy", 1, 0, 1)
    begun = [*grown, *grown, *grown, destroyed, destroyed, inline, *merged]
    begun += [*grown[:2], destroyed, leaf, *merged]
    whats = [rng.choice(STEPS) for _ in range(count)] + ["interrupted coalesce", "coalesce"]
    anything = [Step(what, rng.randrange(100), rng.choice(PLACES), rng.randrange(1, 256)) for what in whats]
    return [*begun, *anything]


async def record(directory: Path, story: list[Step]) -> tuple[Recorder, set[tuple[str, str]]]:
    """What was called, and of which kinds were the merges that ended how."""
    promise = await begin(directory)
    files = Recorder(directory / "sr")
    files.mark(promise)
    async with told(directory, files, files.mark) as lives:
        for step in story:
            await lives.do(step)
        ends = {(task.other_config["kind"], task.status.value) for task in lives.house.coalesced()}
    return files, ends


def contents(state: CrashState) -> dict[str, bytes]:
    """What each image reads, by uuid; all are without faults, and libvhdi agrees."""
    files = sorted(state.directory.glob("*.vhd"))
    digests = {str(path): sha256(path.read_bytes()).digest() for path in files}
    found = {}
    for path in files:
        chain = open_chain_files(str(path), writable=False)
        bytes_of = tuple((node.path, digests[node.path]) for node in chain.nodes)
        chain.close()
        try:
            found[path.stem] = _content(bytes_of)
        except AssertionError as error:
            error.add_note(str(state))
            raise
    return found


@lru_cache(maxsize=32)
def _content(chain: tuple[tuple[str, bytes], ...]) -> bytes:
    """What files with these bytes read. From one state to the next few of them change."""
    return sound_content([path for path, _ in chain], chain[0][0])


async def assert_as_promised(state: CrashState, leases: Leases) -> dict[str, bytes]:
    """What the VDIs read once the SR has been attached anew."""
    with suppress(FileNotFoundError):
        os.unlink(SRDirectory(str(state.directory)).owner)
    again = await Repository.attach(str(state.directory), leases, writable=True, who="after")
    result = await again.scan()
    assert not [*result.errors(), *result.strange, *result.journals], state
    assert unfinished_forks(again.directory) == [], state
    assert os.listdir(again.directory.staging) == [], state
    await again.detach()
    found = await trio.to_thread.run_sync(contents, state)
    visible = {uuid: found[uuid] for uuid, image in result.images.items() if not image.hidden}
    promise = state.marks[-1]
    assert isinstance(promise, Promise)
    for uuid in visible.keys() | promise.known.keys():
        assert promise.allows(uuid, visible.get(uuid)), f"{uuid}: {state}"
    return visible


async def assert_goes_on(state: CrashState, directory: Path, expected: dict[str, bytes]) -> None:
    """The next gateway merges all that there is to merge, and no VDI reads anything else."""
    state.write_back()
    os.mkdir(directory)
    async with open_house_in(directory) as house:
        sr = await house.inventory.sr_attach(str(state.directory), writable=True)
        await house.inventory.records.srs.change(sr, other_config={})
        await house.settled(sr)
        found = (await house.inventory.repository(sr).scan()).images
        left = {uuid: data for uuid, data in contents(state).items() if not found[uuid].hidden}
        assert left == expected, state
        for image in found.values():
            children = [child for child in found.values() if child.parent == image.uuid]
            assert not image.hidden or len(children) > 1, f"{image}: {state}"
        await house.assert_records_are_true(sr)
    shutil.rmtree(directory)


async def sweep(
    tmp_path: Path, leases: Leases, seed: int, *, steps: int, per_point: int, share: float, goes_on: float
) -> set[tuple[str, str]]:
    rng = random.Random(seed)
    files, ends = await record(tmp_path, random_steps(rng, steps))
    looked_at = 0
    async for state in states(files, tmp_path, per_point):
        if rng.random() < share:
            looked_at += 1
            visible = await assert_as_promised(state, leases)
            if rng.random() < goes_on:
                await assert_goes_on(state, tmp_path / "again", visible)
    assert looked_at > 20
    return ends


async def test_after_a_crash_every_vdi_is_as_promised(tmp_path: Path, leases: Leases) -> None:
    ends = await sweep(tmp_path, leases, 6, steps=2, per_point=1, share=0.04, goes_on=0.1)
    assert ends == {(kind, end) for kind in ("inline", "leaf") for end in ("cancelled", "success")}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(8))
async def test_after_a_crash_at_any_point_every_vdi_is_as_promised(
    tmp_path: Path, leases: Leases, seed: int
) -> None:
    await sweep(tmp_path, leases, seed, steps=24, per_point=3, share=1, goes_on=0.05)
