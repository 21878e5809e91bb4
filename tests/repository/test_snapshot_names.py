"""A crash between the files of a snapshot or copy and its records: it is undone, or there with its name."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio

from gateway.core.leases import LeaseMode, Leases
from gateway.core.records import SR, VDI, ImageFormat
from gateway.repository.fork import Fork
from gateway.repository.records_file import encode_records
from gateway.repository.repository import Repository
from tests.crash import RecordingFileCalls
from tests.repository.conftest import SR_UUID, OpenInventory
from tests.repository.test_crash import CHILD, HOLDER, NEW, PARENT, prepare, states
from tests.repository.test_repository import read
from tests.repository.test_snapshot_crash import BASE, after_the_crash
from tests.repository.vdis import content, make, root_of, write

SR_RECORD = SR(ref="OpaqueRef:sr", uuid=SR_UUID, name_label="sr")
NAMES = {PARENT: "parent", CHILD: "child", NEW: "kept", BASE: "base copy"}


def vdi(uuid: str) -> VDI:
    return VDI(ref=f"OpaqueRef:{uuid}", uuid=uuid, sr=SR_RECORD.ref, name_label=NAMES[uuid])


class Killed(Exception):  # noqa: N818 - what the gateway doesn't live to see
    pass


@pytest.mark.parametrize("source", [PARENT, CHILD])
async def test_after_a_crash_at_any_point_a_snapshot_is_undone_or_has_its_name(
    tmp_path: Path, leases: Leases, source: str
) -> None:
    root = str(tmp_path / "sr")
    await prepare(root, leases)
    known = [PARENT, CHILD]
    if source == PARENT:
        os.unlink(os.path.join(root, f"{CHILD}.vhd"))
        known = [PARENT]
    before = await Repository.attach(root, leases, writable=True, who="before")
    await before.write_records(encode_records(SR_RECORD, [vdi(uuid) for uuid in known]))
    await before.detach()
    files = RecordingFileCalls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    lease = await repository.lease(source, LeaseMode.REPLACE, HOLDER)
    records = (vdi(NEW), vdi(BASE))
    fork = Fork(repository.directory, lease, base=BASE, child=NEW, records=records, files=files)
    await trio.to_thread.run_sync(fork.prepare)
    await repository.restructure(fork.publish, (source, BASE, NEW))
    files.mark("published")
    lease.release()
    await lease.released()
    await repository.detach()
    named = undone = 0
    async for state in states(files, tmp_path, 3):
        again = await after_the_crash(state, leases)
        copy = await again.read_records()
        assert copy is not None, state
        names = {each.uuid: each.name_label for each in (*again.intended, *copy.vdis)}
        if NEW in again.images:
            named += 1
            there = {uuid for uuid in (NEW, BASE) if uuid in again.images}
            assert {uuid: names.get(uuid) for uuid in there} == {uuid: NAMES[uuid] for uuid in there}, state
        else:
            undone += 1
            assert "published" not in state.marks, state
        assert {uuid: names[uuid] for uuid in known} == {uuid: NAMES[uuid] for uuid in known}, state
        await again.forget_intended()
        assert made_journals(again.directory.service) == [], state
        await again.detach()
    assert min(named, undone) > 2
    await trio.to_thread.run_sync(fork.settle)
    assert made_journals(repository.directory.service) == []


def made_journals(service: str) -> list[str]:
    return [name for name in os.listdir(service) if name.startswith(("made-", "fork-"))]


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_a_gateway_that_dies_before_the_record_finds_a_filled_vdi_with_its_name(
    open_inventory: OpenInventory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image_format: ImageFormat,
) -> None:
    async with open_inventory() as inventory:
        sr, ref = await make(inventory, tmp_path)
        await inventory._copies.write(sr)
        record = VDI(
            ref="OpaqueRef:0000",
            uuid=NEW,
            sr=sr,
            name_label="kept",
            virtual_size=4 << 20,
            image_format=image_format,
        )

        async def killed(_record: VDI) -> None:
            monkeypatch.setattr(inventory._copies, "write", nothing)
            monkeypatch.setattr(inventory, "_remove_unknown", nothing)
            raise Killed

        monkeypatch.setattr(inventory.records.vdis, "add", killed)
        with pytest.raises(Killed):
            async with inventory.vdi_new(record, HOLDER) as new:
                await trio.to_thread.run_sync(new.staging.disk.pwrite, b"filled", 0)
                await new.staging.commit()
    monkeypatch.undo()
    async with open_inventory() as inventory:
        found = inventory.records.vdis.by_uuid(NEW)
        assert (found.name_label, found.image_format, found.virtual_size) == ("kept", image_format, 4 << 20)
        assert read(inventory.repository(sr).image_path(NEW), 6) == b"filled"
        assert made_journals(str(root_of(inventory, sr) / ".vdi-gateway")) == []
        assert len(inventory.records.vdis_of_sr(sr)) == 2
        assert ref in inventory.records.vdis


@pytest.mark.parametrize("copy", ["whole", "damaged", "missing"])
@pytest.mark.parametrize("empty", [False, True])
async def test_a_gateway_that_dies_before_the_record_finds_the_snapshot_with_its_name(
    open_inventory: OpenInventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool, copy: str
) -> None:
    async with open_inventory() as inventory:
        sr, ref = await make(inventory, tmp_path)
        if empty:
            # The next snapshot then stands beside it, and needs no base copy.
            await inventory.vdi_snapshot(ref)
        await inventory._copies.write(sr)
        expected = content(inventory, ref)

        async def killed(_records: Iterable[VDI]) -> None:
            # What comes at the end of a process that ends in order doesn't come now.
            monkeypatch.setattr(inventory._copies, "write", nothing)
            monkeypatch.setattr(inventory, "_withdraw", nothing)
            raise Killed

        monkeypatch.setattr(inventory.records.vdis, "add_all", killed)
        before = {vdi.ref for vdi in inventory.records.vdis_of_sr(sr)}
        with pytest.raises(Killed):
            await inventory.vdi_snapshot(ref)
        records = root_of(inventory, sr) / ".vdi-gateway" / "records.json"
    monkeypatch.undo()
    if copy == "damaged":
        records.write_bytes(records.read_bytes()[:-100])
    elif copy == "missing":
        records.unlink()
    async with open_inventory() as inventory:
        new = [vdi for vdi in inventory.records.vdis_of_sr(sr) if vdi.ref not in before]
        assert sorted(vdi.name_label for vdi in new) == (["disk"] if empty else ["base copy", "disk"])
        (taken,) = [vdi for vdi in new if vdi.managed]
        assert (taken.is_a_snapshot, taken.snapshot_of, taken.tags) == (True, ref, ("one",))
        assert taken.snapshot_time.year > 2000
        assert content(inventory, taken.ref) == content(inventory, ref) == expected
        await write(inventory, ref, b"later")
        assert content(inventory, taken.ref) == expected
        assert made_journals(str(root_of(inventory, sr) / ".vdi-gateway")) == []


async def nothing(*_: object) -> None:
    pass
