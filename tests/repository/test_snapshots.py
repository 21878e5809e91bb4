"""Snapshots, clones and reverts: their files and records, and that everybody keeps his bytes."""

import os
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.images.vhd.create import set_hidden
from gateway.repository.fork import MAX_CHAIN_LENGTH
from gateway.repository.inventory import Inventory
from tests.images.disks import inspect, read_all
from tests.repository.conftest import listing
from tests.repository.vdis import MIB, content, hidden, make, replace, root_of, write


async def test_a_snapshot_is_xenservers_hidden_base_copy_with_two_children(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    before = inventory.records.vdis.get(ref)
    made = await inventory.vdi_snapshot(ref)
    source, snapshot = inventory.records.vdis.get(ref), inventory.records.vdis.get(made)
    (base,) = hidden(inventory, sr)
    assert (base.name_label, base.managed, base.content_id) == ("base copy", False, before.content_id)
    assert "vhd-parent" not in base.sm_config
    for vdi in (source, snapshot):
        assert vdi.sm_config["vhd-parent"] == base.uuid
        assert (vdi.content_id, vdi.name_label, vdi.tags) == (before.content_id, "disk", ("one",))
        image = inspect(root_of(inventory, sr) / f"{vdi.uuid}.vhd")
        assert not image.footer.hidden
        assert image.header is not None
        assert image.header.parent_name.decode("utf-16-be").rstrip("\0") == f"{base.uuid}.vhd"
    assert inspect(root_of(inventory, sr) / f"{base.uuid}.vhd").footer.hidden
    assert (snapshot.is_a_snapshot, snapshot.snapshot_of) == (True, ref)
    assert (source.is_a_snapshot, source.uuid) == (False, before.uuid)
    assert snapshot.snapshot_time.year > 2000
    assert [vdi.ref for vdi in inventory.records.snapshots_of_vdi(ref)] == [made]
    assert sorted(os.listdir(root_of(inventory, sr) / ".vdi-gateway" / "staging")) == []
    records = inventory.records.vdis_of_sr(sr)
    await inventory.sr_scan(sr)
    assert inventory.records.vdis_of_sr(sr) == records


async def test_snapshots_and_clones_keep_their_bytes_while_the_vdi_is_written(
    inventory: Inventory, tmp_path: Path
) -> None:
    _, ref = await make(inventory, tmp_path)
    plain = {ref: bytearray(content(inventory, ref))}
    for number in range(1, 4):
        taken = await inventory.vdi_snapshot(ref)
        plain[taken] = plain[ref].copy()
        await write(inventory, ref, bytes([number]) * 700 + b"z" * 1000, number * 100_000 + 300)
        start = number * 100_000 + 300
        plain[ref][start : start + 1700] = bytes([number]) * 700 + b"z" * 1000
        clone = await inventory.vdi_clone(taken)
        plain[clone] = plain[taken].copy()
        await write(inventory, clone, b"clone" * 100, 3 * MIB)
        plain[clone][3 * MIB : 3 * MIB + 500] = b"clone" * 100
    for vdi, expected in plain.items():
        assert content(inventory, vdi) == expected
    ids = {inventory.records.vdis.get(vdi).content_id for vdi in plain}
    assert len(ids) == len(plain)


async def test_a_vdi_without_blocks_of_its_own_is_not_multiplied(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    files = set(os.listdir(root_of(inventory, sr)))
    again = await inventory.vdi_snapshot(ref)
    clone = await inventory.vdi_clone(taken)
    made = {f"{inventory.records.vdis.get(vdi).uuid}.vhd" for vdi in (again, clone)}
    assert set(os.listdir(root_of(inventory, sr))) - files == made
    assert len(hidden(inventory, sr)) == 1
    assert not inventory.records.vdis.get(clone).is_a_snapshot
    assert len({content(inventory, vdi) for vdi in (ref, taken, again, clone)}) == 1


async def test_readers_neither_hinder_a_snapshot_nor_notice_it(inventory: Inventory, tmp_path: Path) -> None:
    _, ref = await make(inventory, tmp_path)
    lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
    disk = await trio.to_thread.run_sync(lease.open_disk)
    await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x22" * 4096)
    assert read_all(disk) == b"\x11" * 4096 + bytes(4 * MIB - 4096)
    disk.close()
    lease.release()
    await lease.released()


async def test_a_writer_hinders_a_snapshot(inventory: Inventory, tmp_path: Path) -> None:
    _, ref = await make(inventory, tmp_path)
    lease = await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await inventory.vdi_snapshot(ref)
    lease.release()
    await lease.released()


async def test_a_chain_of_thirty_levels_grows_no_more(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path)
    for number in range(1, MAX_CHAIN_LENGTH):
        await inventory.vdi_snapshot(ref)
        await write(inventory, ref, bytes([number]) * 512, number * 512)
    before = listing(root_of(inventory, sr))
    for operation in (inventory.vdi_snapshot, inventory.vdi_clone):
        with pytest.raises(XenAPIError, match="chain is too long") as raised:
            await operation(ref)
        assert raised.value.error_info == ["SR_BACKEND_FAILURE_109", "", "The snapshot chain is too long", ""]
    after = listing(root_of(inventory, sr))
    assert {name: kept for name, kept in after.items() if name.endswith(".vhd")} == {
        name: kept for name, kept in before.items() if name.endswith(".vhd")
    }
    assert content(inventory, ref)[512 : 3 * 512] == b"\1" * 512 + b"\2" * 512


async def test_what_has_no_snapshots_is_refused(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path)
    raw = await inventory.vdi_create(sr=sr, virtual_size=MIB, sm_config={"type": "raw"})
    await inventory.vdi_snapshot(ref)
    for refused in (raw, hidden(inventory, sr)[0].ref):
        with pytest.raises(XenAPIError, match="OPERATION_NOT_ALLOWED"):
            await inventory.vdi_snapshot(refused)


async def test_destroying_a_snapshot_leaves_the_vdi_and_the_base_copy(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    before = content(inventory, ref)
    await inventory.vdi_destroy(taken)
    assert content(inventory, ref) == before
    assert len(hidden(inventory, sr)) == 1


async def test_a_file_changed_from_outside_lends_no_content_id(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path)
    before = inventory.records.vdis.get(ref)
    os.utime(root_of(inventory, sr) / f"{before.uuid}.vhd")
    taken = await inventory.vdi_snapshot(ref)
    assert inventory.records.vdis.get(taken).content_id != before.content_id
    assert inventory.records.vdis.get(taken).content_id == inventory.records.vdis.get(ref).content_id


@pytest.mark.parametrize("with_blocks", [False, True])
async def test_a_revert_brings_back_the_bytes_and_the_size_and_keeps_the_snapshot(
    inventory: Inventory, tmp_path: Path, with_blocks: bool
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    if with_blocks:
        # As leaf coalescing leaves it.
        root, snapshot = root_of(inventory, sr), inventory.records.vdis.get(taken)
        (base,) = hidden(inventory, sr)
        await replace(inventory, ref, b"")
        set_hidden(str(root / f"{base.uuid}.vhd"), False)
        os.rename(root / f"{base.uuid}.vhd", root / f"{snapshot.uuid}.vhd")
        await inventory.vdi_forget(base.ref)
        await inventory.sr_scan(sr)
    expected = content(inventory, taken)
    await write(inventory, ref, b"\x22" * 8192)
    await inventory.vdi_resize(ref, 8 * MIB)
    written = content(inventory, ref)
    lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
    disk = await trio.to_thread.run_sync(lease.open_disk)
    await inventory.vdi_revert(taken)
    assert read_all(disk) == written
    disk.close()
    lease.release()
    await lease.released()
    assert content(inventory, ref) == content(inventory, taken) == expected
    reverted = inventory.records.vdis.get(ref)
    assert (reverted.virtual_size, reverted.is_a_snapshot) == (4 * MIB, False)
    assert reverted.content_id == inventory.records.vdis.get(taken).content_id
    await write(inventory, ref, b"\x33" * 8192)
    assert content(inventory, taken) == expected
    records = inventory.records.vdis_of_sr(sr)
    await inventory.sr_scan(sr)
    assert inventory.records.vdis_of_sr(sr) == records


async def test_only_a_snapshot_of_a_vdi_that_exists_is_reverted_to(
    inventory: Inventory, tmp_path: Path
) -> None:
    _, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    with pytest.raises(XenAPIError, match="not the snapshot"):
        await inventory.vdi_revert(ref)
    await inventory.vdi_destroy(ref)
    with pytest.raises(XenAPIError, match="not the snapshot"):
        await inventory.vdi_revert(taken)
