import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from gateway.core.errors import XenAPIError
from gateway.core.leases import Blocker, Holder, Lease, LeaseMode, LeaseRefused, Leases, Step
from gateway.core.limits import Limits
from gateway.images.chain import ChainFiles, open_chain_files
from gateway.images.files import identity_of
from gateway.images.vhd.create import create_differencing, create_dynamic
from gateway.images.vhd.image import open_vhd

READ, REPLACE, WRITE = LeaseMode.READ, LeaseMode.REPLACE, LeaseMode.WRITE
STEPS: tuple[Step, ...] = ("resolved", "granted", "locked", "checked")
HOLDER = Holder("root", "export_raw_vdi", "OpaqueRef:vdi")
COALESCE = Holder("the gateway", "coalesce", "OpaqueRef:other")


@pytest.fixture
def image(tmp_path: Path) -> str:
    return make_image(tmp_path / "disk.raw", b"old")


@pytest.fixture(autouse=True)
def no_descriptor_stays_open() -> Iterator[None]:
    before = open_images()
    yield
    assert open_images() == before


def make_image(path: Path, content: bytes) -> str:
    path.write_bytes(content * 512)
    return str(path)


def open_images() -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
        if ".raw" in target or ".vhd" in target:
            found.append(target)
    return found


def rename_in_another_process(source: str, target: str) -> None:
    script = "import os, sys; os.rename(sys.argv[1], sys.argv[2])"
    subprocess.run([sys.executable, "-ISc", script, source, target], check=True)


class ForeignUser:
    """Another process that has the file open as QEMU would, until it is ended."""

    SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from gateway.images.file_locks import FileUse, lock_file
fd = os.open(sys.argv[2], os.O_RDONLY)
lock_file(fd, FileUse[sys.argv[3]], sys.argv[2])
print("locked", flush=True)
sys.stdin.read()
"""

    def __init__(self, path: str, use: str) -> None:
        root = str(Path(__file__).parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", self.SCRIPT, root, path, use],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"locked\n"

    def end(self) -> None:
        self.process.communicate()


def calling_at(step: Step, call: Callable[[], object]) -> Callable[[Step], Awaitable[None]]:
    pending = [call]

    async def at(reached: Step) -> None:
        if reached == step and pending:
            await trio.to_thread.run_sync(pending.pop())

    return at


def content_of(chain_fd: int) -> bytes:
    return os.pread(chain_fd, 3, 0)


@pytest.mark.parametrize("step", STEPS[:3])
@pytest.mark.parametrize("mode", list(LeaseMode))
async def test_a_rename_between_two_steps_leads_to_the_new_file(
    image: str, tmp_path: Path, step: Step, mode: LeaseMode
) -> None:
    new = make_image(tmp_path / "new", b"new")
    leases = Leases(step=calling_at(step, lambda: rename_in_another_process(new, image)))
    async with leases.hold(image, mode, HOLDER) as lease:
        assert content_of(lease.chain.nodes[0].fd) == b"new"
        assert lease.chain.nodes[0].identity.inode == os.stat(image).st_ino
        assert leases.holders_of(lease.chain.nodes[0].identity) == (HOLDER,)
        assert len(leases.holders_for(HOLDER.vdi)) == 1


async def test_who_would_not_wait_is_not_refused_because_of_a_rename(image: str, tmp_path: Path) -> None:
    new = make_image(tmp_path / "new", b"new")
    leases = Leases(step=calling_at("granted", lambda: rename_in_another_process(new, image)))
    async with leases.hold(image, WRITE, HOLDER, wait=0) as lease:
        assert content_of(lease.chain.nodes[0].fd) == b"new"


async def test_a_close_that_fails_lets_the_next_one_in_all_the_same(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases()
    lease = await leases.acquire(image, WRITE, HOLDER)
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        lease.release()
        await lease.released()
    async with leases.hold(image, WRITE, HOLDER, wait=0):
        pass


async def test_a_rename_after_the_last_step_leaves_the_lease_with_the_old_file(
    image: str, tmp_path: Path
) -> None:
    new = make_image(tmp_path / "new", b"new")
    leases = Leases(step=calling_at("checked", lambda: rename_in_another_process(new, image)))
    async with leases.hold(image, READ, HOLDER) as lease:
        assert content_of(lease.chain.nodes[0].fd) == b"old"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_what_ends_between_two_steps_leaves_no_descriptor_and_no_grant(
    image: str, step: Step, how: str
) -> None:
    async def at(reached: Step) -> None:
        if reached == step and not ended:
            ended.append(reached)
            if how == "failed":
                raise RuntimeError("on purpose")
            scope.cancel()
            await trio.lowlevel.checkpoint()

    ended: list[Step] = []
    leases = Leases(step=at)
    scope = trio.CancelScope()
    try:
        with scope:
            await leases.acquire(image, WRITE, HOLDER)
    except RuntimeError:
        assert how == "failed"
    assert ended == [step]
    assert open_images() == []
    async with leases.hold(image, WRITE, HOLDER, wait=0):
        pass


async def test_a_cancellation_during_any_await_leaves_no_descriptor(image: str) -> None:
    # Cancelled before the first checkpoint, before the second and so on, until nothing is left to cancel.
    leases = Leases()
    for checkpoints in range(60):
        with trio.CancelScope() as scope:
            await acquire_with_cancellation_after(leases, image, checkpoints, scope)
        assert open_images() == []
        if not scope.cancelled_caught:
            break
    else:
        pytest.fail("an acquire has fewer steps than that")
    assert leases.holders_for(HOLDER.vdi) == ()


async def acquire_with_cancellation_after(
    leases: Leases, image: str, checkpoints: int, scope: trio.CancelScope
) -> None:
    class Counter(trio.abc.Instrument):
        def __init__(self, task: trio.lowlevel.Task) -> None:
            self.task = task
            self.left = checkpoints

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task is self.task:
                self.left -= 1
                if self.left == 0:
                    scope.cancel()

    counter = Counter(trio.lowlevel.current_task())
    trio.lowlevel.add_instrument(counter)
    try:
        lease = await leases.acquire(image, READ, HOLDER)
        trio.lowlevel.remove_instrument(counter)
        lease.release()
        with trio.CancelScope(shield=True):
            await lease.released()
    except BaseException:
        trio.lowlevel.remove_instrument(counter)
        raise


async def test_a_refusal_names_the_holder(image: str) -> None:
    leases = Leases()
    async with leases.hold(image, WRITE, Holder("root", "import_raw_vdi", "OpaqueRef:vdi", "OpaqueRef:task")):
        with pytest.raises(XenAPIError) as refused:
            await leases.acquire(image, READ, HOLDER, wait=0)
    assert refused.value.error_info == [
        "VDI_IN_USE",
        "OpaqueRef:vdi",
        "import_raw_vdi by root, task OpaqueRef:task",
    ]


async def test_a_waiting_request_gets_the_lease_when_it_ends(image: str, nursery: trio.Nursery) -> None:
    leases = Leases()
    first = await leases.acquire(image, WRITE, HOLDER)
    got = trio.Event()

    async def wait() -> None:
        async with leases.hold(image, WRITE, HOLDER):
            got.set()

    nursery.start_soon(wait)
    first.release()
    await got.wait()


async def test_a_refusal_says_who_are_all_in_the_way_and_since_when(tmp_path: Path) -> None:
    parent, child = make_chain(tmp_path)
    leases = Leases()
    began = datetime.now(UTC)
    other = replace(HOLDER, who="somebody else")
    async with leases.hold(child, READ, HOLDER), leases.hold(parent, READ, other):
        held = datetime.now(UTC)
        with pytest.raises(LeaseRefused) as refused:
            await leases.acquire(parent, WRITE, COALESCE, wait=0)
    blockers = refused.value.blockers
    assert [blocker.holder for blocker in blockers] == [HOLDER, other]
    assert refused.value.params[1] == str(blockers[0]) == str(HOLDER)
    assert began <= blockers[0].since <= blockers[1].since <= held


async def test_a_file_renamed_over_while_its_lease_is_waited_for_leads_to_the_new_one(
    image: str, tmp_path: Path
) -> None:
    new = make_image(tmp_path / "new", b"new")
    leases = Leases()
    first = await leases.acquire(image, WRITE, HOLDER)
    got: list[bytes] = []

    async def wait() -> None:
        async with leases.hold(image, WRITE, HOLDER) as lease:
            got.append(content_of(lease.chain.nodes[0].fd))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await until_wanted(first)
        rename_in_another_process(new, image)
        first.release()
    assert got == [b"new"]


async def until_wanted(lease: Lease) -> None:
    # It is told to threads, which cannot wait for events of trio.
    while not lease.wanted:
        await trio.lowlevel.checkpoint()


async def test_a_lease_is_wanted_while_somebody_waits_for_its_files(image: str) -> None:
    leases = Leases()
    async with leases.hold(image, READ, HOLDER) as lease:
        async with leases.hold(image, READ, HOLDER):
            assert not lease.wanted
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.acquire(image, WRITE, HOLDER, wait=0)
        assert not lease.wanted
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leases.acquire, image, WRITE, HOLDER)
            await until_wanted(lease)
            assert await trio.to_thread.run_sync(lambda: lease.wanted)
            nursery.cancel_scope.cancel()
        assert not lease.wanted


async def test_a_lease_that_goes_first_is_not_wanted_before_its_time_is_over(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    parent, child = make_chain(tmp_path)
    leases = Leases()
    until = trio.current_time() + 10
    async with (
        leases.hold(child, READ, HOLDER) as ordinary,
        leases.hold(parent, READ, COALESCE, until=until) as first,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lambda: leases.acquire(parent, WRITE, HOLDER, wait=60))
        await until_wanted(ordinary)
        assert not await trio.to_thread.run_sync(lambda: first.wanted)
        mock_clock.jump(10)
        assert await trio.to_thread.run_sync(lambda: first.wanted)
        nursery.cancel_scope.cancel()


async def test_who_is_refused_because_of_one_that_goes_first_is_told_how_long_at_most(
    image: str, mock_clock: MockClock
) -> None:
    leases = Leases()
    async with leases.hold(image, WRITE, COALESCE, until=trio.current_time() + 30.5):
        mock_clock.jump(10)
        with pytest.raises(LeaseRefused) as refused:
            await leases.acquire(image, READ, HOLDER, wait=0)
        assert refused.value.error_info == [
            "OTHER_OPERATION_IN_PROGRESS",
            "VDI",
            HOLDER.vdi,
            "coalesce by the gateway, at most 21 seconds more",
        ]
        assert "(coalesce by the gateway, at most 21 seconds more)" in refused.value.message
        assert [blocker.holder for blocker in refused.value.blockers] == [COALESCE]
        mock_clock.jump(21)
        with pytest.raises(LeaseRefused, match="VDI_IN_USE"):
            await leases.acquire(image, READ, HOLDER, wait=0)


async def test_one_that_goes_first_and_still_waits_is_the_reason_for_those_behind_it(
    image: str,
) -> None:
    leases = Leases()
    async with leases.hold(image, READ, HOLDER) as reading, trio.open_nursery() as nursery:
        until = trio.current_time() + 300
        nursery.start_soon(lambda: leases.acquire(image, WRITE, COALESCE, wait=300, until=until))
        await until_wanted(reading)
        for mode, names in ((READ, [COALESCE]), (WRITE, [COALESCE, HOLDER])):
            with pytest.raises(LeaseRefused, match="OTHER_OPERATION_IN_PROGRESS") as refused:
                await leases.acquire(image, mode, HOLDER, wait=0)
            assert [blocker.holder for blocker in refused.value.blockers] == names
        nursery.cancel_scope.cancel()


async def test_who_was_refused_without_a_wait_is_told_when_to_try_again_but_not_of_itself(
    image: str,
) -> None:
    leases = Leases()
    foreign = ForeignUser(image, "READ")
    before = leases.releases
    with pytest.raises(LeaseRefused) as refused:
        await leases.acquire(image, WRITE, COALESCE, wait=0)
    foreign.end()
    assert refused.value.blockers == (
        Blocker(None, refused.value.blockers[0].since, refused.value.params[1]),
    )
    assert leases.releases == before
    async with leases.hold(image, READ, HOLDER):
        with pytest.raises(LeaseRefused):
            await leases.acquire(image, WRITE, COALESCE, wait=0)
        assert leases.releases == before
    assert await leases.some_release(before) == before + 1
    async with leases.hold(image, WRITE, COALESCE, wait=0):
        pass


async def test_readers_stay_while_a_replacement_is_prepared(image: str) -> None:
    leases = Leases()
    async with leases.hold(image, READ, HOLDER), leases.hold(image, REPLACE, HOLDER, wait=0):
        async with leases.hold(image, READ, HOLDER, wait=0):
            for mode in (REPLACE, WRITE):
                with pytest.raises(XenAPIError, match="VDI_IN_USE"):
                    await leases.acquire(image, mode, HOLDER, wait=0)


async def test_a_foreign_writer_is_waited_for_and_then_named_by_its_file(image: str) -> None:
    foreign = ForeignUser(image, "WRITE")
    leases = Leases(Limits(lease_wait=0.05))
    try:
        with pytest.raises(XenAPIError, match="VDI_IN_USE") as refused:
            await leases.acquire(image, READ, HOLDER)
        assert image in refused.value.params[1]
    finally:
        foreign.end()
    async with leases.hold(image, READ, HOLDER):
        pass


async def test_a_lease_comes_when_the_foreign_reader_ends(image: str) -> None:
    foreign = ForeignUser(image, "READ")
    refusals = 0

    async def at(step: Step) -> None:
        nonlocal refusals
        if step == "resolved":
            refusals += 1
            if refusals == 3:
                await trio.to_thread.run_sync(foreign.end)

    leases = Leases(step=at)
    async with leases.hold(image, WRITE, HOLDER, wait=60):
        assert refusals >= 3


async def test_a_moved_lease_meets_others_at_the_new_file(image: str, tmp_path: Path) -> None:
    leases = Leases()
    new = make_image(tmp_path / "new", b"new")
    async with leases.hold(image, REPLACE, HOLDER) as lease:
        fd = os.open(new, os.O_RDONLY)
        lease.move_to(identity_of(fd))
        os.close(fd)
        os.rename(new, image)
        for mode in (REPLACE, WRITE):
            with pytest.raises(XenAPIError, match="VDI_IN_USE"):
                await leases.acquire(image, mode, HOLDER, wait=0)
        async with leases.hold(image, READ, HOLDER, wait=0) as reading:
            assert content_of(reading.chain.nodes[0].fd) == b"new"
    async with leases.hold(image, WRITE, HOLDER, wait=0):
        pass


async def test_a_disk_keeps_its_files_locked_after_the_release(image: str) -> None:
    leases = Leases()
    lease = await leases.acquire(image, WRITE, HOLDER)
    disk = await trio.to_thread.run_sync(lease.open_disk)
    lease.release()
    lease.release()
    await lease.released()
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await leases.acquire(image, READ, HOLDER, wait=0)
    disk.close()
    async with leases.hold(image, READ, HOLDER, wait=0) as reading:
        reading.release()
        with pytest.raises(ValueError, match="no descriptors"):
            reading.open_disk()


async def test_resolving_waits_for_the_lock_of_the_repository_no_longer_than_allowed(
    image: str, nursery: trio.Nursery
) -> None:
    leases = Leases()
    renaming = trio.Lock()

    async def rename(task_status: trio.TaskStatus[None]) -> None:
        async with renaming:
            task_status.started()
            await trio.sleep_forever()

    await nursery.start(rename)
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await leases.acquire(image, READ, HOLDER, wait=0.01, resolving=renaming)
    nursery.cancel_scope.cancel()


async def test_the_lock_of_the_repository_is_held_only_while_resolving(image: str) -> None:
    renaming = trio.Lock()
    held: list[bool] = []

    async def at(_step: Step) -> None:
        held.append(renaming.locked())

    async with Leases(step=at).hold(image, READ, HOLDER, resolving=renaming):
        assert held == [False] * 4


def make_chain(directory: Path) -> tuple[str, str]:
    parent, child = str(directory / "parent.vhd"), str(directory / "child.vhd")
    create_dynamic(parent, 2 << 20)
    make_child(child, parent)
    return parent, child


def make_child(child: str, parent: str) -> None:
    fd = os.open(parent, os.O_RDONLY)
    create_differencing(child, parent, open_vhd(fd, parent))
    os.close(fd)


async def test_a_lease_covers_the_parents_too(tmp_path: Path) -> None:
    parent, child = make_chain(tmp_path)
    leases = Leases()
    async with leases.hold(child, WRITE, HOLDER):
        async with leases.hold(parent, READ, HOLDER, wait=0):
            pass
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.acquire(parent, WRITE, HOLDER, wait=0)
    async with leases.hold(child, WRITE, HOLDER, parents=(WRITE,)):
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.acquire(parent, READ, HOLDER, wait=0)


@pytest.mark.parametrize("step", [None, "resolved"])
async def test_the_first_parents_have_the_modes_asked_for_and_the_rest_is_read(
    tmp_path: Path, step: Step | None
) -> None:
    parent, child = make_chain(tmp_path)
    leaf = str(tmp_path / "leaf.vhd")
    make_child(leaf, child)
    leases = Leases() if step is None else Leases(step=calling_at(step, lambda: None))
    async with leases.hold(leaf, WRITE, HOLDER, parents=(WRITE,)) as lease:
        opened = [fcntl.fcntl(node.fd, fcntl.F_GETFL) & os.O_ACCMODE for node in lease.chain.nodes]
        assert opened == [os.O_RDWR, os.O_RDWR, os.O_RDONLY]
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.acquire(child, READ, HOLDER, wait=0)
        async with leases.hold(parent, READ, HOLDER, wait=0):
            pass
        # Another gateway knows nothing of the table: the locks have to say the same.
        for file in (leaf, child):
            with pytest.raises(XenAPIError, match="VDI_IN_USE"):
                await Leases().acquire(file, READ, HOLDER, wait=0)
        async with Leases().hold(parent, READ, HOLDER, wait=0):
            pass
    async with leases.hold(parent, READ, HOLDER, parents=(WRITE, WRITE)) as lease:
        assert lease.chain.depth == 1


@pytest.mark.parametrize("step", STEPS[:3])
async def test_a_child_relinked_between_two_steps_is_leased_with_its_new_parents(
    tmp_path: Path, step: Step
) -> None:
    parent, child = make_chain(tmp_path)
    alone = str(tmp_path / "alone.vhd")
    create_dynamic(alone, 2 << 20)
    leases = Leases(step=calling_at(step, lambda: rename_in_another_process(alone, child)))
    async with leases.hold(child, READ, HOLDER) as lease:
        assert lease.chain.depth == 1
        async with leases.hold(parent, WRITE, HOLDER, wait=0):
            pass


async def test_a_parent_replaced_between_two_steps_is_noticed(tmp_path: Path) -> None:
    parent, child = make_chain(tmp_path)
    copy = str(tmp_path / "copy")
    shutil.copy(parent, copy)
    leases = Leases(step=calling_at("locked", lambda: rename_in_another_process(copy, parent)))
    async with leases.hold(child, READ, HOLDER) as lease:
        assert lease.chain.nodes[1].identity.inode == os.stat(parent).st_ino


async def kept_over_a_restart(path: str, mode: LeaseMode) -> ChainFiles:
    """The files of a lease as another process has them: a table that is gone granted it."""
    lease = await Leases().acquire(path, mode, HOLDER)
    kept = ChainFiles(
        [replace(node, fd=os.dup(node.fd)) for node in lease.chain.nodes], writable=lease.chain.writable
    )
    await lease.give_away()
    return kept


@pytest.mark.parametrize("mode", [READ, WRITE])
async def test_an_adopted_lease_stands_in_the_way_like_any_other(tmp_path: Path, mode: LeaseMode) -> None:
    parent, child = make_chain(tmp_path)
    kept = await kept_over_a_restart(child, mode)
    leases = Leases()
    lease = await leases.adopt(kept, mode, HOLDER)
    assert leases.holders_for(HOLDER.vdi) == (HOLDER,)
    assert leases.modes_for(HOLDER.vdi) == (mode,)
    for path in (parent, child):
        with pytest.raises(XenAPIError, match="VDI_IN_USE") as refused:
            await leases.acquire(path, WRITE, HOLDER, wait=0)
        assert refused.value.params[1] == str(HOLDER)
    lease.release()
    await lease.released()
    async with leases.hold(child, WRITE, HOLDER, wait=0):
        pass


async def test_files_that_somebody_else_has_locked_since_are_not_adopted(image: str) -> None:
    leases = Leases(Limits(lease_wait=0.05))
    async with leases.hold(image, WRITE, HOLDER):
        never_locked = open_chain_files(image, writable=False)
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.adopt(never_locked, READ, HOLDER)
    assert never_locked.taken_over


async def test_who_was_granted_a_file_but_not_its_locks_does_not_hinder_an_adoption(image: str) -> None:
    kept = await kept_over_a_restart(image, READ)
    adopted: list[str] = []

    async def at(step: Step) -> None:
        if step == "granted" and not adopted:
            lease = await leases.adopt(kept, READ, HOLDER)
            adopted.append(lease.leaf_path)

    leases = Leases(step=at)
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await leases.acquire(image, WRITE, HOLDER, wait=0)
    assert adopted == [image]
    assert leases.holders_of(kept.nodes[0].identity) == (HOLDER,)
    kept.taken_over = False
    kept.close()


async def test_a_lease_whose_files_were_given_away_still_counts(image: str) -> None:
    leases = Leases()
    lease = await leases.acquire(image, WRITE, HOLDER)
    await lease.give_away()
    assert open_images() == []
    with pytest.raises(ValueError, match="no descriptors"):
        await lease.give_away()
    with pytest.raises(ValueError, match="no descriptors"):
        lease.open_disk()
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await leases.acquire(image, READ, HOLDER, wait=0)
    lease.release()
    async with leases.hold(image, READ, HOLDER, wait=0):
        pass
