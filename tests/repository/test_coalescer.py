from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from gateway.core.database import Database
from gateway.core.events import Events
from gateway.core.leases import Leases
from gateway.core.limits import Limits
from gateway.core.records import VDI, Records
from gateway.core.task import Task, TaskStatus
from gateway.core.tasks import Tasks
from gateway.images.files import FILES, FileCalls
from gateway.repository.coalescer import Coalescer
from gateway.repository.inventory import Inventory
from tests.repository.test_inventory import root_of
from tests.repository.test_snapshots import content, hidden, make, write

MIB = 1 << 20


class House:
    """An inventory that coalesces, and its tasks."""

    def __init__(self, inventory: Inventory, tasks: Tasks, events: Events) -> None:
        self.inventory = inventory
        self.tasks = tasks
        self.events = events

    def coalescer(self, sr: str) -> Coalescer:
        assert self.inventory._coalescers is not None
        return self.inventory._coalescers.of(sr)

    async def settled(self, sr: str) -> None:
        """All that can be done is done."""
        coalescer = self.coalescer(sr)
        coalescer.trigger()
        await coalescer.answered()

    def coalesced(self) -> list[Task]:
        return [task for task in self.tasks.all() if task.name_label == "coalesce"]

    def chain(self, ref: str) -> list[str]:
        """The uuids of a VDI and of what it stands on, as the records say."""
        vdi: VDI | None = self.inventory.records.vdis.get(ref)
        uuids = []
        while vdi is not None:
            uuids.append(vdi.uuid)
            parent = vdi.sm_config.get("vhd-parent")
            vdi = None if parent is None else self.inventory.records.vdis.by_uuid(parent)
        return uuids

    async def assert_records_are_true(self, sr: str) -> None:
        """A scan finds nothing to change."""
        before = self.inventory.records.vdis_of_sr(sr)
        await self.inventory.sr_scan(sr)
        assert self.inventory.records.vdis_of_sr(sr) == before


OpenHouse = Callable[..., AbstractAsyncContextManager[House]]


@pytest.fixture
def open_house(tmp_path: Path) -> OpenHouse:
    @asynccontextmanager
    async def opened(*, files: FileCalls = FILES, limits: Limits | None = None) -> AsyncIterator[House]:
        events = Events()
        store = await Database.open(str(tmp_path / "gateway.sqlite3"))
        limits = limits or Limits(lease_wait=0)
        try:
            records = await Records.load(store, events)
            tasks = await Tasks.load(store, events, limits=limits)
            async with Inventory.open(
                records, Leases(limits), events, who="the test", files=files, tasks=tasks, limits=limits
            ) as inventory:
                yield House(inventory, tasks, events)
        finally:
            await store.aclose()

    return opened


@pytest.fixture
async def house(open_house: OpenHouse) -> AsyncIterator[House]:
    async with open_house() as made:
        yield made


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
    sr, ref = await make(inventory, tmp_path)
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x22" * 8192, 4096)
    second = await inventory.vdi_snapshot(ref)
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
