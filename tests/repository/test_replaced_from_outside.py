"""What a program that knows no locks, such as rsync or XenServer's SM, puts in the place of an image that is
just being replaced or removed here, stays: none of our renames and removals is for it.
"""

import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.images.files import FileCalls
from gateway.repository.inventory import Inventory
from tests.repository.conftest import OpenInventory
from tests.repository.tracked import MIB, content, file_of, tracked, write

OPERATIONS: dict[str, Callable[[Inventory, str, str], Awaitable[object]]] = {
    "snapshot": lambda inventory, disk, _: inventory.vdi_snapshot(disk),
    "revert": lambda inventory, _, snapshot: inventory.vdi_revert(snapshot),
    "data_destroy": lambda inventory, _, snapshot: inventory.vdi_data_destroy(snapshot),
    "destroy": lambda inventory, _, snapshot: inventory.vdi_destroy(snapshot),
}


class Meddling(FileCalls):
    """Renames a file over another, once, as soon as what will come into its place or its log is durable."""

    meddle: tuple[Path, Path] | None = None

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self._synced(fd)

    def datasync(self, fd: int) -> None:
        super().datasync(fd)
        self._synced(fd)

    def _synced(self, fd: int) -> None:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if self.meddle is not None and ("/staging/" in name or name.endswith(".cbtlog")):
            foreign, path = self.meddle
            self.meddle = None
            os.rename(foreign, path)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_what_replaces_an_image_meanwhile_is_neither_renamed_over_nor_removed(
    open_inventory: OpenInventory, tmp_path: Path, operation: str
) -> None:
    files = Meddling()
    async with open_inventory(files=files) as inventory:
        sr, disk = await tracked(inventory, tmp_path / "sr")
        await write(inventory, disk, (0, b"\x11" * 4096))
        snapshot = await inventory.vdi_snapshot(disk)
        await write(inventory, disk, (2 * MIB, b"\x22" * 4096))
        expected = {ref: content(inventory, ref) for ref in (disk, snapshot)}
        path = file_of(inventory, disk if operation in ("snapshot", "revert") else snapshot)
        foreign = tmp_path / "foreign"
        shutil.copy(path, foreign)
        inode = os.stat(foreign).st_ino
        files.meddle = foreign, path
        with pytest.raises(XenAPIError, match="replaced from outside"):
            await OPERATIONS[operation](inventory, disk, snapshot)
        assert os.stat(path).st_ino == inode
        assert os.listdir(inventory.repository(sr).directory.staging) == []
        await inventory.sr_scan(sr)
        assert {vdi.ref for vdi in inventory.records.vdis_of_sr(sr) if vdi.managed} == {disk, snapshot}
        assert {ref: content(inventory, ref) for ref in expected} == expected
