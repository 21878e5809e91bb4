"""What another program finds of the changed blocks in a detached SR, and what comes back from there."""

import os
import struct
import uuid
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.repository.inventory import Inventory
from tests.repository.coalesce_house import House
from tests.repository.tracked import GRAIN, MIB, content, differing, told, tracked, write
from tests.repository.vdis import pbd_of


def told_by_files(root: Path, older: str, newer: str) -> set[int]:
    """What SM makes of the logs (VDI.list_changed_blocks): from child to child, all bits after the first."""
    changed: set[int] = set()
    here = older
    while here != newer:
        child = (root / f"{here}.cbtlog").read_bytes()[16:32]
        here = str(uuid.UUID(bytes=child))
        log = (root / f"{here}.cbtlog").read_bytes()
        size = struct.unpack_from("<Q", log, 40)[0]
        bits = log[48:]
        assert len(bits) >= -(-size // (8 * GRAIN))
        changed |= {block for block in range(size // GRAIN) if bits[block >> 3] >> (block & 7) & 1}
    return changed


def is_consistent(root: Path, name: str) -> bool:
    (told,) = struct.unpack_from("<i", (root / f"{name}.cbtlog").read_bytes(), 32)
    return bool(told)


async def four_states(inventory: Inventory, root: Path) -> tuple[str, list[str]]:
    """A VDI that was written to after each of three snapshots; the SR, and the four references in order."""
    sr, ref = await tracked(inventory, root)
    await write(inventory, ref, (0, b"a" * 3 * MIB))
    refs = []
    for number in range(3):
        refs.append(await inventory.vdi_snapshot(ref))
        await write(inventory, ref, ((number + 1) * MIB, b"b" * 512))
    return sr, [*refs, ref]


async def test_the_logs_of_a_detached_sr_tell_all_to_who_reads_only_them(
    inventory: Inventory, tmp_path: Path
) -> None:
    root = tmp_path / "sr"
    sr, refs = await four_states(inventory, root)
    disks = [content(inventory, ref) for ref in refs]
    uuids = [inventory.records.vdis.get(ref).uuid for ref in refs]
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    for older in range(4):
        for newer in range(older + 1, 4):
            found = told_by_files(root, uuids[older], uuids[newer])
            assert found == differing(disks[older], disks[newer]) != set()
    assert [is_consistent(root, name) for name in uuids] == [True, True, True, False]
    # What the files say is no less here.
    await inventory.pbd_plug(pbd_of(inventory, sr))
    assert await told(inventory, refs[0], refs[3]) == {16, 32, 48}
    await write(inventory, refs[3], (5 * MIB, b"c" * 512))
    assert await told(inventory, refs[2], refs[3]) == {48, 80}


async def test_an_sr_in_use_keeps_its_logs_as_they_are(inventory: Inventory, tmp_path: Path) -> None:
    root = tmp_path / "sr"
    sr, refs = await four_states(inventory, root)
    lease = await inventory.lease(refs[3], LeaseMode.WRITE, Holder("root", "write", refs[3]))
    before = {path: path.read_bytes() for path in root.glob("*.cbtlog")}
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await inventory.pbd_unplug(pbd_of(inventory, sr))
    assert {path: path.read_bytes() for path in root.glob("*.cbtlog")} == before
    lease.release()
    await lease.released()


async def test_a_broken_image_does_not_keep_an_sr_attached(inventory: Inventory, tmp_path: Path) -> None:
    root = tmp_path / "sr"
    sr, refs = await four_states(inventory, root)
    second = inventory.records.vdis.get(refs[1]).uuid
    os.truncate(root / f"{second}.vhd", 100)
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    assert not inventory.records.pbds.get(pbd_of(inventory, sr)).currently_attached


@pytest.mark.parametrize("snapshots", [1, 2])
async def test_what_is_left_of_a_snapshot_comes_back_with_a_forgotten_sr(
    house: House, tmp_path: Path, snapshots: int
) -> None:
    inventory, root = house.inventory, tmp_path / "sr"
    sr, ref = await tracked(inventory, root)
    await write(inventory, ref, (0, b"a" * 512))
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (MIB, b"b" * 512))
    refs = [first, *[await inventory.vdi_snapshot(ref) for _ in range(snapshots - 1)], ref]
    await inventory.vdi_data_destroy(first)
    await house.settled(sr)
    uuids = [inventory.records.vdis.get(ref).uuid for ref in refs]
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    await inventory.sr_forget(sr)
    sr = await inventory.sr_attach(str(root), writable=True)
    await house.settled(sr)
    vdis = [inventory.records.vdis.by_uuid(name) for name in uuids]
    assert (vdis[0].type, vdis[0].cbt_enabled, vdis[0].is_a_snapshot) == ("cbt_metadata", True, True)
    for vdi in vdis[1:]:
        assert await told(inventory, vdis[0].ref, vdi.ref) == {16}
    await inventory.vdi_destroy(vdis[0].ref)
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    await inventory.sr_forget(sr)
    await inventory.sr_attach(str(root), writable=True)
    assert uuids[0] not in {vdi.uuid for vdi in inventory.records.vdis.all()}


async def test_an_sr_with_what_is_left_of_a_snapshot_is_not_destroyed(house: House, tmp_path: Path) -> None:
    """As SM, to which each log is a VDI (FileSR._loadvdis, FileSR.delete)."""
    inventory, root = house.inventory, tmp_path / "sr"
    sr, ref = await tracked(inventory, root)
    first = await inventory.vdi_snapshot(ref)
    await inventory.vdi_data_destroy(first)
    await inventory.vdi_destroy(ref)
    await house.settled(sr)
    kept = inventory.records.vdis.get(first)
    assert kept.type == "cbt_metadata"
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    with pytest.raises(XenAPIError, match="SR_NOT_EMPTY"):
        await inventory.sr_destroy(sr)
    assert inventory.records.vdis.get(first) == kept
    assert (root / f"{kept.uuid}.cbtlog").exists()
    await inventory.pbd_plug(pbd_of(inventory, sr))
    await inventory.vdi_destroy(first)
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    await inventory.sr_destroy(sr)
    assert set(os.listdir(root)) <= {".vdi-gateway"}
    assert await inventory.sr_create("again", str(root))


async def test_an_sr_that_is_being_coalesced_is_detached_with_its_logs(house: House, tmp_path: Path) -> None:
    inventory, root = house.inventory, tmp_path / "sr"
    sr, refs = await four_states(inventory, root)
    before, after = content(inventory, refs[0]), content(inventory, refs[3])
    uuids = [inventory.records.vdis.get(ref).uuid for ref in refs]
    # Two nodes are left that can be merged, and nobody waits for that.
    await inventory.vdi_destroy(refs[1])
    await inventory.vdi_destroy(refs[2])
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    assert told_by_files(root, uuids[0], uuids[3]) >= differing(before, after) != set()
