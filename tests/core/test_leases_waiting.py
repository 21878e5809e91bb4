"""Who waits for a lease, who is refused one and what they are told, and when a holder is wanted."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from gateway.core.errors import XenAPIError
from gateway.core.leases import Blocker, Holder, LeaseMode, LeaseRefused, Leases, Step
from gateway.core.limits import Limits
from gateway.images.file_locks import FileUse
from tests.core.lease_files import COALESCE, HOLDER, make_chain, until_wanted
from tests.images.other_process import OtherProcess

pytestmark = pytest.mark.usefixtures("no_descriptor_stays_open")
READ, REPLACE, WRITE = LeaseMode.READ, LeaseMode.REPLACE, LeaseMode.WRITE


def foreign_user(path: str, use: FileUse) -> OtherProcess:
    """Another process that has the file open as QEMU would, until it is ended."""
    process = OtherProcess()
    assert process.ask(use, path) == "locked"
    return process


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
    foreign = foreign_user(image, FileUse.READ)
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


async def test_a_foreign_writer_is_waited_for_and_then_named_by_its_file(image: str) -> None:
    foreign = foreign_user(image, FileUse.WRITE)
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
    foreign = foreign_user(image, FileUse.READ)
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
