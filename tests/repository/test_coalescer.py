import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI
from gateway.core.task import Task, TaskStatus
from gateway.images.files import FileCalls
from gateway.images.vhd.create import create_dynamic, set_hidden
from gateway.images.vhd.image import open_vhd
from gateway.images.vhd.merge import Merge
from gateway.repository.coalesce_plan import Candidate, CoalesceKind
from gateway.repository.coalesce_run import CoalesceRun
from gateway.repository.coalescer import PAUSED_KEY
from gateway.repository.inventory import Inventory
from gateway.repository.scan import ScanResult
from tests.repository.coalesce_house import (
    BLOCKS,
    MIB,
    PATTERN,
    Gate,
    House,
    OpenHouse,
    leased,
    make_copyable,
    told,
    until,
)
from tests.repository.test_inventory import root_of
from tests.repository.test_snapshots import content, hidden, make, write

UUID, OTHER = (f"0000000{number}-0000-4000-8000-000000000000" for number in (7, 8))


async def test_what_a_destroyed_snapshot_leaves_goes_into_its_leaf(house: House, tmp_path: Path) -> None:
    inventory = house.inventory
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x22" * 4096, 704 * 512)
    before, expected = inventory.records.vdis.get(ref), content(inventory, ref)
    await inventory.vdi_destroy(taken)
    await house.coalescer(sr).answered()
    assert [vdi.ref for vdi in inventory.records.vdis_of_sr(sr)] == [ref]
    assert sorted(path.name for path in root_of(inventory, sr).glob("*_*")) == []
    assert [path.name for path in root_of(inventory, sr).glob("*.vhd")] == [f"{before.uuid}.vhd"]
    assert content(inventory, ref) == expected
    after = inventory.records.vdis.get(ref)
    assert (after.content_id, after.name_label, after.managed) == (before.content_id, "disk", True)
    assert "vhd-parent" not in after.sm_config
    (task,) = house.coalesced()
    assert (task.status, task.progress) == (TaskStatus.SUCCESS, 1.0)
    assert task.other_config["kind"] == "leaf"
    assert float(task.other_config["longest-relink-ms"]) > 0
    await house.assert_records_are_true(sr)


async def make_middle(inventory: Inventory, tmp_path: Path) -> tuple[str, str, str, str]:
    """An SR, a VDI, and two snapshots of it; once the first is gone, a node in the middle can be merged."""
    sr, ref = await make(inventory, tmp_path)
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x22" * 8192, 4096)
    second = await inventory.vdi_snapshot(ref)
    return sr, ref, first, second


async def test_a_node_in_the_middle_goes_into_its_parent_and_all_its_children_stay(
    house: House, tmp_path: Path
) -> None:
    inventory = house.inventory
    sr, ref, first, second = await make_middle(inventory, tmp_path)
    clone = await inventory.vdi_clone(second)
    for number, leaf in enumerate((ref, clone)):
        await write(inventory, leaf, bytes([0x33 + number]) * 8192, MIB * number)
    expected = {leaf: content(inventory, leaf) for leaf in (ref, second, clone)}
    ids = {leaf: inventory.records.vdis.get(leaf).content_id for leaf in expected}
    assert len(house.chain(ref)) == 3
    await inventory.vdi_destroy(first)
    await house.coalescer(sr).answered()
    assert len(hidden(inventory, sr)) == 1
    for leaf, before in expected.items():
        assert len(house.chain(leaf)) == 2
        assert content(inventory, leaf) == before
        assert inventory.records.vdis.get(leaf).content_id == ids[leaf]
    (task,) = house.coalesced()
    assert (task.status, task.other_config["kind"]) == (TaskStatus.SUCCESS, "inline")
    await house.assert_records_are_true(sr)


async def test_a_leaf_that_was_made_larger_makes_its_parent_larger_first(
    house: House, tmp_path: Path
) -> None:
    inventory = house.inventory
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    await inventory.vdi_resize(ref, 12 * MIB)
    await write(inventory, ref, b"\x22" * 4096, 11 * MIB)
    await inventory.vdi_destroy(taken)
    await house.coalescer(sr).answered()
    assert len(house.chain(ref)) == 1
    found = content(inventory, ref)
    assert (len(found), found[:4096], found[11 * MIB :][:4096]) == (12 * MIB, b"\x11" * 4096, b"\x22" * 4096)
    assert inventory.records.vdis.get(ref).virtual_size == 12 * MIB
    await house.assert_records_are_true(sr)


async def test_a_parent_that_was_made_larger_is_other_content_under_another_id(
    house: House, tmp_path: Path
) -> None:
    inventory = house.inventory
    sr, ref = await make(inventory, tmp_path)
    await inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
    taken = await inventory.vdi_snapshot(ref)
    await inventory.vdi_resize(ref, 12 * MIB)
    await inventory.vdi_destroy(taken)
    child, parent = house.chain(ref)
    before = inventory.records.vdis.by_uuid(parent)
    candidate = Candidate(CoalesceKind.LEAF, child, parent, (), 0, 2, grow_to=12 * MIB)
    records, limiter = house.coalescer(sr)._records, trio.CapacityLimiter(1)
    run = CoalesceRun(inventory.repository(sr), records, candidate, limiter)
    await run.grow_parent(Holder("the gateway", "coalesce", before.ref))
    after = inventory.records.vdis.by_uuid(parent)
    assert (before.virtual_size, after.virtual_size) == (4 * MIB, 12 * MIB)
    assert after.content_id != before.content_id
    await house.assert_records_are_true(sr)


async def test_hidden_images_that_nothing_stands_on_are_removed(house: House, tmp_path: Path) -> None:
    sr, ref = await make(house.inventory, tmp_path)
    root = root_of(house.inventory, sr)
    for uuid in (UUID, OTHER):
        create_dynamic(str(root / f"{uuid}.vhd"), 4 * MIB)
        set_hidden(str(root / f"{uuid}.vhd"), True)
    await house.settled(sr)
    vdi = house.inventory.records.vdis.get(ref)
    assert [path.name for path in root.glob("*.vhd")] == [f"{vdi.uuid}.vhd"]
    assert house.coalesced() == []


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


class FailingRelink(FileCalls):
    """Fails where the child of an inline coalesce would go."""

    failing = True

    def unlink(self, path: str) -> None:
        if self.failing and path.endswith(".vhd") and ".vdi-gateway" not in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().unlink(path)


async def test_a_relink_that_fails_half_way_is_finished_and_the_records_follow(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    files = FailingRelink()
    files.failing = False
    async with open_house(files=files) as house:
        inventory = house.inventory
        sr, ref, first, second = await make_middle(inventory, tmp_path)
        expected = {leaf: content(inventory, leaf) for leaf in (ref, second)}
        ids = {leaf: inventory.records.vdis.get(leaf).content_id for leaf in expected}
        async with leased(house, ref, LeaseMode.READ):
            await inventory.vdi_destroy(first)
            files.failing = True
        await told(house, lambda: bool(house.coalesced()) and house.coalesced()[0].status.is_final)
        assert house.coalesced()[0].status is TaskStatus.FAILURE
        files.failing = False
        await house.settled(sr)
        assert len(hidden(inventory, sr)) == 1
        for leaf, before in expected.items():
            assert content(inventory, leaf) == before
            assert inventory.records.vdis.get(leaf).content_id == ids[leaf]
        await house.assert_records_are_true(sr)


@pytest.mark.parametrize("found_at", ["attaching", "scanning"])
async def test_a_coalesce_of_a_gateway_that_crashed_is_finished_and_so_are_its_records(
    open_house: OpenHouse, tmp_path: Path, found_at: str
) -> None:
    async with open_house() as house:
        inventory = house.inventory
        sr, ref = await make(inventory, tmp_path)
        await inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
        first = await inventory.vdi_snapshot(ref)
        await write(inventory, ref, b"\x22" * 8192, 4096)
        await inventory.vdi_snapshot(ref)
        expected = content(inventory, ref)
        await inventory.vdi_destroy(first)
        (middle,) = [vdi for vdi in hidden(inventory, sr) if "vhd-parent" in vdi.sm_config]
        root = root_of(inventory, sr)
        if found_at == "scanning":
            leave_half_relinked(root, middle)
            await assert_finished(house, sr, ref, expected)
    if found_at == "attaching":
        leave_half_relinked(root, middle)
        async with open_house() as house:
            await assert_finished(house, sr, ref, expected)


def leave_half_relinked(root: Path, node: VDI) -> None:
    """What a crash leaves between the copy and the first child."""
    merge(root / f"{node.uuid}.vhd", root / f"{node.sm_config['vhd-parent']}.vhd")
    (root / f"relink_{node.uuid}").write_text("1")


async def assert_finished(house: House, sr: str, ref: str, expected: bytes) -> None:
    await house.inventory.records.srs.change(sr, other_config={})
    await house.settled(sr)
    assert not [path.name for path in root_of(house.inventory, sr).glob("*_*")]
    assert len(hidden(house.inventory, sr)) == 1
    assert content(house.inventory, ref) == expected
    await house.assert_records_are_true(sr)


def merge(child: Path, parent: Path) -> None:
    with child.open("rb") as above, parent.open("r+b") as below:
        merging = Merge(open_vhd(above.fileno(), str(child)), open_vhd(below.fileno(), str(parent)))
        assert merging.copy_some(lambda: False)
        merging.finish()


async def test_tasks_that_a_killed_gateway_left_pending_are_ended(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    async with open_house() as house:
        sr, _ = await make(house.inventory, tmp_path)
        about = {"SR": house.inventory.records.srs.get(sr).uuid}
        left = await house.tasks.create("coalesce", client_made=False, other_config=about)
        others = await house.tasks.create("coalesce", other_config=about)
    async with open_house() as house:
        await house.settled(sr)
        assert house.tasks.get(left.ref).error_info == ("TASK_INTERRUPTED",)
        assert house.tasks.get(others.ref).status is TaskStatus.PENDING
