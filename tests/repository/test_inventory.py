import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.core.records import VDI, Host
from gateway.core.refs import NULL_REF, new_ref, new_uuid
from gateway.images.vhd.create import create_dynamic
from gateway.repository.inventory import Inventory, Where
from gateway.repository.repository import Repository
from tests.repository.conftest import OpenInventory, listing
from tests.repository.test_scan import make_child

A, B, C = (f"{number:08d}-0000-4000-8000-000000000000" for number in range(1, 4))
MIB = 1 << 20
GIB = 1 << 30


def root_of(inventory: Inventory, sr: str) -> Path:
    return Path(inventory.repository(sr).directory.root)


def vdi(inventory: Inventory, uuid: str) -> VDI:
    return inventory.records.vdis.by_uuid(uuid)


def pbd_of(inventory: Inventory, sr: str) -> str:
    return inventory.records.pbds_of_sr(sr)[0].ref


async def replace(inventory: Inventory, ref: str, data: bytes) -> None:
    lease = await inventory.lease(ref, LeaseMode.REPLACE, Holder("root", "import", ref))
    async with inventory.repository_of(ref).staging(lease, whole=True) as staging:
        await trio.to_thread.run_sync(staging.disk.pwrite, data, 0)
        await staging.commit()
        await inventory.vdi_changed(ref)
    lease.release()
    await lease.released()


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


@pytest.mark.parametrize(
    ("sm_config", "sizes", "suffix"),
    [
        ({}, (1, 2 * MIB), "vhd"),
        ({}, (2 * MIB + 1, 4 * MIB), "vhd"),
        ({}, (2040 * GIB, 2040 * GIB), "vhd"),
        ({"type": "raw"}, (513, 1024), "raw"),
        ({"image-format": "raw"}, (3000 * GIB, 3000 * GIB), "raw"),
    ],
)
async def test_sizes_are_rounded_up_as_xenserver_does(
    inventory: Inventory, tmp_path: Path, sm_config: dict[str, str], sizes: tuple[int, int], suffix: str
) -> None:
    asked, size = sizes
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=asked, name_label="disk", sm_config=sm_config)
    record = inventory.records.vdis.get(ref)
    assert (record.virtual_size, record.location, record.managed) == (size, record.uuid, True)
    assert f"{record.uuid}.{suffix}" in os.listdir(root_of(inventory, sr))
    assert inventory.records.srs.get(sr).virtual_allocation == size
    await inventory.sr_scan(sr)
    assert inventory.records.vdis.get(ref) == record


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"virtual_size": 2040 * GIB + 1}, "VDI_TOO_LARGE"),
        ({"virtual_size": -1}, "VALUE_NOT_SUPPORTED"),
        ({"virtual_size": 1, "sm_config": {"image-format": "qcow2"}}, "VALUE_NOT_SUPPORTED"),
    ],
)
async def test_disks_that_cannot_be_are_refused(
    inventory: Inventory, tmp_path: Path, arguments: dict[str, Any], code: str
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    with pytest.raises(XenAPIError, match=code):
        await inventory.vdi_create(sr=sr, **arguments)
    assert inventory.records.vdis.all() == []


async def test_a_destroyed_vdi_takes_its_file_along(inventory: Inventory, tmp_path: Path) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB)
    lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export_raw_vdi", ref))
    with pytest.raises(XenAPIError, match="export_raw_vdi by root"):
        await inventory.vdi_destroy(ref)
    lease.release()
    await lease.released()
    await inventory.vdi_destroy(ref)
    assert os.listdir(root_of(inventory, sr)) == [".vdi-gateway"]
    assert inventory.records.vdis.all() == []


async def test_a_vdi_whose_file_is_gone_is_missing_and_can_still_be_destroyed(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB, name_label="named")
    path = inventory.repository(sr).image_path(inventory.records.vdis.get(ref).uuid)
    os.rename(path, tmp_path / "aside")
    await inventory.sr_scan(sr)
    assert inventory.records.vdis.get(ref).missing
    os.rename(tmp_path / "aside", path)
    await inventory.sr_scan(sr)
    assert not inventory.records.vdis.get(ref).missing
    os.unlink(path)
    await inventory.vdi_destroy(ref)
    assert inventory.records.vdis.all() == []


async def test_an_import_gives_a_new_content_id_and_a_scan_none(inventory: Inventory, tmp_path: Path) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB)
    before = inventory.records.vdis.get(ref)
    await replace(inventory, ref, b"x" * MIB)
    after = inventory.records.vdis.get(ref)
    assert after.content_id != before.content_id
    assert after.physical_utilisation > before.physical_utilisation
    await inventory.sr_scan(sr)
    assert inventory.records.vdis.get(ref).content_id == after.content_id


async def test_a_file_changed_behind_our_back_gets_a_new_content_id(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB)
    before = inventory.records.vdis.get(ref)
    path = inventory.repository(sr).image_path(before.uuid)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    await inventory.sr_scan(sr)
    changed = inventory.records.vdis.get(ref)
    assert changed.content_id != before.content_id
    lease = await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "nbd", ref))
    os.utime(path, (1_000_000_001, 1_000_000_001))
    await inventory.sr_scan(sr)
    assert inventory.records.vdis.get(ref).content_id == changed.content_id, "our own writer's changes"
    lease.release()
    await lease.released()


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


async def test_losing_the_database_loses_nothing(open_inventory: OpenInventory, tmp_path: Path) -> None:
    async with open_inventory() as inventory:
        sr = await inventory.sr_create("mine", str(tmp_path / "sr"), name_description="about")
        ref = await inventory.vdi_create(
            sr=sr, virtual_size=MIB, name_label="disk", other_config={"key": "value"}, tags=["tag"]
        )
        known = inventory.records.vdis.get(ref)
        uuid = inventory.records.srs.get(sr).uuid
    async with open_inventory(database="new.sqlite3") as inventory:
        sr = await inventory.sr_attach(str(tmp_path / "sr"), writable=True)
        record = inventory.records.srs.get(sr)
        assert (record.uuid, record.name_label, record.name_description) == (uuid, "mine", "about")
        (found,) = inventory.records.vdis_of_sr(sr)
        assert found == VDI(**{**{name: getattr(known, name) for name in VDI.__slots__}, "sr": sr})


async def test_the_copy_of_the_records_follows_without_being_asked(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = trio.Event()
    write = Repository.write_records

    async def noting(repository: Repository, content: bytes) -> None:
        await write(repository, content)
        if b"named later" in content:
            written.set()

    monkeypatch.setattr(Repository, "write_records", noting)
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB)
    await inventory.records.vdis.change(ref, name_label="named later")
    await written.wait()
    copy = json.loads((tmp_path / "sr" / ".vdi-gateway" / "records.json").read_bytes())
    assert [record["name_label"] for record in copy["vdis"]] == ["named later"]


async def test_an_older_database_gives_way_to_a_copy_that_knows_the_file(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    async with open_inventory() as inventory:
        sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
        ref = await inventory.vdi_create(sr=sr, virtual_size=MIB, name_label="old name")
    backup = (tmp_path / "gateway.sqlite3").read_bytes()
    async with open_inventory() as inventory:
        await inventory.records.vdis.change(ref, name_label="new name")
        await replace(inventory, ref, b"x")
        content_id = inventory.records.vdis.get(ref).content_id
    (tmp_path / "gateway.sqlite3").write_bytes(backup)
    async with open_inventory() as inventory:
        record = inventory.records.vdis.get(ref)
        assert (record.name_label, record.content_id) == ("new name", content_id)


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


async def test_scans_beside_creates_and_destroys_lose_and_invent_nothing(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    kept: list[str] = []

    async def churn(name: str) -> None:
        for turn in range(5):
            ref = await inventory.vdi_create(sr=sr, virtual_size=MIB, name_label=name)
            if turn % 2:
                await inventory.vdi_destroy(ref, wait=60)
            else:
                kept.append(ref)

    async with trio.open_nursery() as scanning:

        async def scan() -> None:
            while True:
                await inventory.sr_scan(sr)

        scanning.start_soon(scan)
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(churn, name)
        scanning.cancel_scope.cancel()
    await inventory.sr_scan(sr)
    assert {record.ref for record in inventory.records.vdis_of_sr(sr)} == set(kept)
    assert all(record.name_label and not record.missing for record in inventory.records.vdis_of_sr(sr))


async def test_a_scan_while_a_create_is_about_to_end_does_not_miss_the_image(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sr = await inventory.sr_create("disks", str(tmp_path / "sr"))
    refresh, scanned = inventory.refresh_sizes, trio.Event()

    async def scan_first(sr: str) -> None:
        if not scanned.is_set():
            scanned.set()
            await inventory.sr_scan(sr)
        await refresh(sr)

    # The last thing that a create does, when the record is there already.
    monkeypatch.setattr(inventory, "refresh_sizes", scan_first)
    ref = await inventory.vdi_create(sr=sr, virtual_size=2 << 20)
    assert scanned.is_set()
    assert not inventory.records.vdis.get(ref).missing


async def test_what_the_user_of_an_inventory_raises_comes_out_as_it_was(
    open_inventory: OpenInventory,
) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        async with open_inventory():
            raise RuntimeError("on purpose")
