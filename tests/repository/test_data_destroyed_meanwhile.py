"""Whoever waits for a snapshot while its data is destroyed is refused: what is left of it reads as zeroes."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.repository.inventory import Inventory
from tests.repository.coalesce_house import until
from tests.repository.tracked import MIB, content, tracked, write

WAIT = 30.0
Asking = Callable[[Inventory, str], Awaitable[object]]


async def revert(inventory: Inventory, snapshot: str) -> None:
    await inventory.vdi_revert(snapshot, wait=WAIT)


async def clone(inventory: Inventory, snapshot: str) -> None:
    await inventory.vdi_clone(snapshot, wait=WAIT)


async def read(inventory: Inventory, snapshot: str) -> None:
    """As a download, a copy or an NBD client does."""
    lease = await inventory.lease(snapshot, LeaseMode.READ, Holder("root", "read", snapshot), WAIT)
    lease.release()


@pytest.mark.parametrize("ask", [revert, clone, read])
async def test_who_waits_for_a_snapshot_whose_data_goes_gets_no_disk_of_zeroes(
    inventory: Inventory, tmp_path: Path, ask: Asking
) -> None:
    _, ref = await tracked(inventory, tmp_path / "sr")
    await write(inventory, ref, (0, b"\x11" * MIB))
    snapshot = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (MIB, b"\x22" * MIB))
    expected = content(inventory, ref)
    known = inventory.records.vdis.all()
    reader = await inventory.lease(snapshot, LeaseMode.READ, Holder("root", "read", snapshot))
    refused: list[XenAPIError] = []

    async def asks() -> None:
        with pytest.raises(XenAPIError) as raised:
            await ask(inventory, snapshot)
        refused.append(raised.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(inventory.vdi_data_destroy, snapshot)
        await until(lambda: inventory.leases._table.waiting == 1)
        nursery.start_soon(asks)
        await until(lambda: inventory.leases._table.waiting == 2)
        reader.release()
    assert [error.code for error in refused] == ["VDI_INCOMPATIBLE_TYPE"]
    assert content(inventory, ref) == expected
    assert len(inventory.records.vdis.all()) == len(known)
