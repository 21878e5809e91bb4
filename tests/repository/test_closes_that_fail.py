"""A close that fails, as on a network file system that has no room left, leaves nothing behind."""

import errno
import os
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.images.files import FileCalls
from tests.repository.conftest import OpenInventory
from tests.repository.vdis import content, make, root_of

HOLDER = Holder("root", "import", "OpaqueRef:vdi")


class NoRoom(FileCalls):
    """Once `full`, no data can be copied, and closing a file that was written to says so again."""

    full = False

    def clone(self, source_fd: int, fd: int) -> bool:
        return False

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().copy_range(source_fd, source_offset, fd, offset, length)

    def close(self, fd: int) -> None:
        super().close(fd)
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_staging_file_that_cannot_be_filled_or_closed_is_removed(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = NoRoom()
    async with open_inventory(files=files) as inventory:
        sr, ref = await make(inventory, tmp_path)
        lease = await inventory.lease(ref, LeaseMode.REPLACE, HOLDER)
        files.full = True
        with pytest.raises(OSError, match="No space left"):
            async with inventory.repository(sr).staging(lease, whole=False):
                pass
        files.full = False
        lease.release()
        await lease.released()
        assert os.listdir(root_of(inventory, sr) / ".vdi-gateway" / "staging") == []


async def test_what_ended_an_import_is_told_although_a_close_fails_after_it(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = NoRoom()
    async with open_inventory(files=files) as inventory:
        sr, ref = await make(inventory, tmp_path)
        expected = content(inventory, ref)
        lease = await inventory.lease(ref, LeaseMode.REPLACE, HOLDER)
        with pytest.raises(XenAPIError, match="TASK_CANCELLED"):
            async with inventory.repository(sr).staging(lease, whole=True):
                files.full = True
                raise XenAPIError("TASK_CANCELLED", "OpaqueRef:task")
        files.full = False
        lease.release()
        await lease.released()
        assert os.listdir(root_of(inventory, sr) / ".vdi-gateway" / "staging") == []
        assert content(inventory, ref) == expected
