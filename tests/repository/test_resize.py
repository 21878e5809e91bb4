import errno
import os
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.images.files import FileCalls
from gateway.images.vhd.check import check_vhd
from gateway.repository.directory import SRDirectory
from gateway.repository.inventory import Inventory
from gateway.repository.repository import Repository
from tests.crash import RecordingFileCalls
from tests.repository.conftest import SR_UUID, OpenInventory
from tests.repository.test_crash import CHILD, HOLDER, PARENT, RAW, SAMPLE, prepare, states
from tests.repository.test_repository import read
from tests.repository.vdis import replace

MIB = 1 << 20


def refusal(raised: "pytest.ExceptionInfo[XenAPIError]") -> str:
    return raised.value.code


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_a_vdi_grows_with_its_content_and_gets_another_content_id(
    inventory: Inventory, tmp_path: Path, image_format: str
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, sm_config={"image-format": image_format})
    await replace(inventory, ref, b"\x11" * 4096)
    before = inventory.records.vdis.get(ref)
    await inventory.vdi_resize(ref, 9 * MIB)
    after = inventory.records.vdis.get(ref)
    assert after.virtual_size == (10 * MIB if image_format == "vhd" else 9 * MIB)
    assert (after.uuid, after.content_id == before.content_id) == (before.uuid, False)
    lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
    disk = lease.open_disk()
    content = bytearray(disk.size)
    await trio.to_thread.run_sync(disk.pread_into, content, 0)
    assert content == b"\x11" * 4096 + bytes(after.virtual_size - 4096)
    disk.close()
    lease.release()
    await lease.released()
    assert inventory.leases.holders_for(ref) == ()


async def test_a_vdi_does_not_shrink_and_the_same_size_changes_nothing(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB)
    before = inventory.records.vdis.get(ref)
    with pytest.raises(XenAPIError) as raised:
        await inventory.vdi_resize(ref, 4 * MIB - 1)
    assert refusal(raised) == "VALUE_NOT_SUPPORTED"
    await inventory.vdi_resize(ref, 4 * MIB)
    assert inventory.records.vdis.get(ref) == before
    with pytest.raises(XenAPIError) as raised:
        await inventory.vdi_resize(ref, 3 << 40)
    assert refusal(raised) == "VDI_TOO_LARGE"


async def test_a_vdi_that_somebody_reads_is_in_use(inventory: Inventory, tmp_path: Path) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB)
    lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
    with pytest.raises(XenAPIError) as raised:
        await inventory.vdi_resize(ref, 8 * MIB)
    assert refusal(raised) == "VDI_IN_USE"
    lease.release()
    await lease.released()


class FullDisk(FileCalls):
    """A file system that is full once it is said to be."""

    full = False

    def truncate(self, fd: int, size: int) -> None:
        if self.full and size > os.fstat(fd).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().truncate(fd, size)


async def test_on_a_full_disk_the_vdi_stays_as_it_was(open_inventory: OpenInventory, tmp_path: Path) -> None:
    files = FullDisk()
    async with open_inventory(files=files) as inventory:
        sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
        ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, sm_config={"image-format": "raw"})
        before = inventory.records.vdis.get(ref)
        files.full = True
        with pytest.raises(XenAPIError) as raised:
            await inventory.vdi_resize(ref, 8 * MIB)
        files.full = False
        assert refusal(raised) == "SR_FULL"
        assert inventory.records.vdis.get(ref) == before
        assert os.listdir(tmp_path / "sr" / ".vdi-gateway" / "staging") == []


async def test_after_a_crash_at_any_point_a_vdi_has_its_old_size_or_its_new_one(
    tmp_path: Path, leases: Leases
) -> None:
    root = str(tmp_path / "sr")
    initial = await prepare(root, leases)
    files = RecordingFileCalls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    grown = (CHILD, RAW)
    for uuid in grown:
        lease = await repository.lease(uuid, LeaseMode.WRITE, HOLDER)
        async with repository.staging(lease, whole=False, size=16 * MIB) as staging:
            await staging.commit()
            files.mark(uuid)
        lease.release()
        await lease.released()
    await repository.detach()
    count = 0
    async for state in states(files, tmp_path, 2):
        count += 1
        where = str(state.directory)
        os.unlink(SRDirectory(where).owner)
        again = await Repository.attach(where, leases, writable=True, who="after", uuid=SR_UUID)
        result = await again.scan()
        assert not [*result.errors(), *result.strange], state
        for uuid in (*grown, PARENT):
            image = result.images[uuid]
            sizes = {16 * MIB} if uuid in state.marks else {4 * MIB, 16 * MIB} if uuid in grown else {4 * MIB}
            assert image.virtual_size in sizes, f"{uuid}: {state}"
            assert read(image.path, SAMPLE) == initial[uuid], f"{uuid}: {state}"
            if image.format == "vhd":
                assert not check_vhd(image.path).problems, f"{uuid}: {state}"
        await again.detach()
    assert count > 20
