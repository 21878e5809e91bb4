"""What the coalescer merges and removes of its own accord, and that the VDIs and their records stay true."""

from pathlib import Path

import trio

from gateway.core.leases import Holder
from gateway.core.task import TaskStatus
from gateway.images.vhd.create import create_dynamic, set_hidden
from gateway.repository.coalesce_plan import Candidate, CoalesceKind
from gateway.repository.coalesce_run import CoalesceRun
from gateway.repository.coalescer import PAUSED_KEY
from tests.repository.coalesce_house import MIB, OTHER, UUID, House, make_middle
from tests.repository.vdis import content, hidden, make, root_of, write


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
