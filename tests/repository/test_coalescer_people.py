import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Lease, LeaseMode
from gateway.core.limits import Limits
from gateway.core.task import TaskStatus
from gateway.repository.repository import Repository
from tests.images.disks import make_child, read_all
from tests.repository.coalesce_house import (
    BLOCKS,
    MIB,
    PATTERN,
    Gate,
    House,
    OpenHouse,
    copying,
    leased,
    make_copyable,
    somebody_waits,
    told,
)
from tests.repository.vdis import content, hidden, make, root_of, write

UUID = "00000007-0000-4000-8000-000000000000"


def about(house: House) -> dict[str, str]:
    return house.coalesced()[-1].other_config


async def test_who_asks_for_the_disk_gets_it_after_a_block_and_the_copy_goes_on_where_it_was(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    gate = Gate()
    async with open_house(files=gate, limits=Limits(lease_wait=20)) as house:
        gate.closed = True
        sr, ref = await make_copyable(house, tmp_path)
        for _ in range(2):
            await gate.arrived()
            gate.let_one_go()
        await gate.arrived()
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                async with leased(house, ref, LeaseMode.READ) as lease:
                    assert len(gate.offsets) == 3
                    assert 0 < house.coalesced()[0].progress < 1
                    await told(house, lambda: "blocked-by" in about(house))
                    assert about(house)["blocked-by"] == "export_raw_vdi by curl at 127.0.0.1"
                    assert datetime.fromisoformat(about(house)["blocked-since"]).year > 2000
                    (state,) = house.inventory.sr_coalesce_state(sr).values()
                    assert "waits for export_raw_vdi by curl at 127.0.0.1 since 20" in state
                    disk = await trio.to_thread.run_sync(lease.open_disk)
                    assert read_all(disk)[: 2 * MIB] == b"\x20" * (2 * MIB)
                    disk.close()

            nursery.start_soon(read)
            await somebody_waits(house)
            gate.let_one_go()
        gate.stay_open()
        await house.settled(sr)
        assert len(gate.offsets) == len(set(gate.offsets)) == BLOCKS
        (task,) = house.coalesced()
        assert task.status is TaskStatus.SUCCESS
        assert not {"blocked-by", "blocked-since"} & task.other_config.keys()
        assert content(house.inventory, ref)[::MIB] == PATTERN
        assert house.inventory.sr_coalesce_state(sr) == {}


async def test_a_leaf_that_was_written_meanwhile_is_copied_from_its_first_block_again(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    async with copying(open_house, tmp_path) as (house, gate, sr, ref):
        gate.let_one_go()
        await gate.arrived()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, house.inventory, ref, b"new" * 4096)
            await somebody_waits(house)
            gate.let_one_go()
        gate.stay_open()
        await house.settled(sr)
        assert gate.offsets[2] == gate.offsets[0]
        # Once more if the writer gives his content its name only after the next turn has begun.
        assert len(gate.offsets) in (2 + BLOCKS, 2 + 2 * BLOCKS)
        assert content(house.inventory, ref)[: 3 * 4096] == b"new" * 4096
        assert len(house.chain(ref)) == 1


async def test_while_it_is_made_durable_people_are_in(open_house: OpenHouse, tmp_path: Path) -> None:
    gate = Gate()
    async with open_house(files=gate, limits=Limits(lease_wait=20)) as house:
        gate.flushes_closed = True
        sr, ref = await make_copyable(house, tmp_path)
        await gate.arrived()
        assert len(gate.offsets) == BLOCKS
        async with leased(house, ref, LeaseMode.READ):
            with pytest.raises(XenAPIError, match="VDI_IN_USE"):
                await house.inventory.vdi_destroy(ref, wait=0)
        gate.stay_open()
        await house.settled(sr)
        assert len(house.chain(ref)) == 1
        assert content(house.inventory, ref)[::MIB] == PATTERN


async def test_what_others_put_on_the_parent_while_a_relink_waits_keeps_its_parent(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    gate = Gate()
    async with open_house(files=gate, limits=Limits(lease_wait=20)) as house:
        gate.flushes_closed = True
        sr, ref = await make_copyable(house, tmp_path)
        await gate.arrived()
        async with leased(house, ref, LeaseMode.READ):
            root, parent = root_of(house.inventory, sr), house.chain(ref)[1]
            when_let_in = house.inventory.records.vdis.by_uuid(parent).content_id
            gate.stay_open()
            await told(house, lambda: "blocked-by" in about(house))
            assert house.inventory.records.vdis.by_uuid(parent).content_id != when_let_in
            make_child(root / f"{UUID}.vhd", root / f"{parent}.vhd")
        await told(house, lambda: house.coalesced()[0].status.is_final)
        assert house.coalesced()[0].status is TaskStatus.CANCELLED
        assert about(house)["reason"] == "another image stands on its parent too"
        await house.inventory.sr_scan(sr)
        assert len(house.chain(ref)) == 2
        assert content(house.inventory, ref)[::MIB] == PATTERN


async def test_a_file_put_in_the_place_of_a_leaf_that_is_being_copied_is_not_removed_for_its_parent(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    async with copying(open_house, tmp_path) as (house, gate, sr, ref):
        # As rsync does it, which knows no locks: another file, on the same parent.
        leaf = root_of(house.inventory, sr) / f"{house.chain(ref)[0]}.vhd"
        restored = bytearray(leaf.read_bytes())
        last = restored.rindex(b"\x24" * MIB)
        restored[last : last + MIB] = b"\x77" * MIB
        (tmp_path / "restored").write_bytes(restored)
        os.rename(tmp_path / "restored", leaf)
        gate.stay_open()
        await house.settled(sr)
        assert content(house.inventory, ref)[::MIB] == PATTERN[:-1] + b"\x77"


async def test_a_vdi_that_is_destroyed_while_its_merge_waits_takes_all_with_it(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    async with copying(open_house, tmp_path) as (house, gate, sr, ref):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.inventory.vdi_destroy, ref)
            await somebody_waits(house)
            gate.stay_open()
        await house.settled(sr)
        assert house.inventory.records.vdis_of_sr(sr) == []
        assert list(root_of(house.inventory, sr).glob("*.vhd")) == []
        (task,) = house.coalesced()
        assert (task.status, about(house)["reason"]) == (TaskStatus.CANCELLED, "the image was destroyed")


async def test_a_vdi_that_is_destroyed_just_before_it_is_leased_to_merge_it_is_no_failure(
    open_house: OpenHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with copying(open_house, tmp_path) as (house, gate, sr, ref):
        repository, take = house.inventory.repository(sr), house.inventory.repository(sr).lease_to_coalesce

        async def destroy_and_take(uuid: str, mode: LeaseMode, *arguments: Any, **named: Any) -> Lease:
            if mode is LeaseMode.WRITE and ref in house.inventory.records.vdis:
                await house.inventory.vdi_destroy(ref)
            return await take(uuid, mode, *arguments, **named)

        async def read() -> None:
            async with leased(house, ref, LeaseMode.READ):
                monkeypatch.setattr(repository, "lease_to_coalesce", destroy_and_take)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await somebody_waits(house)
            gate.stay_open()
        await told(house, lambda: house.inventory.records.vdis_of_sr(sr) == [])
        await house.settled(sr)
        (task,) = house.coalesced()
        assert (task.status, about(house)["reason"]) == (TaskStatus.CANCELLED, "the image was destroyed")


async def test_a_snapshot_taken_while_a_merge_waits_is_true_and_the_rest_is_merged(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    async with copying(open_house, tmp_path) as (house, gate, sr, ref):
        taken = []
        async with trio.open_nursery() as nursery:

            async def take() -> None:
                taken.append(await house.inventory.vdi_snapshot(ref))

            nursery.start_soon(take)
            await somebody_waits(house)
            gate.stay_open()
        await write(house.inventory, ref, b"\x55" * 4096)
        await house.settled(sr)
        assert len(hidden(house.inventory, sr)) == 1
        assert content(house.inventory, taken[0])[::MIB] == PATTERN
        assert content(house.inventory, ref)[::MIB] == b"\x55" + PATTERN[1:]
        statuses = [task.status for task in house.coalesced()]
        assert statuses == [TaskStatus.CANCELLED, TaskStatus.SUCCESS]
        await house.assert_records_are_true(sr)


async def test_the_task_says_who_holds_a_chain_before_anything_is_copied(
    house: House, tmp_path: Path
) -> None:
    sr, ref = await make(house.inventory, tmp_path)
    taken = await house.inventory.vdi_snapshot(ref)
    async with leased(house, ref, LeaseMode.READ):
        await house.inventory.vdi_destroy(taken)
        await house.coalescer(sr).answered()
        await told(house, lambda: "blocked-by" in about(house))
        (task,) = house.coalesced()
        assert (task.status, task.progress) == (TaskStatus.PENDING, 0.0)
        counter = house.events.counter
    await told(house, lambda: house.coalesced()[0].status.is_final)
    changes = house.events.since(counter)
    assert changes is not None
    assert task.ref in {change.ref for change in changes}
    assert len(house.coalesced()) == 1
    assert len(house.chain(ref)) == 1


async def refusal_of_who_comes(house: House, ref: str) -> str:
    """What readers are told as soon as a merge goes first."""
    with trio.fail_after(20):
        while True:
            try:
                async with leased(house, ref, LeaseMode.READ):
                    await trio.sleep(0.001)
            except XenAPIError as error:
                if error.code == "OTHER_OPERATION_IN_PROGRESS":
                    return error.message


async def test_in_an_sr_that_is_nearly_full_a_merge_goes_first_for_once(
    open_house: OpenHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def space(_repository: Repository) -> tuple[int, int]:
        return 1000 * MIB, 951 * MIB

    monkeypatch.setattr(Repository, "space", space)
    limits = Limits(lease_wait=0, coalesce_first_seconds=60)
    async with open_house(limits=limits) as house:
        sr, ref = await make(house.inventory, tmp_path)
        taken = await house.inventory.vdi_snapshot(ref)
        async with leased(house, ref, LeaseMode.READ):
            await house.inventory.vdi_destroy(taken)
            assert "at most" in await refusal_of_who_comes(house, ref)
        await told(house, lambda: bool(house.coalesced()) and house.coalesced()[0].status.is_final)
        assert len(house.chain(ref)) == 1
        # People go first again.
        taken = await house.inventory.vdi_snapshot(ref)
        async with leased(house, ref, LeaseMode.READ):
            await house.inventory.vdi_destroy(taken)
            await house.coalescer(sr).answered()
            async with leased(house, ref, LeaseMode.READ):
                pass


async def test_in_a_tall_tree_a_merge_goes_first_for_once(open_house: OpenHouse, tmp_path: Path) -> None:
    limits = Limits(lease_wait=0, coalesce_first_seconds=60)
    async with open_house(limits=limits) as house:
        inventory = house.inventory
        _, ref = await make(inventory, tmp_path)
        taken = []
        for number in range(24):
            taken.append(await inventory.vdi_snapshot(ref))
            await write(inventory, ref, bytes([number]) * 4096, 4096)
        assert len(house.chain(ref)) == 25
        async with leased(house, ref, LeaseMode.READ):
            await inventory.vdi_destroy(taken[3])
            message = await refusal_of_who_comes(house, ref)
        assert re.search(r"coalesce by the gateway, at most (59|60) seconds more", message)
        await told(house, lambda: bool(house.coalesced()) and house.coalesced()[0].status.is_final)
        assert len(house.chain(ref)) == 24
        async with leased(house, ref, LeaseMode.READ):
            pass


async def test_readers_who_come_and_go_all_the_time_see_every_byte_and_it_gets_done(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    async with open_house(limits=Limits(lease_wait=20)) as house:
        _, ref = await make_small(house, tmp_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_and_go, house, ref, False, 10**9)
            for _ in range(3):
                await leave_something_to_merge(house, ref)
                with trio.fail_after(20):
                    while len(house.chain(ref)) > 1:
                        await house.events.wait_past(house.events.counter)
            nursery.cancel_scope.cancel()


async def test_under_writers_nothing_is_lost_and_it_gets_done_when_they_leave_it_alone(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    async with open_house(limits=Limits(lease_wait=20)) as house:
        sr, ref = await make_small(house, tmp_path)
        data = await leave_something_to_merge(house, ref)
        await come_and_go(house, ref, True, 40)
        await told(house, lambda: house.coalesced()[0].status.is_final)
        assert len(house.chain(ref)) == 1
        found = content(house.inventory, ref)
        assert found[4096:8192] == bytes([39]) * 4096
        assert found[8 * MIB : 14 * MIB] == data
        await house.assert_records_are_true(sr)


async def make_small(house: House, tmp_path: Path) -> tuple[str, str]:
    sr = await house.inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await house.inventory.vdi_create(sr=sr, virtual_size=32 * MIB)
    await write(house.inventory, ref, b"\x11" * MIB)
    return sr, ref


async def leave_something_to_merge(house: House, ref: str) -> bytes:
    taken = await house.inventory.vdi_snapshot(ref)
    data = os.urandom(6 * MIB)
    await write(house.inventory, ref, data, 8 * MIB)
    await house.inventory.vdi_destroy(taken)
    return data


async def come_and_go(house: House, ref: str, writes: bool, times: int) -> None:
    for number in range(times):
        expected = b"\x11" * 4096
        if writes:
            expected = bytes([number % 256]) * 4096
            await write(house.inventory, ref, expected, 4096)
        async with leased(house, ref, LeaseMode.READ) as lease:
            disk = await trio.to_thread.run_sync(lease.open_disk)
            found = bytearray(4096)
            await trio.to_thread.run_sync(disk.pread_into, memoryview(found), 4096)
            disk.close()
            assert found == expected
