"""A merge that was begun and left half way: it is finished, with its records, and no task stays pending."""

import errno
import os
from pathlib import Path

import pytest

from gateway.core.leases import LeaseMode
from gateway.core.records import VDI
from gateway.core.task import TaskStatus
from gateway.images.files import FileCalls
from gateway.images.vhd.image import open_vhd
from gateway.images.vhd.merge import Merge
from gateway.repository.coalescer import PAUSED_KEY
from tests.repository.coalesce_house import House, OpenHouse, leased, make_middle, told
from tests.repository.vdis import content, hidden, make, root_of, write


class FailingRelink(FileCalls):
    """Fails where the child of an inline coalesce would go."""

    failing = True

    def unlink(self, path: str) -> None:
        if self.failing and path.endswith(".vhd") and ".vdi-gateway" not in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().unlink(path)


async def test_a_relink_that_fails_half_way_is_finished_and_the_records_follow(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    files = FailingRelink()
    files.failing = False
    async with open_house(files=files) as house:
        inventory = house.inventory
        sr, ref, first, second = await make_middle(inventory, tmp_path)
        expected = {leaf: content(inventory, leaf) for leaf in (ref, second)}
        ids = {leaf: inventory.records.vdis.get(leaf).content_id for leaf in expected}
        async with leased(house, ref, LeaseMode.READ):
            await inventory.vdi_destroy(first)
            files.failing = True
        await told(house, lambda: bool(house.coalesced()) and house.coalesced()[0].status.is_final)
        assert house.coalesced()[0].status is TaskStatus.FAILURE
        files.failing = False
        await house.settled(sr)
        assert len(hidden(inventory, sr)) == 1
        for leaf, before in expected.items():
            assert content(inventory, leaf) == before
            assert inventory.records.vdis.get(leaf).content_id == ids[leaf]
        await house.assert_records_are_true(sr)


@pytest.mark.parametrize("found_at", ["attaching", "scanning"])
async def test_a_coalesce_of_a_gateway_that_crashed_is_finished_and_so_are_its_records(
    open_house: OpenHouse, tmp_path: Path, found_at: str
) -> None:
    async with open_house() as house:
        inventory = house.inventory
        sr, ref = await make(inventory, tmp_path)
        await inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
        first = await inventory.vdi_snapshot(ref)
        await write(inventory, ref, b"\x22" * 8192, 4096)
        await inventory.vdi_snapshot(ref)
        expected = content(inventory, ref)
        await inventory.vdi_destroy(first)
        (middle,) = [vdi for vdi in hidden(inventory, sr) if "vhd-parent" in vdi.sm_config]
        root = root_of(inventory, sr)
        if found_at == "scanning":
            leave_half_relinked(root, middle)
            await assert_finished(house, sr, ref, expected)
    if found_at == "attaching":
        leave_half_relinked(root, middle)
        async with open_house() as house:
            await assert_finished(house, sr, ref, expected)


def leave_half_relinked(root: Path, node: VDI) -> None:
    """What a crash leaves between the copy and the first child."""
    merge(root / f"{node.uuid}.vhd", root / f"{node.sm_config['vhd-parent']}.vhd")
    (root / f"relink_{node.uuid}").write_text("1")


async def assert_finished(house: House, sr: str, ref: str, expected: bytes) -> None:
    await house.inventory.records.srs.change(sr, other_config={})
    await house.settled(sr)
    assert not [path.name for path in root_of(house.inventory, sr).glob("*_*")]
    assert len(hidden(house.inventory, sr)) == 1
    assert content(house.inventory, ref) == expected
    await house.assert_records_are_true(sr)


def merge(child: Path, parent: Path) -> None:
    with child.open("rb") as above, parent.open("r+b") as below:
        merging = Merge(open_vhd(above.fileno(), str(child)), open_vhd(below.fileno(), str(parent)))
        assert merging.copy_some(lambda: False)
        merging.finish()


async def test_tasks_that_a_killed_gateway_left_pending_are_ended(
    open_house: OpenHouse, tmp_path: Path
) -> None:
    async with open_house() as house:
        sr, _ = await make(house.inventory, tmp_path)
        about = {"SR": house.inventory.records.srs.get(sr).uuid}
        left = await house.tasks.create("coalesce", client_made=False, other_config=about)
        others = await house.tasks.create("coalesce", other_config=about)
    async with open_house() as house:
        await house.settled(sr)
        assert house.tasks.get(left.ref).error_info == ("TASK_INTERRUPTED",)
        assert house.tasks.get(others.ref).status is TaskStatus.PENDING
