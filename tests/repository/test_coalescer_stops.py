"""What keeps the coalescer from merging, or stops it in the middle, and how it goes on after that."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import LeaseMode
from gateway.core.task import Task, TaskStatus
from gateway.images.vhd.create import create_dynamic, set_hidden
from gateway.repository.coalesce_work import Work
from gateway.repository.coalescer import PAUSED_KEY
from gateway.repository.scan import ScanResult
from tests.repository.coalesce_house import (
    BLOCKS,
    MIB,
    PATTERN,
    UUID,
    Gate,
    House,
    OpenHouse,
    leased,
    make_copyable,
    told,
    until,
)
from tests.repository.vdis import content, make, root_of


async def test_while_a_file_cannot_be_read_nothing_is_merged_and_all_say_why(
    house: House, tmp_path: Path
) -> None:
    inventory = house.inventory
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    await inventory.vdi_destroy(taken, wait=5)
    await house.settled(sr)
    taken = await inventory.vdi_snapshot(ref)
    async with leased(house, ref, LeaseMode.READ):
        await inventory.vdi_destroy(taken)
        strange = root_of(inventory, sr) / f"{UUID}.vhd"
        strange.write_bytes(b"no image")
        await house.settled(sr)
    await house.settled(sr)
    assert len(house.chain(ref)) == 2
    uuid = inventory.records.srs.get(sr).uuid
    assert f"{UUID}.vhd" in inventory.sr_coalesce_state(sr)[uuid]
    with pytest.raises(XenAPIError, match=f"{UUID}.vhd"):
        await inventory.sr_coalesce(sr)
    strange.unlink()
    await inventory.sr_coalesce(sr)
    assert len(house.chain(ref)) == 1
    assert inventory.sr_coalesce_state(sr) == {}


@pytest.mark.parametrize("key", ["gc", "coalesce", "leaf-coalesce", PAUSED_KEY])
async def test_what_the_sr_says_is_obeyed_at_once(house: House, tmp_path: Path, key: str) -> None:
    inventory = house.inventory
    sr, ref = await make(inventory, tmp_path)
    value = "true" if key == PAUSED_KEY else "false"
    await inventory.records.srs.change(sr, other_config={key: value})
    taken = await inventory.vdi_snapshot(ref)
    await inventory.vdi_destroy(taken)
    await house.settled(sr)
    assert len(house.chain(ref)) == 2
    (state,) = inventory.sr_coalesce_state(sr).values()
    assert ("paused" if key == PAUSED_KEY else f"other_config {key} is false") in state
    assert house.coalesced() == []
    if key in ("gc", PAUSED_KEY):
        with pytest.raises(XenAPIError, match="OPERATION_NOT_ALLOWED"):
            await inventory.sr_coalesce(sr)
    await inventory.records.srs.change(sr, other_config={})
    await told(house, lambda: bool(house.coalesced()) and house.coalesced()[0].status.is_final)
    assert len(house.chain(ref)) == 1


async def test_a_pause_stops_a_copy_lasts_over_a_restart_and_ends_where_it_began(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    gate = Gate()
    async with open_house(files=gate) as house:
        gate.closed = True
        sr, ref = await make_copyable(house, tmp_path)
        await gate.arrived()
        await house.inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
        await house.interrupted(sr)
        gate.stay_open()
        await house.settled(sr)
        assert 0 < len(gate.offsets) < BLOCKS
        assert [task.status for task in house.coalesced()] == [TaskStatus.CANCELLED]
        assert house.coalesced()[0].other_config["reason"] == "coalescing was paused"
        await house.assert_records_are_true(sr)
    async with open_house() as house:
        await house.settled(sr)
        assert len(house.chain(ref)) == 2
        await house.inventory.records.srs.change(sr, other_config={})
        await told(house, lambda: len(house.coalesced()) == 2 and house.coalesced()[1].status.is_final)
        assert content(house.inventory, ref)[::MIB] == PATTERN
        assert len(house.chain(ref)) == 1


@pytest.mark.parametrize("left", ["something to merge", "garbage"])
async def test_a_pause_that_comes_while_it_looks_for_work_counts(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    inventory = house.inventory
    sr, ref = await make(inventory, tmp_path)
    repository, scan = inventory.repository(sr), inventory.repository(sr).scan
    await inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
    if left == "garbage":
        create_dynamic(str(root_of(inventory, sr) / f"{UUID}.vhd"), 4 * MIB)
        set_hidden(str(root_of(inventory, sr) / f"{UUID}.vhd"), True)
    else:
        await inventory.vdi_destroy(await inventory.vdi_snapshot(ref))
    files = sorted(os.listdir(root_of(inventory, sr)))

    async def scan_and_pause() -> ScanResult:
        found = await scan()
        await inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(repository, "scan", scan_and_pause)
        await inventory.records.srs.change(sr, other_config={})
        await house.settled(sr)
    assert house.coalesced() == []
    assert sorted(os.listdir(root_of(inventory, sr))) == files


async def test_a_pause_that_comes_while_a_task_is_made_ends_it(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, create = house.inventory, house.tasks.create
    sr, ref = await make(inventory, tmp_path)

    async def create_and_pause(*arguments: Any, **named: Any) -> Task:
        task = await create(*arguments, **named)
        await inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
        house.coalescer(sr).switches_may_have_changed()
        await trio.lowlevel.checkpoint()
        return task

    monkeypatch.setattr(house.tasks, "create", create_and_pause)
    await inventory.vdi_destroy(await inventory.vdi_snapshot(ref))
    await told(house, lambda: bool(house.coalesced()) and house.coalesced()[0].status.is_final)
    (task,) = house.coalesced()
    assert (task.status, task.other_config["reason"]) == (TaskStatus.CANCELLED, "coalescing was paused")
    assert len(house.chain(ref)) == 2


async def test_a_copy_that_fails_is_told_and_left_alone_until_somebody_asks(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    gate = Gate()
    async with open_house(files=gate) as house:
        gate.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sr, ref = await make_copyable(house, tmp_path)
        await house.coalescer(sr).answered()
        (task,) = house.coalesced()
        assert (task.status, task.error_info[0]) == (TaskStatus.FAILURE, "SR_FULL")
        (state,) = house.inventory.sr_coalesce_state(sr).values()
        assert "it failed" in state
        assert "no space left" in state
        tried = len(gate.offsets)
        house.coalescer(sr).switches_may_have_changed()
        assert content(house.inventory, ref)[::MIB] == PATTERN
        assert [path.name for path in root_of(house.inventory, sr).glob("*_*")] == []
        assert len(gate.offsets) == tried
        gate.failure = None
        await house.inventory.sr_coalesce(sr)
        assert [task.status for task in house.coalesced()] == [TaskStatus.FAILURE, TaskStatus.SUCCESS]
        assert content(house.inventory, ref)[::MIB] == PATTERN


async def test_a_cancelled_merge_stops_at_the_next_block_and_is_not_begun_again_unasked(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    gate = Gate()
    async with open_house(files=gate) as house:
        gate.closed = True
        sr, ref = await make_copyable(house, tmp_path)
        await gate.arrived()
        await house.tasks.cancel(house.coalesced()[0].ref)
        gate.stay_open()
        await told(house, lambda: house.coalesced()[0].status is TaskStatus.CANCELLED)
        assert len(gate.offsets) == 1
        (state,) = house.inventory.sr_coalesce_state(sr).values()
        assert "its task was cancelled" in state
        await house.settled(sr)
        assert house.coalesced()[1].status is TaskStatus.SUCCESS
        assert content(house.inventory, ref)[::MIB] == PATTERN


@pytest.mark.parametrize("how", ["unplug", "stop"])
async def test_an_sr_is_let_go_of_at_the_next_block_and_merged_later(
    open_house: OpenHouse, tmp_path: Path, how: str
) -> None:
    gate = Gate()
    async with open_house(files=gate) as house:
        gate.closed = True
        sr, ref = await make_copyable(house, tmp_path)
        (pbd,) = house.inventory.records.pbds_of_sr(sr)
        await gate.arrived()
        root = root_of(house.inventory, sr)
        if how == "stop":
            house.when_cancelled(gate.stay_open)
        else:
            coalescer = house.coalescer(sr)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(house.inventory.pbd_unplug, pbd.ref)
                await until(lambda: coalescer._scope.cancel_called)
                gate.stay_open()
    assert len(gate.offsets) < BLOCKS
    assert [path.name for path in root.glob("*_*")] == []
    async with open_house() as house:
        assert house.coalesced()[0].status is TaskStatus.FAILURE
        await house.inventory.pbd_plug(pbd.ref)
        await house.settled(sr)
        assert content(house.inventory, ref)[::MIB] == PATTERN
        assert len(house.chain(ref)) == 1


async def test_a_merge_whose_task_cannot_be_changed_ends_with_its_task(
    open_house: OpenHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_memory(_work: Work, *_arguments: object, **_more: object) -> None:
        raise MemoryError

    async with open_house() as house:
        with monkeypatch.context() as patch, trio.fail_after(20):
            patch.setattr(Work, "note", no_memory)
            sr, ref = await make_copyable(house, tmp_path)
            await house.coalescer(sr).answered()
        await house.settled(sr)
        assert [task.status for task in house.coalesced()] == [TaskStatus.SUCCESS]
        assert content(house.inventory, ref)[::MIB] == PATTERN


async def test_an_error_that_nobody_foresaw_ends_one_attempt_and_not_the_gateway(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    gate = Gate()
    async with open_house(files=gate) as house:
        gate.failure = RuntimeError("nobody foresaw it")
        sr, ref = await make_copyable(house, tmp_path)
        await house.coalescer(sr).answered()
        with pytest.raises(XenAPIError, match="nobody foresaw it"):
            await house.inventory.sr_coalesce(sr)
        uuid = house.inventory.records.srs.get(sr).uuid
        assert "nobody foresaw it" in house.inventory.sr_coalesce_state(sr)[uuid]
        assert {task.error_info[0] for task in house.coalesced()} == {"INTERNAL_ERROR"}
        gate.failure = None
        await house.inventory.sr_coalesce(sr)
        assert content(house.inventory, ref)[::MIB] == PATTERN
        assert len(house.chain(ref)) == 1
