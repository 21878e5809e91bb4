"""A disk copied into another one: what foreign programs read from it, and what its record says."""

import os
import random
from pathlib import Path

import pytest
import trio

from gateway.core.leases import Holder, LeaseMode
from gateway.core.refs import NULL_REF
from gateway.images.files import FileIdentity
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.format import UNUSED
from gateway.repository.inventory import Inventory
from gateway.transfers.copy_disk import shape_of_copy
from gateway.transfers.publications import Publications
from tests.images.disks import entries, inspect, qemu_compare, read_all
from tests.repository.conftest import listing
from tests.repository.test_repository import read
from tests.repository.vdis import make, root_of, write
from tests.repository.vdis import replace as import_into
from tests.transfers.copying import MIB, copy, foreign_reads, other_sr, path_of

GIB = 1 << 30


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
async def test_a_copy_of_a_chain_stands_alone_and_has_its_bytes(
    inventory: Inventory, tmp_path: Path, depth: int
) -> None:
    chance = random.Random(depth)
    data = chance.randbytes(300 << 10)
    sr, ref = await make(inventory, tmp_path, data)
    expected = bytearray(data.ljust(4 * MIB, b"\0"))
    target = await other_sr(inventory, tmp_path)
    for _ in range(depth - 1):
        await inventory.vdi_snapshot(ref)
        for _ in range(20):
            # Whole sectors and parts of them, so that the bitmaps of all levels are mixed.
            data = chance.choice([chance.randbytes(512), chance.randbytes(700), bytes(3000), b"x" * 4096])
            offset = chance.choice([chance.randrange(1 * MIB), chance.randrange(4 * MIB - 4096)])
            await write(inventory, ref, data, offset)
            expected[offset : offset + len(data)] = data
    for place in (sr, target):
        made = await copy(inventory, ref, place)
        assert made.sr == place
        assert "vhd-parent" not in made.sm_config
        path = path_of(inventory, made)
        assert inspect(path).header is not None
        assert not check_vhd(str(path)).problems
        assert foreign_reads(inventory, made) == expected
        (tmp_path / "expected").write_bytes(expected)
        qemu_compare(path, "vpc", tmp_path / "expected", "raw")
        await write(inventory, made.ref, b"the copy's own")
        assert read(str(path_of(inventory, ref)), 4 * MIB) == expected
        records = inventory.records.vdis_of_sr(place)
        await inventory.sr_scan(place)
        assert inventory.records.vdis_of_sr(place) == records


async def test_a_copy_of_a_snapshot_is_an_ordinary_vdi_that_is_called_like_it(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(
        sr=sr,
        virtual_size=4 * MIB,
        name_label="disk",
        name_description="of somebody",
        type="system",
        sharable=True,
        read_only=True,
        other_config={"owner": "me"},
        xenstore_data={"a": "b"},
        sm_config={"c": "d"},
        tags=["one"],
    )
    taken = await inventory.vdi_snapshot(ref)
    made = await copy(inventory, taken, sr)
    assert (made.is_a_snapshot, made.snapshot_of, made.read_only, made.managed) == (
        False,
        NULL_REF,
        False,
        True,
    )
    assert (made.name_label, made.name_description, made.type) == ("disk", "of somebody", "system")
    assert (made.other_config, made.xenstore_data, made.sharable) == ({"owner": "me"}, {"a": "b"}, True)
    # XenServer leaves these behind.
    assert (made.tags, made.sm_config.get("c")) == ((), None)
    assert inventory.records.srs.get(sr).virtual_allocation >= 12 * MIB


async def test_a_raw_disk_becomes_a_vhd_and_its_zeroes_are_not_stored(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=9 * MIB + 512, sm_config={"type": "raw"})
    data = os.urandom(700) + bytes(4 * MIB) + os.urandom(3 * MIB) + bytes(MIB) + b"end"
    with path_of(inventory, ref).open("r+b") as file:
        file.write(data)
        file.seek(9 * MIB + 512 - 1)
        file.write(b"!")
    await inventory.sr_scan(sr)
    made = await copy(inventory, ref, sr)
    assert (made.image_format, made.virtual_size) == ("vhd", 10 * MIB)
    expected = (data.ljust(9 * MIB + 511, b"\0") + b"!").ljust(10 * MIB, b"\0")
    assert foreign_reads(inventory, made) == expected
    # Of the five blocks the second is all zeroes; the others are stored without theirs.
    assert [entry != UNUSED for entry in entries(path_of(inventory, made))] == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert made.physical_utilisation < 5 * MIB


async def test_a_copy_into_a_vdi_replaces_all_of_it(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path, b"\x11" * 5000)
    expected = foreign_reads(inventory, ref)
    for sm_config in ({}, {"type": "raw"}):
        into = await inventory.vdi_create(
            sr=sr, virtual_size=8 * MIB, name_label="target", sm_config=sm_config
        )
        await import_into(inventory, into, b"\xee" * 8 * MIB)
        before = inventory.records.vdis.get(into)
        lease = await inventory.lease(into, LeaseMode.READ, Holder("root", "export", into))
        disk = await trio.to_thread.run_sync(lease.open_disk)
        made = await copy(inventory, ref, NULL_REF, into)
        # Who was reading reads on.
        assert read_all(disk) == b"\xee" * 8 * MIB
        disk.close()
        lease.release()
        await lease.released()
        assert (made.ref, made.uuid, made.name_label) == (into, before.uuid, "target")
        assert made.content_id not in (before.content_id, inventory.records.vdis.get(ref).content_id)
        assert foreign_reads(inventory, made) == expected.ljust(8 * MIB, b"\0")
        await inventory.sr_scan(sr)
        assert inventory.records.vdis.get(into) == made


async def test_a_snapshot_copied_into_its_vdi_makes_that_stand_alone(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    expected = foreign_reads(inventory, taken)
    await write(inventory, ref, b"changed" * 1000)
    made = await copy(inventory, taken, sr, ref)
    assert "vhd-parent" not in made.sm_config
    assert foreign_reads(inventory, ref) == foreign_reads(inventory, taken) == expected


async def test_who_opens_a_copied_disk_waits_for_its_content_id(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sr, ref = await make(inventory, tmp_path)
    into = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB)
    publications = Publications()
    changed = inventory.vdi_changed
    waited: list[bool] = []

    async def changed_late(vdi: str, content_id: str | None = None) -> None:
        opened = await trio.to_thread.run_sync(os.stat, path_of(inventory, into))
        with trio.move_on_after(0):
            await publications.settled(into, FileIdentity(opened.st_dev, opened.st_ino))
            waited.append(False)
        await changed(vdi, content_id)

    monkeypatch.setattr(inventory, "vdi_changed", changed_late)
    await copy(inventory, ref, NULL_REF, into, publications=publications)
    assert waited == []
    with trio.fail_after(5):
        await publications.settled(into, FileIdentity(0, 0))


async def test_a_disk_of_a_read_only_sr_can_be_copied(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path)
    target = await other_sr(inventory, tmp_path)
    (pbd,) = inventory.records.pbds_of_sr(sr)
    await inventory.pbd_unplug(pbd.ref)
    await inventory.records.pbds.change(pbd.ref, device_config={**pbd.device_config, "writable": "false"})
    await inventory.pbd_plug(pbd.ref)
    assert inventory.records.vdis.get(ref).read_only
    before = listing(root_of(inventory, sr))
    made = await copy(inventory, ref, target)
    assert listing(root_of(inventory, sr)) == before
    assert not made.read_only
    assert foreign_reads(inventory, made) == foreign_reads(inventory, ref)


@pytest.mark.parametrize("place", ["new", "into"])
async def test_the_content_id_is_the_sources_if_bytes_and_blocks_are_the_same(
    inventory: Inventory, tmp_path: Path, place: str
) -> None:
    sr, ref = await make(inventory, tmp_path)
    into = NULL_REF
    if place == "into":
        into = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB)
    await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"x" * 4096, 4096)
    source = inventory.records.vdis.get(ref)
    assert (await copy(inventory, ref, sr, into)).content_id == source.content_id
    # A block of zeroes is exported in a format with blocks, but the copy doesn't have it.
    await write(inventory, ref, bytes(4096), 3 * MIB)
    source = inventory.records.vdis.get(ref)
    made = await copy(inventory, ref, sr, into)
    assert made.content_id not in ("", source.content_id)
    assert foreign_reads(inventory, made) == foreign_reads(inventory, ref)


async def test_a_source_that_was_changed_from_outside_lends_no_content_id(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    os.utime(path_of(inventory, ref))
    assert (await copy(inventory, ref, sr)).content_id != inventory.records.vdis.get(ref).content_id


async def test_a_disk_larger_than_a_vhd_can_be_becomes_a_raw_one(
    inventory: Inventory, tmp_path: Path
) -> None:
    assert shape_of_copy(2040 * GIB) == (2040 * GIB, "vhd")
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=2040 * GIB + 512, sm_config={"type": "raw"})
    with path_of(inventory, ref).open("r+b") as file:
        file.seek(2040 * GIB)
        file.write(b"last")
    await inventory.sr_scan(sr)
    made = await copy(inventory, ref, sr)
    assert (made.image_format, made.virtual_size) == ("raw", 2040 * GIB + 512)
    with path_of(inventory, made).open("rb") as file:
        file.seek(2040 * GIB)
        assert file.read() == b"last".ljust(512, b"\0")
    assert made.physical_utilisation < MIB
