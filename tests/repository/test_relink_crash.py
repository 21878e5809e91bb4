"""Relinks, and the recovery from them, crashed after each call: every VDI reads on, nothing is left over."""

import errno
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from gateway.core.leases import Leases
from gateway.images.files import FileCalls
from gateway.images.vhd.create import create_fixed, set_hidden
from gateway.repository.directory import SRDirectory
from gateway.repository.journal_recovery import recover_journals
from gateway.repository.journals import JournalKind, create_journal
from gateway.repository.relink_steps import inline_relink, leaf_relink
from gateway.repository.scan import ScanResult
from tests.crash import CrashState, RecordingFileCalls
from tests.images.disks import content, make_child, noise, put
from tests.images.merges import merge
from tests.images.test_vhd_relink import with_one_locator_and_no_name
from tests.repository.chains import (
    BLOCK,
    GRAIN,
    K1,
    K2,
    SIZE,
    Bytes,
    C,
    Chains,
    G,
    H,
    L,
    P,
    Q,
    assert_sound,
    attach_and_scan,
    image,
)
from tests.repository.failing_once import FailingOnce
from tests.repository.journal_steps import Step
from tests.repository.test_journals import INLINE_STEPS, LEAF_STEPS, SNAPSHOTS

Work = Callable[[SRDirectory, FileCalls], object]
SweepTest = Callable[[Path, Leases, Chains, int], Awaitable[None]]


def relink_inline(directory: SRDirectory, files: FileCalls) -> None:
    create_journal(directory, JournalKind.COALESCE, C, files=files)
    inline_relink(directory, child=C, parent=P, children=(K1, K2), files=files)


def relink_leaf(directory: SRDirectory, files: FileCalls) -> None:
    leaf_relink(directory, leaf=L, parent=Q, files=files)


async def states(files: RecordingFileCalls, into: Path, per_point: int) -> AsyncIterator[CrashState]:
    def both() -> Iterator[CrashState]:
        yield from files.kill_states(into / "kill")
        yield from files.power_states(into / "power", random.Random(per_point), per_point)

    pending = both()
    while (state := await trio.to_thread.run_sync(next, pending, None)) is not None:
        yield state


class Sweep:
    """Work on an SR that crashes everywhere; `expected` is what the VDIs read in any case."""

    def __init__(self, tmp_path: Path, leases: Leases, expected: Bytes, *, strict: bool = True) -> None:
        self.root = tmp_path / "sr"
        self.into = tmp_path / "states"
        self.leases = leases
        self.expected = expected
        self.strict = strict

    async def run(self, work: Work, per_point: int) -> list[ScanResult]:
        """What is there after the recovery from each crash; libvhdi reads every seventh of them."""
        files = RecordingFileCalls(self.root)
        work(SRDirectory(str(self.root)), files)
        results = []
        count = itertools.count()
        async for state in states(files, self.into, per_point):
            found = await attach_and_scan(state.directory, self.leases)
            libvhdi = next(count) % 7 == 0
            assert_sound(state.directory, found, self.expected, state, libvhdi=libvhdi, warnings=self.strict)
            results.append(found)
        return results


def parents(found: list[ScanResult], uuid: str) -> set[str | None]:
    return {result.images[uuid].parent for result in found}


async def sweep_inline(tmp_path: Path, leases: Leases, chains: Chains, per_point: int) -> None:
    sweep = Sweep(tmp_path, leases, chains.place(tmp_path / "sr", G, P, C, K1, K2))
    merge(image(sweep.root, C), image(sweep.root, P))
    found = await sweep.run(relink_inline, per_point)
    assert len(found) > 40
    assert parents(found, K1) == parents(found, K2) == {C, P}
    # All children are on the same one, and the node is gone when it isn't needed.
    assert all({result.images[uuid].parent for uuid in (K1, K2)} in ({C}, {P}) for result in found)
    assert all((C in result.images) == (result.images[K1].parent == C) for result in found)


async def sweep_torn_header(tmp_path: Path, leases: Leases, chains: Chains, per_point: int) -> None:
    sweep = Sweep(tmp_path, leases, chains.place(tmp_path / "sr", G, P, C, K1, K2), strict=False)
    with_one_locator_and_no_name(image(sweep.root, K1))
    merge(image(sweep.root, C), image(sweep.root, P))
    found = await sweep.run(relink_inline, per_point)
    assert parents(found, K1) == parents(found, K2) == {C, P}


async def sweep_leaf(tmp_path: Path, leases: Leases, chains: Chains, per_point: int) -> None:
    sweep = Sweep(tmp_path, leases, chains.place(tmp_path / "sr", H, Q, L))
    merge(image(sweep.root, L), image(sweep.root, Q))
    found = await sweep.run(relink_leaf, per_point)
    assert len(found) > 20
    assert parents(found, L) == {Q, H}
    assert all((Q in result.images) == (result.images[L].parent == Q) for result in found)


async def sweep_leaf_into_fixed(tmp_path: Path, leases: Leases, chains: Chains, per_point: int) -> None:
    chains.place(tmp_path / "sr", H)
    sweep = Sweep(tmp_path, leases, {})
    image(sweep.root, H).unlink()
    create_fixed(str(image(sweep.root, Q)), SIZE)
    put(image(sweep.root, Q), (0, noise(2 * BLOCK)))
    make_child(image(sweep.root, L), image(sweep.root, Q), block_size=BLOCK)
    put(image(sweep.root, L), (BLOCK + GRAIN, noise(BLOCK, 2)))
    set_hidden(str(image(sweep.root, Q)), True)
    sweep.expected[L] = content(image(sweep.root, L))
    merge(image(sweep.root, L), image(sweep.root, Q))
    assert parents(await sweep.run(relink_leaf, per_point), L) == {Q, None}


SWEEPS = pytest.mark.parametrize(
    "sweep", [sweep_inline, sweep_torn_header, sweep_leaf, sweep_leaf_into_fixed], ids=lambda it: it.__name__
)


@SWEEPS
async def test_a_relink_that_crashed_is_finished_or_undone(
    tmp_path: Path, leases: Leases, chains: Chains, sweep: SweepTest
) -> None:
    # Names are few and get lost in few ways, which should all be met; headers are many calls.
    await sweep(tmp_path, leases, chains, 5 if sweep is sweep_leaf else 1)


@pytest.mark.long
@pytest.mark.timeout(900)
@SWEEPS
async def test_a_relink_that_crashed_is_finished_or_undone_in_many_ways(
    tmp_path: Path, leases: Leases, chains: Chains, sweep: SweepTest
) -> None:
    await sweep(tmp_path, leases, chains, 15)


RECOVERIES: dict[str, tuple[tuple[Step, ...], tuple[str, ...]]] = {
    **{name: (steps, (G, P, C, K1, K2)) for name, (steps, _) in INLINE_STEPS.items()},
    **{name: (steps, (H, Q, L)) for name, (steps, _) in LEAF_STEPS.items()},
    **{name: (steps, (H, Q, L)) for name, steps in SNAPSHOTS.items()},
}
# One of each kind; the others are for the long run.
FEW = [
    "the copy was killed while the parent grew",
    "one is relinked in part",
    "the parent has its name",
    "renamed and being made",
]


async def sweep_recovery(tmp_path: Path, leases: Leases, chains: Chains, name: str, per_point: int) -> None:
    steps, uuids = RECOVERIES[name]
    sweep = Sweep(tmp_path, leases, chains.place(tmp_path / "sr", *uuids))
    for step in steps:
        step(sweep.root)
    await sweep.run(recover_journals, per_point)


@pytest.mark.parametrize("name", FEW)
async def test_a_recovery_that_crashed_is_done_again(
    tmp_path: Path, leases: Leases, chains: Chains, name: str
) -> None:
    await sweep_recovery(tmp_path, leases, chains, name, per_point=5 if "name" in name else 1)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RECOVERIES)
async def test_a_recovery_that_crashed_is_done_again_in_many_ways(
    tmp_path: Path, leases: Leases, chains: Chains, name: str
) -> None:
    await sweep_recovery(tmp_path, leases, chains, name, per_point=8)


@pytest.mark.parametrize("work", [relink_inline, relink_leaf])
async def test_a_relink_that_fails_anywhere_is_finished_or_undone(
    tmp_path: Path, leases: Leases, chains: Chains, work: Work
) -> None:
    for number in itertools.count():
        root = tmp_path / str(number)
        expected = chains.place(root)
        merge(image(root, C), image(root, P))
        merge(image(root, L), image(root, Q))
        files = FailingOnce(number, errno.EIO)
        try:
            work(SRDirectory(str(root)), files)
        except OSError as error:
            assert error.errno == errno.EIO
        assert_sound(root, await attach_and_scan(root, leases), expected, number, libvhdi=False)
        if files.left >= 0:
            assert number > 5
            return


async def test_a_leaf_relink_that_fails_is_undone_at_once_or_done(tmp_path: Path, chains: Chains) -> None:
    outcomes = set()
    for number in itertools.count():
        root = tmp_path / str(number)
        chains.place(root, H, Q, L)
        merge(image(root, L), image(root, Q))
        files = FailingOnce(number, errno.EIO)
        failed = False
        try:
            relink_leaf(SRDirectory(str(root)), files)
        except OSError:
            failed = True
        there = {path.name for path in root.glob("*_*")} | {path.stem for path in root.glob("0*.vhd")}
        # A parent that stays is hidden again; what is left of a success is a file that nobody needs.
        assert there - {f"OLD_{L}.vhd", f"leaf_{L}"} == ({H, Q, L} if failed else {H, L})
        assert not failed or there == {H, Q, L}
        outcomes.add(failed)
        if files.left >= 0:
            assert outcomes == {True, False}
            return
