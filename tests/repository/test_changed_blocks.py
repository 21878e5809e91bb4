"""What is said to have changed, against the bytes of the disks."""

from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.images.cbtlog import read_header, read_log
from gateway.images.vhd.check import check_vhd
from gateway.repository.inventory import Inventory
from tests.repository.coalesce_house import House
from tests.repository.conftest import OpenInventory
from tests.repository.tracked import (
    GRAIN,
    MIB,
    content,
    differing,
    file_of,
    marked,
    names,
    told,
    tracked,
    write,
)
from tests.repository.vdis import pbd_of, replace


async def test_two_snapshots_differ_where_the_disk_was_written_to(
    inventory: Inventory, tmp_path: Path
) -> None:
    _, ref = await tracked(inventory, tmp_path / "sr")
    await write(inventory, ref, (0, b"a" * 3 * MIB))
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (GRAIN, b"b" * 512), (5 * MIB - 512, b"c" * 1024))
    second = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (7 * MIB, b"d" * 512))
    bits = await inventory.vdi_list_changed_blocks(first, second)
    # 32 bits for each 2 MiB, the first block the highest bit.
    assert len(bits) == 16
    assert bits[0] == 0b01000000
    assert marked(bits) == {1, 79, 80} == differing(content(inventory, first), content(inventory, second))
    assert await told(inventory, first, ref) == {1, 79, 80, 112}
    assert await told(inventory, second, ref) == {112}


async def test_after_data_destroy_the_changes_are_still_known(house: House, tmp_path: Path) -> None:
    inventory = house.inventory
    sr, ref = await tracked(inventory, tmp_path / "sr")
    await write(inventory, ref, (0, b"a" * 3 * MIB))
    first = await inventory.vdi_snapshot(ref)
    before = content(inventory, first)
    await inventory.vdi_data_destroy(first)
    record = inventory.records.vdis.get(first)
    assert (record.type, record.cbt_enabled, record.managed, record.missing) == (
        "cbt_metadata",
        True,
        True,
        False,
    )
    # Marks the place in the chain, and takes next to nothing.
    assert file_of(inventory, first).stat().st_blocks * 512 < 64 << 10
    await write(inventory, ref, (GRAIN, b"b" * 512), (6 * MIB, b"c" * 512))
    assert await told(inventory, first, ref) == {1, 96} == differing(before, content(inventory, ref))
    await house.settled(sr)
    assert await told(inventory, first, ref) == {1, 96}
    second = await inventory.vdi_snapshot(ref)
    after = content(inventory, second)
    await house.settled(sr)
    assert not file_of(inventory, first).exists()
    assert await told(inventory, first, second) == {1, 96} == differing(before, after)
    await inventory.vdi_data_destroy(second)
    await write(inventory, ref, (2 * MIB, b"d" * 512))
    await house.settled(sr)
    assert await told(inventory, first, second) == {1, 96}
    assert await told(inventory, first, ref) == {1, 32, 96}
    assert await told(inventory, second, ref) == {32}
    await house.assert_records_are_true(sr)


async def test_chains_stay_short_while_snapshots_come_and_lose_their_data(
    house: House, tmp_path: Path
) -> None:
    inventory = house.inventory
    sr, ref = await tracked(inventory, tmp_path / "sr")
    last = await inventory.vdi_snapshot(ref)
    for number in range(6):
        await write(inventory, ref, (number * MIB, bytes([number + 1]) * 512))
        new = await inventory.vdi_snapshot(ref)
        assert await told(inventory, last, new) == {16 * number}
        await inventory.vdi_data_destroy(last)
        last = new
        await house.settled(sr)
        assert len(house.chain(ref)) <= 3
    await inventory.vdi_data_destroy(last)
    await house.settled(sr)
    # The VDI, one base, and the place of the last snapshot.
    images = inventory.repository(sr).images
    assert len(images) == 3
    for image in images.values():
        assert not check_vhd(image.path).problems


async def test_the_log_of_a_snapshot_is_complete_once_its_neighbours_data_is_gone(
    inventory: Inventory, tmp_path: Path
) -> None:
    _, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (3 * GRAIN, b"b" * 512))
    second = await inventory.vdi_snapshot(ref)
    header = read_header(str(file_of(inventory, second, "cbtlog")))
    assert header.parent == inventory.records.vdis.get(first).uuid
    assert header.child == inventory.records.vdis.get(ref).uuid
    assert not header.consistent
    await inventory.vdi_data_destroy(first)
    assert not file_of(inventory, first).exists()
    log = read_log(str(file_of(inventory, second, "cbtlog")))
    assert log.header.consistent
    assert marked(log.bits) == {3}
    # In the file the lowest bit of a byte is its first block.
    assert file_of(inventory, second, "cbtlog").read_bytes()[48:] == b"\x08" + bytes(15)
    assert not read_header(str(file_of(inventory, ref, "cbtlog"))).consistent


async def test_a_destroyed_snapshot_hands_on_what_it_knew(house: House, tmp_path: Path) -> None:
    inventory = house.inventory
    sr, ref = await tracked(inventory, tmp_path / "sr")
    snapshots, contents = [], []
    for number in range(4):
        snapshots.append(await inventory.vdi_snapshot(ref))
        contents.append(content(inventory, snapshots[-1]))
        await write(inventory, ref, (number * MIB, bytes([number + 1]) * 512))
    await inventory.vdi_data_destroy(snapshots[0])
    await inventory.vdi_destroy(snapshots[1])
    await house.settled(sr)
    assert await told(inventory, snapshots[0], snapshots[2]) == {0, 16}
    await inventory.vdi_data_destroy(snapshots[2])
    await inventory.vdi_destroy(snapshots[2])
    await inventory.vdi_destroy(snapshots[3])
    await house.settled(sr)
    assert await told(inventory, snapshots[0], ref) == {0, 16, 32, 48}
    await write(inventory, ref, (5 * MIB, b"\x11" * 512))
    assert await told(inventory, snapshots[0], ref) == {0, 16, 32, 48, 80}
    await inventory.vdi_destroy(snapshots[0])
    await house.settled(sr)
    assert names(inventory, sr) == {file_of(inventory, ref).name, file_of(inventory, ref, "cbtlog").name}


async def test_a_destroyed_vdi_leaves_its_snapshots_comparable(house: House, tmp_path: Path) -> None:
    inventory = house.inventory
    sr, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (MIB, b"a" * 512))
    second = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (2 * MIB, b"b" * 512))
    await inventory.vdi_data_destroy(second)
    await inventory.vdi_destroy(ref)
    await house.settled(sr)
    assert await told(inventory, first, second) == {16}
    assert not file_of(inventory, second).exists()


async def test_a_revert_is_told(house: House, tmp_path: Path) -> None:
    inventory = house.inventory
    sr, ref = await tracked(inventory, tmp_path / "sr")
    await write(inventory, ref, (0, b"a" * MIB))
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (MIB, b"b" * 512), (0, b"c" * 512))
    second = await inventory.vdi_snapshot(ref)
    at_second = content(inventory, second)
    await inventory.vdi_data_destroy(second)
    await write(inventory, ref, (2 * MIB, b"d" * 512))
    await inventory.vdi_revert(first)
    await write(inventory, ref, (3 * MIB, b"e" * 512))
    await house.settled(sr)
    assert await told(inventory, second, ref) == {0, 16, 48}
    third = await inventory.vdi_snapshot(ref)
    await house.settled(sr)
    assert await told(inventory, second, third) >= differing(at_second, content(inventory, third))
    assert await told(inventory, first, third) >= {48}


async def test_after_an_import_over_the_vdi_all_that_either_has_is_told(house: House, tmp_path: Path) -> None:
    inventory = house.inventory
    sr, ref = await tracked(inventory, tmp_path / "sr")
    await write(inventory, ref, (0, b"a" * 512), (7 * MIB, b"b" * 512))
    first = await inventory.vdi_snapshot(ref)
    before = content(inventory, first)
    await inventory.vdi_data_destroy(first)
    await replace(inventory, ref, b"c" * 512 + bytes(2 * MIB) + b"d" * 512)
    await house.settled(sr)
    found = await told(inventory, first, ref)
    assert found >= differing(before, content(inventory, ref)) == {0, 32, 112}
    assert 64 not in found


async def test_a_resized_vdi_has_a_longer_answer_without_what_is_new(
    inventory: Inventory, tmp_path: Path
) -> None:
    _, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    await inventory.vdi_data_destroy(first)
    await inventory.vdi_resize(ref, 12 * MIB)
    await write(inventory, ref, (11 * MIB, b"a" * 512))
    bits = await inventory.vdi_list_changed_blocks(first, ref)
    assert len(bits) == 24
    assert marked(bits) == {176}
    second = await inventory.vdi_snapshot(ref)
    await inventory.vdi_data_destroy(second)
    assert await told(inventory, first, second) == {176}
    await inventory.vdi_destroy(first)


async def test_a_disk_that_became_smaller_breaks_the_row(inventory: Inventory, tmp_path: Path) -> None:
    _, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    await inventory.vdi_resize(ref, 12 * MIB)
    second = await inventory.vdi_snapshot(ref)
    await inventory.vdi_revert(first)
    with pytest.raises(XenAPIError, match="inconsistent") as refused:
        await inventory.vdi_list_changed_blocks(second, ref)
    assert refused.value.code == "SR_BACKEND_FAILURE_459"


async def test_a_clone_between_does_no_harm(house: House, tmp_path: Path) -> None:
    inventory = house.inventory
    sr, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    await inventory.vdi_data_destroy(first)
    await write(inventory, ref, (MIB, b"a" * 512))
    clone = await inventory.vdi_clone(ref)
    assert not inventory.records.vdis.get(clone).cbt_enabled
    await write(inventory, ref, (2 * MIB, b"b" * 512))
    assert await told(inventory, first, ref) == {16, 32}
    await inventory.vdi_destroy(clone)
    await house.settled(sr)
    assert await told(inventory, first, ref) == {16, 32}


async def test_everything_survives_a_restart(open_inventory: OpenInventory, tmp_path: Path) -> None:
    async with open_inventory() as inventory:
        _, ref = await tracked(inventory, tmp_path / "sr")
        await write(inventory, ref, (0, b"a" * 512))
        first = await inventory.vdi_snapshot(ref)
        await inventory.vdi_data_destroy(first)
        await write(inventory, ref, (MIB, b"b" * 512))
    async with open_inventory() as inventory:
        assert await told(inventory, first, ref) == {16}
        second = await inventory.vdi_snapshot(ref)
        await inventory.vdi_data_destroy(second)
    async with open_inventory() as inventory:
        await inventory.sr_scan(inventory.records.vdis.get(ref).sr)
        assert await told(inventory, first, second) == {16}
        assert await told(inventory, second, ref) == set()


async def test_enabling_and_disabling_twice_changes_nothing(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    log = file_of(inventory, ref, "cbtlog")
    before = log.read_bytes()
    await inventory.vdi_enable_cbt(ref)
    assert log.read_bytes() == before
    await inventory.vdi_data_destroy(first)
    for _ in range(2):
        await inventory.vdi_disable_cbt(ref)
        assert not inventory.records.vdis.get(ref).cbt_enabled
        assert not log.exists()
    # Nobody asks any more what has changed since.
    assert not file_of(inventory, first).exists()
    await inventory.vdi_enable_cbt(ref)
    with pytest.raises(XenAPIError, match="unrelated") as refused:
        await inventory.vdi_list_changed_blocks(first, ref)
    assert refused.value.code == "SR_BACKEND_FAILURE_460"
    assert names(inventory, sr) >= {log.name}


async def test_what_has_no_changed_blocks_is_refused_as_xenserver_does(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await tracked(inventory, tmp_path / "sr")
    raw = await inventory.vdi_create(sr=sr, virtual_size=MIB, sm_config={"type": "raw"})
    plain = await inventory.vdi_create(sr=sr, virtual_size=2 * MIB)
    first = await inventory.vdi_snapshot(ref)
    second = await inventory.vdi_snapshot(ref)
    untracked = await inventory.vdi_snapshot(plain)
    refusals = (
        (inventory.vdi_enable_cbt(raw), "SR_BACKEND_FAILURE_66"),
        (inventory.vdi_enable_cbt(first), "OPERATION_NOT_ALLOWED"),
        (inventory.vdi_disable_cbt(first), "OPERATION_NOT_ALLOWED"),
        (inventory.vdi_data_destroy(ref), "OPERATION_NOT_ALLOWED"),
        (inventory.vdi_data_destroy(untracked), "VDI_NO_CBT_METADATA"),
        (inventory.vdi_list_changed_blocks(first, first), "SR_BACKEND_FAILURE_460"),
        (inventory.vdi_list_changed_blocks(second, first), "SR_BACKEND_FAILURE_460"),
        (inventory.vdi_list_changed_blocks(first, untracked), "SR_BACKEND_FAILURE_460"),
    )
    for call, code in refusals:
        with pytest.raises(XenAPIError) as refused:
            await call
        assert refused.value.code == code
    await inventory.vdi_data_destroy(first)
    await inventory.vdi_data_destroy(first)
    holder = Holder("root", "export", first)
    for ask in (
        lambda: inventory.lease(first, LeaseMode.READ, holder),
        lambda: inventory.vdi_snapshot(first),
        lambda: inventory.vdi_clone(first),
        lambda: inventory.vdi_revert(first),
        lambda: inventory.vdi_create(sr=sr, virtual_size=MIB, type="cbt_metadata"),
    ):
        with pytest.raises(XenAPIError) as refused:
            await ask()
        assert refused.value.code == "VDI_INCOMPATIBLE_TYPE"


async def test_a_snapshot_that_is_being_read_keeps_its_data(
    inventory: Inventory, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    _, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    lease = await inventory.lease(first, LeaseMode.READ, Holder("root", "export", first))
    with pytest.raises(XenAPIError) as refused:
        await inventory.vdi_data_destroy(first)
    assert refused.value.code == "VDI_IN_USE"
    assert inventory.records.vdis.get(first).type == "user"
    lease.release()
    await lease.released()
    await inventory.vdi_data_destroy(first)
    assert inventory.records.vdis.get(first).type == "cbt_metadata"


async def test_a_vdi_that_is_being_written_to_has_no_answer(inventory: Inventory, tmp_path: Path) -> None:
    _, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    lease = await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
    with pytest.raises(XenAPIError) as refused:
        await inventory.vdi_list_changed_blocks(first, ref)
    assert refused.value.code == "VDI_IN_USE"
    lease.release()
    await lease.released()
    assert await told(inventory, first, ref) == set()


async def test_a_lost_place_or_log_never_says_too_little(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    async with open_inventory() as inventory:
        _, ref = await tracked(inventory, tmp_path / "sr")
        first = await inventory.vdi_snapshot(ref)
        await inventory.vdi_data_destroy(first)
        place, log = file_of(inventory, first), file_of(inventory, ref, "cbtlog")
    # XenServer removes hidden images on which nothing stands.
    place.unlink()
    async with open_inventory() as inventory:
        assert await told(inventory, first, ref) == set(range(128))
        second = await inventory.vdi_snapshot(ref)
        assert await told(inventory, first, second) == set(range(128))
    log.write_bytes(b"rubbish")
    async with open_inventory() as inventory:
        with pytest.raises(XenAPIError, match="unrelated"):
            await inventory.vdi_list_changed_blocks(second, ref)
        third = await inventory.vdi_snapshot(ref)
        await write(inventory, ref, (0, b"a" * 512))
        assert await told(inventory, third, ref) == {0}


async def test_xenserver_is_told_not_to_believe_the_log_of_a_vdi_that_is_written_to_here(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await tracked(inventory, tmp_path / "sr")
    first = await inventory.vdi_snapshot(ref)
    await inventory.pbd_unplug(pbd_of(inventory, sr))
    log = tmp_path / "sr" / f"{inventory.records.vdis.get(ref).uuid}.cbtlog"
    data = bytearray(log.read_bytes())
    data[32] = 1  # as after the VDI was used in XenServer
    log.write_bytes(data)
    await inventory.pbd_plug(pbd_of(inventory, sr))
    assert not read_header(str(log)).consistent
    assert await told(inventory, first, ref) == set()
