"""An inventory that coalesces its SRs, with its tasks, and a gate that copies have to pass."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from gateway.core.database import Database
from gateway.core.events import Events
from gateway.core.leases import Holder, Lease, LeaseMode, Leases
from gateway.core.limits import Limits
from gateway.core.records import VDI, Records
from gateway.core.task import Task
from gateway.core.tasks import Tasks
from gateway.images.files import FILES, FileCalls
from gateway.repository.coalescer import Coalescer
from gateway.repository.inventory import Inventory
from tests.repository.vdis import make, write

MIB = 1 << 20
# Of images that lie in an SR without being anybody's.
UUID, OTHER = (f"0000000{number}-0000-4000-8000-000000000000" for number in (7, 8))


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

    async def interrupted(self, sr: str) -> None:
        """Until what runs has been told to stop."""

        def is_told() -> bool:
            current = self.coalescer(sr)._turns._current
            return current is None or current[1].cancel_called

        await until(is_told)

    def when_cancelled(self, call: Callable[[], None]) -> None:
        """Call that as soon as the inventory is being closed."""

        async def wait() -> None:
            try:
                await trio.sleep_forever()
            finally:
                call()

        assert self.inventory._coalescers is not None
        assert self.inventory._coalescers._nursery is not None
        self.inventory._coalescers._nursery.start_soon(wait)

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


@asynccontextmanager
async def open_house_in(
    directory: Path, *, files: FileCalls = FILES, limits: Limits | None = None
) -> AsyncIterator[House]:
    """A house whose database lies in `directory`."""
    events = Events()
    store = await Database.open(str(directory / "gateway.sqlite3"))
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


def house_in(directory: Path) -> OpenHouse:
    """What opens houses on one database."""
    return partial(open_house_in, directory)


class Gate(FileCalls):
    """Stops each copy between files until the test lets it go on, or makes it fail."""

    def __init__(self) -> None:
        self.closed = False
        self.offsets: list[int] = []
        self.failure: Exception | None = None
        self.flushes_closed = False
        self._arrived = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        if self.closed:
            self._arrived.release()
            assert self._permits.acquire(timeout=20)
        self.offsets.append(source_offset)
        if self.failure is not None:
            raise self.failure
        super().copy_range(source_fd, source_offset, fd, offset, length)

    def datasync(self, fd: int) -> None:
        if self.flushes_closed and len(self.offsets) == BLOCKS:
            self._arrived.release()
            assert self._permits.acquire(timeout=20)
        super().datasync(fd)

    async def arrived(self) -> None:
        """Until a copy has come to the gate."""
        assert await trio.to_thread.run_sync(partial(self._arrived.acquire, timeout=20))

    def let_one_go(self) -> None:
        self._permits.release()

    def stay_open(self) -> None:
        """Let all copies go from now on."""
        self.closed = self.flushes_closed = False
        self._permits.release(1000)


BLOCKS = 5
# One byte of each MiB of such a VDI.
PATTERN = bytes([0x20 + number // 2 for number in range(2 * BLOCKS)])


async def make_middle(inventory: Inventory, tmp_path: Path) -> tuple[str, str, str, str]:
    """An SR, a VDI, and two snapshots of it; once the first is gone, a node in the middle can be merged."""
    sr, ref = await make(inventory, tmp_path)
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x22" * 8192, 4096)
    second = await inventory.vdi_snapshot(ref)
    return sr, ref, first, second


async def make_copyable(house: House, tmp_path: Path) -> tuple[str, str]:
    """A VDI of which every block has to be copied into its base copy as soon as its snapshot has gone."""
    inventory = house.inventory
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=BLOCKS * 2 * MIB, name_label="disk")
    await write(inventory, ref, b"\x11" * 8192)
    taken = await inventory.vdi_snapshot(ref)
    for block in range(BLOCKS):
        await write(inventory, ref, bytes([0x20 + block]) * (2 * MIB), block * 2 * MIB)
    await inventory.vdi_destroy(taken)
    return sr, ref


@asynccontextmanager
async def copying(open_house: OpenHouse, tmp_path: Path) -> AsyncIterator[tuple[House, Gate, str, str]]:
    """A house with its gate, at which the copy of a VDI's first block stands; the SR and the VDI."""
    gate = Gate()
    async with open_house(files=gate, limits=Limits(lease_wait=20)) as house:
        gate.closed = True
        sr, ref = await make_copyable(house, tmp_path)
        await gate.arrived()
        yield house, gate, sr, ref


async def told(house: House, condition: Callable[[], bool]) -> None:
    """Until an event has made it true."""
    with trio.fail_after(20):
        while not condition():
            await house.events.wait_past(house.events.counter)


async def until(condition: Callable[[], bool]) -> None:
    """For what nobody tells of."""
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - see above
            await trio.sleep(0.001)


async def somebody_waits(house: House) -> None:
    """Until a lease is asked for in vain."""
    await until(lambda: house.inventory.leases._table.waiting > 0)


@asynccontextmanager
async def leased(house: House, ref: str, mode: LeaseMode) -> AsyncIterator[Lease]:
    """The VDI in somebody's hands, for the time of a block."""
    lease = await house.inventory.lease(ref, mode, Holder("curl at 127.0.0.1", "export_raw_vdi", ref))
    try:
        yield lease
    finally:
        lease.release()
        with trio.CancelScope(shield=True):
            await lease.released()
