"""SRs that are created, attached, away, somebody else's or forgotten: what is known of them, and refused."""

import os
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.core.records import VDI, Host
from gateway.core.refs import NULL_REF, new_ref, new_uuid
from gateway.images.vhd.create import create_dynamic
from gateway.repository.inventory import Inventory, Where
from gateway.repository.repository import Repository
from tests.repository.conftest import OpenInventory, listing
from tests.repository.test_scan import make_child
from tests.repository.vdis import MIB, pbd_of

A, B, C = (f"{number:08d}-0000-4000-8000-000000000000" for number in range(1, 4))


def vdi(inventory: Inventory, uuid: str) -> VDI:
    return inventory.records.vdis.by_uuid(uuid)


async def test_a_created_sr_is_a_file_sr_that_is_attached_here(inventory: Inventory, tmp_path: Path) -> None:
    sr = await inventory.sr_create("local", str(tmp_path / "sr"))
    record = inventory.records.srs.get(sr)
    assert (record.type, record.content_type, record.name_label) == ("file", "user", "local")
    assert record.physical_size > record.physical_utilisation > 0
    (pbd,) = inventory.records.pbds_of_sr(sr)
    assert pbd.currently_attached
    assert pbd.device_config == {"location": str(tmp_path / "sr"), "writable": "true"}
    assert inventory.where_is(sr) is Where.LOCAL
    for again in ("sr", "sr/"):
        with pytest.raises(XenAPIError, match="OPERATION_NOT_ALLOWED"):
            await inventory.sr_create("second", str(tmp_path / again))


async def test_a_directory_with_files_is_not_made_an_sr(inventory: Inventory, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").touch()
    with pytest.raises(XenAPIError, match="empty"):
        await inventory.sr_create("home", str(tmp_path / "home"))
    assert inventory.records.srs.all() == []


async def test_a_foreign_directory_becomes_vdis_without_names(inventory: Inventory, tmp_path: Path) -> None:
    create_dynamic(str(tmp_path / f"{A}.vhd"), 4 * MIB)
    make_child(tmp_path, B, A)
    sr = await inventory.sr_attach(str(tmp_path), writable=True, name_label="foreign")
    assert {record.uuid: record.name_label for record in inventory.records.vdis_of_sr(sr)} == {A: "", B: ""}
    assert vdi(inventory, B).sm_config["vhd-parent"] == A
    assert not vdi(inventory, B).read_only


async def test_a_read_only_attach_writes_nothing_and_its_vdis_are_read_only(
    inventory: Inventory, tmp_path: Path
) -> None:
    foreign = tmp_path / C
    foreign.mkdir()
    create_dynamic(str(foreign / f"{A}.vhd"), 4 * MIB)
    before = listing(foreign)
    sr = await inventory.sr_attach(str(foreign))
    assert inventory.records.srs.get(sr).uuid == C
    with pytest.raises(XenAPIError, match="VDI_READONLY"):
        await inventory.lease(vdi(inventory, A), LeaseMode.REPLACE, Holder("root", "import", "ref"))
    for refused in (
        inventory.vdi_destroy(vdi(inventory, A).ref),
        inventory.vdi_create(sr=sr, virtual_size=1),
    ):
        with pytest.raises(XenAPIError):
            await refused
    await inventory.sr_scan(sr)
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    assert listing(foreign) == before
    await inventory.sr_attach(str(foreign), writable=True)
    assert not vdi(inventory, A).read_only


async def test_a_uuid_known_from_another_sr_is_refused_by_name(inventory: Inventory, tmp_path: Path) -> None:
    first = await inventory.sr_create("first", str(tmp_path / "first"))
    ref = await inventory.vdi_create(sr=first, virtual_size=MIB)
    uuid = inventory.records.vdis.get(ref).uuid
    second = await inventory.sr_create("second", str(tmp_path / "second"))
    create_dynamic(str(tmp_path / "second" / f"{uuid}.vhd"), 2 * MIB)
    create_dynamic(str(tmp_path / "second" / f"{A}.vhd"), 2 * MIB)
    with pytest.raises(XenAPIError, match="SR_BACKEND_FAILURE_40") as refused:
        await inventory.sr_scan(second)
    assert f"{uuid}.vhd" in refused.value.params[1]
    assert inventory.records.srs.get(first).uuid in refused.value.params[1]
    assert [record.uuid for record in inventory.records.vdis_of_sr(second)] == [A]
    assert inventory.records.vdis.get(ref).sr == first


async def test_an_sr_that_is_not_mounted_at_the_start_is_unavailable_and_comes_back(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    async with open_inventory() as inventory:
        sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
        ref = await inventory.vdi_create(sr=sr, virtual_size=MIB, name_label="kept")
        known = inventory.records.vdis.get(ref)
    os.rename(tmp_path / "sr", tmp_path / "elsewhere")
    os.mkdir(tmp_path / "sr")
    async with open_inventory() as inventory:
        assert inventory.where_is(sr) is Where.NOWHERE
        assert not inventory.records.pbds.get(pbd_of(inventory, sr)).currently_attached
        assert inventory.records.vdis.get(ref) == known
        with pytest.raises(XenAPIError, match="SR_NOT_ATTACHED"):
            inventory.repository_of(ref)
        with pytest.raises(XenAPIError, match="SR_BACKEND_FAILURE_47"):
            await inventory.pbd_plug(pbd_of(inventory, sr))
        assert os.listdir(tmp_path / "sr") == []
    os.rmdir(tmp_path / "sr")
    os.rename(tmp_path / "elsewhere", tmp_path / "sr")
    async with open_inventory() as inventory:
        assert inventory.where_is(sr) is Where.LOCAL
        assert inventory.records.vdis.get(ref) == known


async def test_an_sr_unmounted_while_attached_forgets_nothing(inventory: Inventory, tmp_path: Path) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB)
    known = inventory.records.vdis.get(ref)
    os.rename(tmp_path / "sr", tmp_path / "elsewhere")
    os.mkdir(tmp_path / "sr")
    for refused in (
        inventory.sr_scan(sr),
        inventory.vdi_destroy(ref),
        inventory.vdi_create(sr=sr, virtual_size=1),
        inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref)),
    ):
        with pytest.raises(XenAPIError, match="SR_BACKEND_FAILURE_47"):
            await refused
    assert inventory.records.vdis.get(ref) == known
    assert os.listdir(tmp_path / "sr") == []


async def test_an_owned_sr_is_refused_with_its_owner(inventory: Inventory, tmp_path: Path) -> None:
    other = await Repository.create(str(tmp_path / "sr"), C, Leases(), who="gateway two on host two")
    with pytest.raises(XenAPIError, match="gateway two on host two"):
        await inventory.sr_attach(str(tmp_path / "sr"), writable=True)
    assert inventory.records.srs.all() == []
    assert inventory.records.pbds.all() == []
    await other.detach()


async def test_an_sr_can_be_on_another_host(inventory: Inventory) -> None:
    host = Host(ref=new_ref(), uuid=new_uuid(), name_label="other", address="192.0.2.1")
    await inventory.records.hosts.add(host)
    sr = await inventory.sr_introduce(C, "there")
    assert inventory.where_is(sr) is Where.NOWHERE
    pbd = await inventory.pbd_create(host.ref, sr, {"location": "/there"})
    await inventory.pbd_plug(pbd)
    assert inventory.where_is(sr) == host
    with pytest.raises(XenAPIError, match="SR_NOT_ATTACHED"):
        await inventory.sr_scan(sr)


async def test_forgetting_leaves_the_files_and_destroying_needs_an_empty_sr(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB, name_label="disk")
    with pytest.raises(XenAPIError, match="SR_HAS_PBD"):
        await inventory.sr_forget(sr)
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    with pytest.raises(XenAPIError, match="SR_NOT_EMPTY"):
        await inventory.sr_destroy(sr)
    await inventory.records.pools.change(inventory.records.pool.ref, default_sr=sr)
    await inventory.sr_forget(sr)
    assert inventory.records.pool.default_sr == NULL_REF
    assert not inventory.records.vdis.all()
    assert not inventory.records.pbds.all()
    sr = await inventory.sr_attach(str(tmp_path / "sr"), writable=True)
    assert [record.name_label for record in inventory.records.vdis_of_sr(sr)] == ["disk"]
    await inventory.vdi_destroy(ref)
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    await inventory.sr_destroy(sr)
    assert inventory.records.srs.all() == []
    assert await inventory.sr_create("again", str(tmp_path / "sr"))


async def test_an_sr_in_use_is_not_unplugged(inventory: Inventory, tmp_path: Path) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB)
    lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export_raw_vdi", ref))
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await inventory.pbd_unplug(pbd_of(inventory, sr))
    lease.release()


async def test_what_the_user_of_an_inventory_raises_comes_out_as_it_was(
    open_inventory: OpenInventory,
) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        async with open_inventory():
            raise RuntimeError("on purpose")
