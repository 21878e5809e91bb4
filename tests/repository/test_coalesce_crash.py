"""Whole coalesces, crashed after each file call: every VDI has its bytes, and the rest gets done."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.core.leases import Leases
from gateway.images.vhd.check import check_vhd
from gateway.repository.coalescer import PAUSED_KEY
from gateway.repository.directory import SRDirectory
from gateway.repository.records_copies import RecordsCopies
from gateway.repository.repository import Repository
from tests.crash import CrashState, RecordingFileCalls
from tests.repository.coalesce_house import MIB, House, OpenHouse, house_in
from tests.repository.test_crash import states
from tests.repository.test_repository import read
from tests.repository.vdis import make, write

SAMPLE = 4 * MIB


@pytest.fixture(autouse=True)
def no_copies_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have crash tests of their own, and are written whenever the clock says so."""

    async def write_nothing(_copies: RecordsCopies, _sr: str) -> None:
        pass

    monkeypatch.setattr(RecordsCopies, "write", write_nothing)


async def prepare(house: House, directory: Path) -> tuple[dict[str, bytes], str]:
    """A chain with a node to merge and three VDIs on it, and what they hold; and the third's reference."""
    inventory = house.inventory
    sr, ref = await make(inventory, directory)
    await inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x22" * 8192, 4096)
    kept = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x33" * 8192, 2 * MIB)
    clone = await inventory.vdi_clone(kept)
    await write(inventory, clone, b"\x44" * 512, 0)
    await inventory.vdi_destroy(first)
    repository = inventory.repository_of(ref)
    found = {}
    for vdi in (ref, kept, clone):
        uuid = inventory.records.vdis.get(vdi).uuid
        found[uuid] = read(repository.image_path(uuid), SAMPLE)
    return found, clone


async def crash(open_house: OpenHouse, directory: Path, tmp_path: Path, leases: Leases, points: int) -> None:
    async with open_house() as house:
        expected, clone = await prepare(house, directory)
        gone = house.inventory.records.vdis.get(clone).uuid
        root = Path(house.inventory.repository_of(clone).directory.root)
    files = RecordingFileCalls(root)
    async with open_house(files=files) as house:
        (sr,) = [record.ref for record in house.inventory.records.srs.all()]
        await house.inventory.records.srs.change(sr, other_config={})
        await house.settled(sr)
        files.mark("inline")
        for vdi in house.inventory.records.vdis_of_sr(sr):
            if vdi.is_a_snapshot:
                kept = vdi
        await house.inventory.vdi_destroy(clone)
        await house.inventory.vdi_destroy(kept.ref)
        await house.coalescer(sr).answered()
        assert [task.other_config["kind"] for task in house.coalesced()] == ["inline", "leaf"]
        (left,) = house.inventory.records.vdis_of_sr(sr)
        files.mark("leaf")
    count = 0
    async for state in states(files, tmp_path, points):
        count += 1
        await assert_whole(state, leases, expected, {gone, kept.uuid})
        if count % 40 == 0:
            await assert_coalesces(state, tmp_path / f"again {count}", left.uuid, expected[left.uuid])
    assert count > 60


async def assert_whole(
    state: CrashState, leases: Leases, expected: dict[str, bytes], may_be_gone: set[str]
) -> None:
    where = str(state.directory)
    with suppress(FileNotFoundError):
        os.unlink(SRDirectory(where).owner)
    again = await Repository.attach(where, leases, writable=True, who="after")
    result = await again.scan()
    assert not [*result.errors(), *result.strange, *result.journals], state
    assert os.listdir(again.directory.staging) == [], state
    for uuid, content in expected.items():
        image = result.images.get(uuid)
        if image is None:
            assert uuid in may_be_gone, state
            continue
        assert not image.hidden, state
        assert read(image.path, SAMPLE) == content, f"{uuid}: {state}"
    for image in result.images.values():
        assert not check_vhd(image.path).problems, f"{image.name}: {state}"
    if "leaf" in state.marks:
        assert len(result.images) == 1, state
    await again.detach()


async def assert_coalesces(state: CrashState, directory: Path, uuid: str, content: bytes) -> None:
    os.mkdir(directory)
    async with house_in(directory)() as house:
        sr = await house.inventory.sr_attach(str(state.directory), writable=True)
        await house.settled(sr)
        assert all(not vdi.missing for vdi in house.inventory.records.vdis_of_sr(sr)), state
        for vdi in house.inventory.records.vdis_of_sr(sr):
            if vdi.uuid != uuid and vdi.managed:
                await house.inventory.vdi_destroy(vdi.ref)
        await house.settled(sr)
        left = [vdi.uuid for vdi in house.inventory.records.vdis_of_sr(sr)]
        assert left == [uuid], (house.inventory.sr_coalesce_state(sr), state)
        assert read(house.inventory.repository(sr).image_path(uuid), SAMPLE) == content, state


async def test_after_a_crash_at_any_point_of_a_coalesce_every_vdi_has_its_bytes(
    open_house: OpenHouse, tmp_path: Path, leases: Leases
) -> None:
    await crash(open_house, tmp_path, tmp_path, leases, 1)


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_after_a_crash_at_any_point_of_a_coalesce_every_vdi_has_its_bytes_in_many_ways(
    open_house: OpenHouse, tmp_path: Path, leases: Leases
) -> None:
    await crash(open_house, tmp_path, tmp_path, leases, 30)
