"""The copy of an SR's records beside its images follows the database, and stands in for a lost one."""

import json
import os
from pathlib import Path

import pytest
import trio

from gateway.core.records import SR, VDI
from gateway.repository.inventory import Inventory
from gateway.repository.records_file import encode_records
from gateway.repository.repository import Repository
from tests.repository.conftest import OpenInventory
from tests.repository.vdis import MIB, content, replace, write


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


async def test_what_changes_no_record_encodes_none(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[list[VDI]] = []

    def counting(sr: SR, vdis: list[VDI]) -> bytes:
        encoded.append(vdis)
        return encode_records(sr, vdis)

    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=MIB)
    await inventory._copies.write(sr)
    monkeypatch.setattr("gateway.repository.records_copies.encode_records", counting)
    await inventory._copies.write(sr)  # as after the event of each lease
    assert not encoded
    await inventory.records.vdis.change(ref, name_label="another")
    await inventory._copies.write(sr)
    assert [[vdi.name_label for vdi in vdis] for vdis in encoded] == [["another"]]


async def test_a_copy_for_which_there_is_no_memory_is_made_later(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(_sr: SR, _vdis: list[VDI]) -> bytes:
        raise MemoryError

    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    with monkeypatch.context() as patch:
        patch.setattr("gateway.repository.records_copies.encode_records", no_memory)
        await inventory.vdi_create(sr=sr, virtual_size=MIB, name_label="new")
        await inventory._copies.write(sr)
    await inventory._copies.write(sr)
    copy = json.loads((tmp_path / "sr" / ".vdi-gateway" / "records.json").read_bytes())
    assert [vdi["name_label"] for vdi in copy["vdis"]] == ["new"]


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


async def test_a_write_whose_time_stamp_the_power_took_keeps_its_own_content_id(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    async with open_inventory() as inventory:
        sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
        ref = await inventory.vdi_create(sr=sr, virtual_size=MIB)
        await write(inventory, ref, b"old" * 1000)
        old = inventory.records.vdis.get(ref)
    copy = tmp_path / "sr" / ".vdi-gateway" / "records.json"
    path = tmp_path / "sr" / f"{old.uuid}.vhd"
    kept, stamp = copy.read_bytes(), path.stat().st_mtime_ns
    async with open_inventory() as inventory:
        await write(inventory, ref, b"new" * 1000)
    # The power fails before the copy of the records is written; a flush has not made the time stamp durable.
    copy.write_bytes(kept)
    os.utime(path, ns=(stamp, stamp))
    async with open_inventory() as inventory:
        assert content(inventory, ref).startswith(b"new")
        assert inventory.records.vdis.get(ref).content_id != old.content_id


@pytest.mark.parametrize("damaged", [b'{"format": 2, "sr": {}, "vdis": []}', b'{"format": 1, "sr"', b"\xff"])
async def test_a_copy_that_cannot_be_used_is_kept_beside_the_new_one(
    open_inventory: OpenInventory, tmp_path: Path, damaged: bytes
) -> None:
    async with open_inventory() as inventory:
        await inventory.sr_create("sr", str(tmp_path / "sr"))
    copy = tmp_path / "sr" / ".vdi-gateway" / "records.json"
    copy.write_bytes(damaged)
    for _ in range(2):
        async with open_inventory(database="new.sqlite3") as inventory:
            await inventory.sr_attach(str(tmp_path / "sr"), writable=True)
        assert copy.with_name("records.json.unusable").read_bytes() == damaged
        assert json.loads(copy.read_bytes())["format"] == 1
