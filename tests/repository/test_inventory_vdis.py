"""VDIs that are created, imported to, changed by others, scanned, destroyed: their sizes, files and ids."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.core.database import DatabaseFailed
from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.repository.inventory import Inventory
from tests.repository.vdis import MIB, replace, root_of

GIB = 1 << 30


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


@pytest.mark.parametrize("sm_config", [{}, {"type": "raw"}])
async def test_a_vdi_that_cannot_be_written_down_leaves_no_image(
    inventory: Inventory, tmp_path: Path, sm_config: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))

    async def no_space(_work: object) -> None:
        raise DatabaseFailed("(database or disk is full)")

    with monkeypatch.context() as patch, pytest.raises(DatabaseFailed):
        patch.setattr(inventory.records.vdis._database, "run", no_space)
        await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, name_label="disk", sm_config=sm_config)
    assert os.listdir(root_of(inventory, sr)) == [".vdi-gateway"]
    await inventory.sr_scan(sr)
    assert inventory.records.vdis.all() == []
