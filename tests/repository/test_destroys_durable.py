"""A VDI whose image was removed is destroyed only once a power failure can't bring the image back."""

import errno
import os
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.images.files import FileCalls
from tests.repository.conftest import OpenInventory
from tests.repository.vdis import make, root_of


class Removals(FileCalls):
    """`may_come_back` are removed names; the next `failures` syncs of directories fail."""

    def __init__(self) -> None:
        self.may_come_back: set[str] = set()
        self.failures = 0

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.may_come_back.add(path)

    def sync_directory(self, path: str) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        super().sync_directory(path)
        self.may_come_back = {name for name in self.may_come_back if os.path.dirname(name) != path}


async def test_a_destroy_that_is_tried_again_is_durable(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = Removals()
    async with open_inventory(files=files) as inventory:
        sr, ref = await make(inventory, tmp_path)
        image = str(root_of(inventory, sr) / f"{inventory.records.vdis.get(ref).uuid}.vhd")
        files.failures = 2
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                await inventory.vdi_destroy(ref)
            assert image in files.may_come_back
            assert ref in inventory.records.vdis
        await inventory.vdi_destroy(ref)
        assert image not in files.may_come_back
        with pytest.raises(XenAPIError, match="HANDLE_INVALID"):
            inventory.records.vdis.get(ref)
