"""A rename that fails, and is done or not done all the same, as on a network file system: no byte goes."""

import errno
import os
from pathlib import Path

import pytest
import trio

from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI
from gateway.images.files import FileCalls
from tests.repository.conftest import OpenInventory
from tests.repository.vdis import content, make, root_of

HOLDER = Holder("root", "import", "OpaqueRef:vdi")
NEW = "00000109-0000-4000-8000-000000000000"


class Unanswered(FileCalls):
    """While `failing`, a rename to the name of an image fails: `done`, or else not done.

    With `for_good` what is tried after it to remove an image fails too.
    """

    def __init__(self, *, done: bool, for_good: bool = False) -> None:
        self.failing = False
        self._done = done
        self._for_good = for_good

    def rename(self, source: str, target: str) -> None:
        fails = self.failing and target.endswith((".vhd", ".raw"))
        if self._done or not fails:
            super().rename(source, target)
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO), target)

    def unlink(self, path: str) -> None:
        if self.failing and self._for_good and path.endswith(".vhd"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        super().unlink(path)


@pytest.mark.parametrize("done", [False, True])
async def test_an_import_whose_rename_fails_leaves_the_old_content_or_the_new(
    open_inventory: OpenInventory, tmp_path: Path, done: bool
) -> None:
    files = Unanswered(done=done)
    async with open_inventory(files=files) as inventory:
        sr, ref = await make(inventory, tmp_path)
        old = content(inventory, ref)
        lease = await inventory.lease(ref, LeaseMode.REPLACE, HOLDER)
        files.failing = True
        with pytest.raises(OSError, match="Input/output error"):
            async with inventory.repository(sr).staging(lease, whole=True) as staging:
                await trio.to_thread.run_sync(staging.disk.pwrite, b"\x22" * 4096, 0)
                await staging.commit()
        files.failing = False
        lease.release()
        await lease.released()
        assert content(inventory, ref) == (b"\x22" * 4096 + old[4096:] if done else old)
        # Who tells of the content asks whether it is another one.
        assert (staging.committed is not None) is done
        assert os.listdir(root_of(inventory, sr) / ".vdi-gateway" / "staging") == []


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("done", [False, True])
async def test_a_new_vdi_whose_rename_fails_is_not_there_or_is_whole(
    open_inventory: OpenInventory, tmp_path: Path, done: bool, for_good: bool
) -> None:
    files = Unanswered(done=done, for_good=for_good)
    async with open_inventory(files=files) as inventory:
        sr, ref = await make(inventory, tmp_path)
        new = VDI(ref="OpaqueRef:new", uuid=NEW, sr=sr, virtual_size=4 << 20)
        files.failing = True
        with pytest.raises(OSError, match="Input/output error"):
            async with inventory.vdi_new(new, HOLDER) as filled:
                await trio.to_thread.run_sync(filled.staging.disk.pwrite, b"\x22" * 4096, 0)
                await filled.staging.commit()
        files.failing = False
        await inventory.sr_scan(sr)
        there = {vdi.uuid: vdi.ref for vdi in inventory.records.vdis_of_sr(sr) if vdi.ref != ref}
        assert set(there) == ({NEW} if done and for_good else set())
        if there:
            assert content(inventory, there[NEW])[:4096] == b"\x22" * 4096


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_an_empty_vdi_whose_rename_fails_is_not_there(
    open_inventory: OpenInventory, tmp_path: Path, image_format: str
) -> None:
    files = Unanswered(done=True)
    async with open_inventory(files=files) as inventory:
        sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
        files.failing = True
        with pytest.raises(OSError, match="Input/output error"):
            await inventory.vdi_create(sr=sr, virtual_size=2 << 20, sm_config={"type": image_format})
        files.failing = False
        await inventory.sr_scan(sr)
        assert inventory.records.vdis_of_sr(sr) == []
