"""What is not copied, who is refused while a copy is made, and who isn't."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.core.refs import NULL_REF
from gateway.repository.inventory import Inventory
from tests.images.disks import read_all
from tests.repository.conftest import OpenInventory, listing
from tests.repository.vdis import make, root_of
from tests.repository.vdis import replace as import_into
from tests.transfers.copying import MIB, Held, copy, filled, foreign_reads, other_sr

if TYPE_CHECKING:
    from gateway.core.records import VDI


async def test_what_cannot_be_copied_is_refused_and_nothing_changes(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    other = await other_sr(inventory, tmp_path)
    small = await inventory.vdi_create(sr=sr, virtual_size=2 * MIB)
    taken = await inventory.vdi_snapshot(ref)
    (base,) = [vdi.ref for vdi in inventory.records.vdis_of_sr(sr) if not vdi.managed]
    read_only = await inventory.sr_create("read-only", str(tmp_path / "read-only"))
    (pbd,) = inventory.records.pbds_of_sr(read_only)
    await inventory.pbd_unplug(pbd.ref)
    with pytest.raises(XenAPIError, match="SR_NOT_ATTACHED"):
        await copy(inventory, ref, read_only)
    await inventory.records.pbds.change(pbd.ref, device_config={**pbd.device_config, "writable": "false"})
    await inventory.pbd_plug(pbd.ref)
    for place in (sr, other):
        await inventory._copies.write(place)

    def files() -> dict[str, dict[str, tuple[int, int, bytes]]]:
        found = {place: listing(root_of(inventory, place)) for place in (sr, other, read_only)}
        for each in found.values():
            each.pop(os.path.join(".vdi-gateway", "staging"), None)  # something came there, and went
        return found

    before = files()
    for arguments, expected in (
        ((ref, NULL_REF, NULL_REF), "VALUE_NOT_SUPPORTED"),
        ((ref, sr, ref), "VALUE_NOT_SUPPORTED"),
        ((ref, other, small), "VALUE_NOT_SUPPORTED"),
        ((ref, NULL_REF, small), "VDI_TOO_SMALL"),
        ((ref, NULL_REF, taken), "VDI_READONLY"),
        ((ref, NULL_REF, base), "VDI_READONLY"),
        ((base, sr, NULL_REF), "OPERATION_NOT_ALLOWED"),
        ((ref, read_only, NULL_REF), "OPERATION_NOT_ALLOWED"),
        ((ref, "OpaqueRef:none", NULL_REF), "HANDLE_INVALID"),
        ((ref, NULL_REF, "OpaqueRef:none"), "HANDLE_INVALID"),
    ):
        with pytest.raises(XenAPIError, match=expected):
            await copy(inventory, *arguments)
    assert files() == before
    assert inventory.leases.holders_for(ref) == ()


async def test_readers_of_the_source_read_on_and_writers_are_refused_during_a_copy(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = Held(1000)
    async with open_inventory(files=files) as inventory:
        sr, ref = await filled(inventory, tmp_path)
        (pbd,) = inventory.records.pbds_of_sr(sr)
        files.number, files.writes = 3, 0
        made: list[VDI] = []

        async def make_copy() -> None:
            made.append(await copy(inventory, ref, sr))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_copy)
            try:
                await files.held.wait()
                assert inventory.leases.operations_for(ref) == {"OpaqueRef:task": "copy"}
                lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
                disk = await trio.to_thread.run_sync(lease.open_disk)
                assert read_all(disk) == b"\x5a" * 16 * MIB
                disk.close()
                lease.release()
                await lease.released()
                with pytest.raises(XenAPIError, match=r"VDI_IN_USE.*copy by the test"):
                    await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
                with pytest.raises(XenAPIError, match=r"VDI_IN_USE.*copy by the test"):
                    await inventory.pbd_unplug(pbd.ref)
                # Nobody sees it yet, not even by scanning.
                await inventory.sr_scan(sr)
                assert len(inventory.records.vdis_of_sr(sr)) == 1
                # A new image under the source's name is no matter of the copy's.
                await import_into(inventory, ref, b"new")
            finally:
                files.go_on.set()
        assert foreign_reads(inventory, made[0]) == b"\x5a" * 16 * MIB
        assert made[0].content_id != inventory.records.vdis.get(ref).content_id


async def test_a_copy_is_refused_while_somebody_writes_to_the_source_or_uses_the_target(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    into = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB)
    for held in (ref, into):
        lease = await inventory.lease(held, LeaseMode.WRITE, Holder("root", "write", held))
        with pytest.raises(XenAPIError, match=r"VDI_IN_USE.*write by root") as refused:
            await copy(inventory, ref, sr, into)
        assert refused.value.params[0] == held
        lease.release()
        await lease.released()
