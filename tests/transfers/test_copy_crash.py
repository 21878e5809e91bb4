"""A copy that is killed, or loses its power, at every point: it is there whole or not at all."""

import os
from pathlib import Path

import pytest
import trio

from gateway.core.leases import LeaseMode, Leases
from gateway.images.vhd.check import check_vhd
from gateway.repository.repository import Repository
from gateway.repository.staging import Staging
from gateway.transfers.copy_disk import Copied, fill
from tests.crash import RecordingFileCalls
from tests.images.disks import libvhdi_reads
from tests.repository.test_crash import CHILD, HOLDER, NEW, PARENT, RAW, SAMPLE, prepare, states
from tests.repository.test_repository import read, replace
from tests.repository.test_snapshot_crash import after_the_crash

SIZE = 4 << 20


async def copy_from_child(repository: Repository, staging: Staging) -> None:
    """The thread's part of a copy, and its commit."""
    lease = await repository.lease(CHILD, LeaseMode.READ, HOLDER)
    disk = await trio.to_thread.run_sync(lease.open_disk)

    def work() -> None:
        check = trio.from_thread.check_cancelled
        fill(disk, staging.disk, Copied(disk.size), check=check, files=repository.files)

    await trio.to_thread.run_sync(work)
    disk.close()
    lease.release()
    await lease.released()
    await staging.commit()


async def assert_every_state_is_whole(tmp_path: Path, leases: Leases, per_point: int) -> None:
    root = str(tmp_path / "sr")
    await prepare(root, leases)
    before = await Repository.attach(root, leases, writable=True, who="before")
    await before.scan()
    # The child has the first sectors, its parent the others.
    await replace(before, CHILD, b"\x33" * 4096, whole=False)
    await before.detach()
    data = (b"\x33" * 4096 + b"\x11" * (SAMPLE - 4096)).ljust(SIZE, b"\0")
    files = RecordingFileCalls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    async with repository.staging_new(NEW, SIZE, "vhd") as staging:
        await copy_from_child(repository, staging)
    files.mark("new")
    target = await repository.lease(RAW, LeaseMode.REPLACE, HOLDER)
    async with repository.staging(target, whole=True) as staging:
        await copy_from_child(repository, staging)
    files.mark("over")
    target.release()
    await target.released()
    await repository.detach()
    old = (b"\x22" * SAMPLE).ljust(SIZE, b"\0")
    count = 0
    async for state in states(files, tmp_path, per_point):
        count += 1
        again = await after_the_crash(state, leases)
        images = again.images
        assert set(images) - {NEW} == {PARENT, CHILD, RAW}, state
        if NEW in images:
            assert images[NEW].parent is None, state
            assert libvhdi_reads([Path(images[NEW].path)]) == data, state
            assert not check_vhd(images[NEW].path).problems, state
        else:
            assert "new" not in state.marks, state
        found = read(images[RAW].path, SIZE)
        assert found == data or (found == old and "over" not in state.marks), state
        await again.detach()
    assert count > 20
    assert os.listdir(repository.directory.staging) == []


async def test_after_a_crash_at_any_point_a_copy_is_whole_or_not_there(
    tmp_path: Path, leases: Leases
) -> None:
    await assert_every_state_is_whole(tmp_path, leases, per_point=2)


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_after_a_crash_at_any_point_a_copy_is_whole_or_not_there_in_many_ways(
    tmp_path: Path, leases: Leases
) -> None:
    await assert_every_state_is_whole(tmp_path, leases, per_point=30)
