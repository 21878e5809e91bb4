"""Files that are renamed, and requests that end, between two steps of taking a lease.

A lease is of the files that have the names at its last step, and what ends early leaves no descriptor open.
"""

import os
import shutil
from pathlib import Path

import pytest
import trio

from gateway.core.leases import LeaseMode, Leases, Step
from gateway.images.vhd.create import create_dynamic
from tests.core.lease_files import (
    HOLDER,
    calling_at,
    content_of,
    make_chain,
    make_image,
    open_images,
    rename_in_another_process,
    until_wanted,
)

pytestmark = pytest.mark.usefixtures("no_descriptor_stays_open")
READ, REPLACE, WRITE = LeaseMode.READ, LeaseMode.REPLACE, LeaseMode.WRITE
STEPS: tuple[Step, ...] = ("resolved", "granted", "locked", "checked")


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
