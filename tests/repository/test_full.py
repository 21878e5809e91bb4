"""An SR that has no room for one more block: what makes room can be done."""

import errno
import os
from pathlib import Path

from gateway.images.files import FileCalls
from tests.repository.conftest import OpenInventory
from tests.repository.tracked import GRAIN, file_of, told, tracked, write


class Full(FileCalls):
    """Once `full`, there is no room for another file."""

    full = False

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if self.full and flags & os.O_CREAT and not os.path.exists(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return super().open(path, flags, mode)


async def test_in_a_full_sr_the_oldest_snapshot_goes_and_then_all_whose_disk_is_tracked_no_more(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = Full()
    async with open_inventory(files=files) as inventory:
        sr, ref = await tracked(inventory, tmp_path / "sr")
        snapshots = []
        for number in range(4):
            await write(inventory, ref, (number * GRAIN, b"x" * GRAIN))
            snapshots.append(await inventory.vdi_snapshot(ref))
        files.full = True
        gone = file_of(inventory, snapshots[0])
        await inventory.vdi_destroy(snapshots[0])
        assert not gone.exists()
        assert await told(inventory, snapshots[1], snapshots[3]) == {2, 3}
        assert await told(inventory, snapshots[2], ref) == {3}
        await inventory.vdi_disable_cbt(ref)
        assert await told(inventory, snapshots[1], snapshots[3]) == {2, 3}
        for taken in reversed(snapshots[1:]):
            await inventory.vdi_destroy(taken)
        assert [vdi.ref for vdi in inventory.records.vdis_of_sr(sr) if vdi.managed] == [ref]
        assert not [*(tmp_path / "sr").glob("*.cbtlog")]
        files.full = False
