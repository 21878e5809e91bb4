"""Killed, recovered from, and then the power fails: what only the page cache had of the killed one's work.

A recovery sees all that a killed process did, but not what of it is durable. Before it removes a journal that
has to be made so, for whoever finds no journal after the power failure believes the files.
"""

import itertools
import os
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

import pytest
import trio

from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.images.files import Buffer, FileCalls
from gateway.images.vhd.create import create_dynamic, create_fixed, set_hidden
from gateway.images.vhd.relink import restore_header, set_parent
from gateway.repository.directory import (
    SRDirectory,
    make_directory,
    make_service_directory,
    read_marker,
    write_marker,
)
from gateway.repository.empty_image import create_empty_image
from gateway.repository.fork import Fork, recover_forks, unfinished_forks
from gateway.repository.intended import read_intended
from gateway.repository.journal_recovery import recover_journals
from gateway.repository.staging import sweep_staging
from tests.crash import CrashState, RecordingFileCalls
from tests.images.disks import content, make_child, noise, put
from tests.images.merges import merge
from tests.images.test_vhd_relink import whole_header, with_one_locator_and_no_name
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
from tests.repository.conftest import SR_UUID
from tests.repository.test_relink_crash import relink_inline, relink_leaf

BASE, CHILD = (f"{number:08d}-0000-4000-8000-000000000000" for number in (301, 302))
HOLDER = Holder("the test", "snapshot", "OpaqueRef:leaf")
STATES = 6

Work = Callable[[SRDirectory, FileCalls, Leases], Awaitable[None]]
Place = Callable[[Chains, Path], Bytes]


class Killed(BaseException):
    """The process is gone."""


class Mortal(RecordingFileCalls):
    """Its process is killed before the changing call of this number; nothing is done from then on."""

    def __init__(self, root: Path, calls: float) -> None:
        super().__init__(root)
        self.left = calls

    def _breathe(self) -> None:
        if self._inside_a_call:
            return
        if self.left <= 0:
            raise Killed
        self.left -= 1

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if flags & (os.O_CREAT | os.O_TRUNC):
            self._breathe()
        return super().open(path, flags, mode)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        self._breathe()
        super().pwrite(fd, data, offset)

    def datasync(self, fd: int) -> None:
        self._breathe()
        super().datasync(fd)

    def sync(self, fd: int) -> None:
        self._breathe()
        super().sync(fd)

    def rename(self, source: str, target: str) -> None:
        self._breathe()
        super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        self._breathe()
        super().link(source, target)

    def unlink(self, path: str) -> None:
        self._breathe()
        super().unlink(path)

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        self._breathe()
        super().mkdir(path, mode)

    def sync_directory(self, path: str) -> None:
        self._breathe()
        super().sync_directory(path)


def states_after(
    files: RecordingFileCalls, calls: int, into: Path, per_point: int = STATES
) -> Iterator[CrashState]:
    """The power fails once so many calls were made; the kernel wrote nothing back by itself before."""
    states = files.power_states(into, random.Random(1), per_point)
    return (state for state in states if state.calls >= calls)


def at_the_end(files: RecordingFileCalls, into: Path) -> Iterator[CrashState]:
    """The power fails after all that was recorded."""
    return states_after(files, len(files.calls), into)


def recover(directory: SRDirectory, files: FileCalls) -> None:
    """What an attach does before anybody else sees the SR."""
    recover_forks(directory, files)
    read_intended(directory, files)
    recover_journals(directory, files)
    sweep_staging(directory, files)


class Story:
    """Work on an SR that is killed, and recovered from, before the power fails."""

    def __init__(self, tmp_path: Path, leases: Leases, chains: Chains, place: Place, work: Work) -> None:
        self.tmp_path = tmp_path
        self.leases = leases
        self.chains = chains
        self.place = place
        self.work = work

    async def run(self, firsts: Iterable[int], *, twice: bool) -> int:
        """Kill the work before each of these calls, and with `twice` the recovery before each of its own.

        How many states there were until the work had come to its end.
        """
        count = 0
        for first in firsts:
            for second in itertools.count() if twice else (float("inf"),):
                root = self.tmp_path / f"{first}-{second}"
                expected = self.place(self.chains, root)
                files = Mortal(root, first)
                directory = SRDirectory(str(root))
                try:
                    await self.work(directory, files, self.leases)
                except Killed:
                    files.left = second
                else:
                    return count
                was_killed = False
                try:
                    recover(directory, files)
                except Killed:
                    was_killed = True
                    files.left = float("inf")
                    recover(directory, files)
                states = at_the_end(files, self.tmp_path / "states" / root.name)
                while (state := await trio.to_thread.run_sync(next, states, None)) is not None:
                    count += 1
                    story = f"killed before call {first}, and {second} of the recovery: {state}"
                    found = await attach_and_scan(state.directory, self.leases)
                    strict = self.place is not foreign
                    assert_sound(state.directory, found, expected, story, libvhdi=False, warnings=strict)
                if not was_killed:
                    break
        return count


def inline(chains: Chains, root: Path) -> Bytes:
    expected = chains.place(root, G, P, C, K1, K2)
    merge(image(root, C), image(root, P))
    return expected


def foreign(chains: Chains, root: Path) -> Bytes:
    """A child of which a relink changes more than a sector of its header."""
    expected = chains.place(root, G, P, C, K1, K2)
    with_one_locator_and_no_name(image(root, K1))
    merge(image(root, C), image(root, P))
    return expected


def leaf(chains: Chains, root: Path) -> Bytes:
    expected = chains.place(root, H, Q, L)
    merge(image(root, L), image(root, Q))
    return expected


def leaf_on_fixed(chains: Chains, root: Path) -> Bytes:
    chains.place(root, H)
    image(root, H).unlink()
    create_fixed(str(image(root, Q)), SIZE)
    put(image(root, Q), (0, noise(2 * BLOCK)))
    make_child(image(root, L), image(root, Q), block_size=BLOCK)
    put(image(root, L), (BLOCK + GRAIN, noise(BLOCK, 2)))
    set_hidden(str(image(root, Q)), True)
    expected = {L: content(image(root, L))}
    merge(image(root, L), image(root, Q))
    return expected


def unmerged(chains: Chains, root: Path) -> Bytes:
    return chains.place(root, H, Q, L)


async def relinks_inline(directory: SRDirectory, files: FileCalls, _leases: Leases) -> None:
    relink_inline(directory, files)


async def relinks_leaf(directory: SRDirectory, files: FileCalls, _leases: Leases) -> None:
    relink_leaf(directory, files)


async def forks(directory: SRDirectory, files: FileCalls, leases: Leases) -> None:
    path = directory.image(L, "vhd")
    async with leases.hold(path, LeaseMode.REPLACE, HOLDER, wait=0) as lease:
        fork = Fork(directory, lease, base=BASE, child=CHILD, files=files)
        fork.prepare()
        try:
            fork.publish()
        except Killed:
            if not is_forked(directory):
                raise


def is_forked(directory: SRDirectory) -> bool:
    """Whether all was done, only that nobody had been told yet."""
    return os.path.lexists(directory.image(CHILD, "vhd")) and not unfinished_forks(directory)


# Of a recovery that is killed too a few are enough; the rest is for the long run.
FEW = {
    "inline": (inline, relinks_inline, (15, 16, 17, 21, 22, 23), False),
    "leaf": (leaf, relinks_leaf, (6, 9), True),
    "leaf on fixed": (leaf_on_fixed, relinks_leaf, (6, 9), True),
    "fork": (unmerged, forks, (15, 16, 20), True),
}


@pytest.mark.parametrize("name", FEW)
async def test_what_was_recovered_from_outlasts_the_power(
    tmp_path: Path, leases: Leases, chains: Chains, name: str
) -> None:
    place, work, firsts, twice = FEW[name]
    assert await Story(tmp_path, leases, chains, place, work).run(firsts, twice=twice) > 20


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("place", "work"),
    [
        (inline, relinks_inline),
        (foreign, relinks_inline),
        (leaf, relinks_leaf),
        (leaf_on_fixed, relinks_leaf),
        (unmerged, forks),
    ],
)
async def test_what_was_recovered_from_outlasts_the_power_whenever_it_was_killed(
    tmp_path: Path, leases: Leases, chains: Chains, place: Place, work: Work
) -> None:
    assert await Story(tmp_path, leases, chains, place, work).run(itertools.count(), twice=True) > 200


async def test_a_journal_that_only_memory_has_is_durable_before_it_is_gone_by(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    files, expected = killed_with_a_journal(tmp_path, chains)
    calls = len(files.calls)
    recover(SRDirectory(str(files.root)), files)
    states = states_after(files, calls + 1, tmp_path / "states", 2)
    while (state := await trio.to_thread.run_sync(next, states, None)) is not None:
        found = await attach_and_scan(state.directory, leases)
        assert_sound(state.directory, found, expected, state, libvhdi=False)
        # All children are on the same one.
        assert {found.images[uuid].parent for uuid in (K1, K2)} in ({C}, {P}), state


def killed_with_a_journal(tmp_path: Path, chains: Chains) -> tuple[Mortal, Bytes]:
    """The SR of a relink that was killed as soon as its journal had its name, before any sync of that."""
    for number in itertools.count():
        root = tmp_path / str(number)
        expected = inline(chains, root)
        files = Mortal(root, number)
        with pytest.raises(Killed):
            relink_inline(SRDirectory(str(root)), files)
        if (root / f"relink_{C}").exists():
            files.left = float("inf")
            return files, expected
    raise AssertionError


def test_a_header_that_is_whole_in_memory_is_durable_before_its_copy_goes(tmp_path: Path) -> None:
    torn = 0
    for number in itertools.count():
        root = tmp_path / str(number)
        root.mkdir()
        lower, upper, child, keep = (root / name for name in ("a.vhd", "b.vhd", "l.vhd", "keep"))
        create_dynamic(str(lower), 4 << 20)
        make_child(upper, lower)
        make_child(child, upper)
        with_one_locator_and_no_name(child)
        files = Mortal(root, number)
        try:
            set_parent(str(child), str(lower), keep=str(keep), files=files)
            break
        except Killed:
            files.left = float("inf")
        if not keep.exists():
            continue
        torn += 1
        restore_header(str(child), str(keep), files)
        states = files.power_states(tmp_path / "states" / str(number), random.Random(1), 40)
        for state in (state for state in states if state.calls >= len(files.calls)):
            restore_header(str(state.directory / "l.vhd"), str(state.directory / "keep"))
            assert whole_header(state.directory / "l.vhd"), f"killed before call {number}: {state}"
    assert torn > 3


def test_an_sr_that_is_made_in_the_directory_of_a_killed_attempt_outlasts_the_power(tmp_path: Path) -> None:
    uuid = "00000401-0000-4000-8000-000000000000"

    def make(directory: SRDirectory, files: FileCalls) -> None:
        make_directory(directory, files)
        make_service_directory(directory, files)
        write_marker(directory, SR_UUID, files)

    for number in range(4):
        place = tmp_path / str(number)
        place.mkdir()
        directory = SRDirectory(str(place / "sr"))
        files = Mortal(place, number)
        with pytest.raises(Killed):
            make(directory, files)
        files.left = float("inf")
        make(directory, files)
        create_empty_image(directory, uuid, 4 << 20, "vhd", files)
        for state in at_the_end(files, tmp_path / "states" / str(number)):
            found = SRDirectory(str(state.directory / "sr"))
            assert read_marker(found) == SR_UUID, f"killed before call {number}: {state}"
            assert os.path.exists(found.image(uuid, "vhd")), f"killed before call {number}: {state}"
