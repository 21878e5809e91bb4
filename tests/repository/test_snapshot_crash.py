"""A snapshot or revert that fails or is killed at any call is undone or finished, and no byte is lost."""

import errno
import itertools
import os
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import LeaseMode, Leases
from gateway.images.vhd.check import check_vhd
from gateway.repository.directory import SRDirectory
from gateway.repository.fork import Fork, Revert, unfinished_forks
from gateway.repository.repository import Repository
from tests.crash import CrashState, RecordingFileCalls
from tests.repository.conftest import SR_UUID, OpenInventory
from tests.repository.failing_once import FailingOnce
from tests.repository.test_crash import CHILD, HOLDER, NEW, PARENT, RAW, SAMPLE, prepare, states
from tests.repository.test_repository import read
from tests.repository.test_repository import replace as replace_image
from tests.repository.vdis import content, hidden, make, root_of

BASE = "00000009-0000-4000-8000-000000000000"


async def test_a_snapshot_that_fails_at_any_call_leaves_every_byte_and_no_second_vdi(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = FailingOnce()
    async with open_inventory(files=files) as inventory:
        sr, ref = await make(inventory, tmp_path)
        expected = content(inventory, ref)
        for number in itertools.count():
            # The copy of the records must not take the failure.
            await inventory._copies.write(sr)
            files.left = number
            try:
                taken = await inventory.vdi_snapshot(ref)
            except XenAPIError as error:
                assert error.code == "SR_FULL"
                files.left = float("inf")
            else:
                files.left = float("inf")
                await inventory.vdi_destroy(taken)
                break
            await inventory.sr_scan(sr)
            assert unfinished_forks(SRDirectory(str(root_of(inventory, sr)))) == []
            assert [vdi.ref for vdi in inventory.records.vdis_of_sr(sr) if vdi.managed] == [ref]
            assert content(inventory, ref) == expected
            if hidden(inventory, sr):
                break
        assert number > 5


async def after_the_crash(state: CrashState, leases: Leases) -> Repository:
    where = str(state.directory)
    with suppress(FileNotFoundError):
        os.unlink(SRDirectory(where).owner)
    repository = await Repository.attach(where, leases, writable=True, who="after", uuid=SR_UUID)
    result = await repository.scan()
    assert not [*result.errors(), *result.strange, *result.journals], state
    assert unfinished_forks(repository.directory) == [], state
    assert os.listdir(repository.directory.staging) == [], state
    return repository


class WithoutLinks(RecordingFileCalls):
    """As on a file system that has none."""

    def link(self, source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)


@pytest.mark.parametrize(
    ("source", "calls"),
    [(PARENT, RecordingFileCalls), (PARENT, WithoutLinks), (CHILD, RecordingFileCalls)],
)
async def test_after_a_crash_at_any_point_a_snapshot_is_undone_or_finished(
    tmp_path: Path, leases: Leases, source: str, calls: type[RecordingFileCalls]
) -> None:
    root = str(tmp_path / "sr")
    initial = await prepare(root, leases)
    if source == PARENT:
        os.unlink(os.path.join(root, f"{CHILD}.vhd"))
    expected = initial[source]
    files = calls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    lease = await repository.lease(source, LeaseMode.REPLACE, HOLDER)
    fork = Fork(repository.directory, lease, base=BASE, child=NEW, files=files)
    await trio.to_thread.run_sync(fork.prepare)
    assert fork.has_base is (source == PARENT)
    await repository.restructure(fork.publish, (source, BASE, NEW))
    files.mark("done")
    await trio.to_thread.run_sync(fork.discard)
    lease.release()
    await lease.released()
    await repository.detach()
    count = 0
    async for state in states(files, tmp_path, 3):
        count += 1
        again = await after_the_crash(state, leases)
        images = again.images
        for image in images.values():
            wanted = initial[RAW] if image.uuid == RAW else expected
            assert read(image.path, SAMPLE) == wanted, f"{image.name}: {state}"
            if image.format == "vhd":
                assert not check_vhd(image.path).problems, f"{image.name}: {state}"
        assert source in images, state
        if BASE in images:
            assert images[BASE].hidden, state
            assert images[source].parent == BASE, state
        if "done" in state.marks:
            assert NEW in images, state
        await again.detach()
    assert count > 20


async def test_after_a_crash_at_any_point_a_revert_is_undone_or_finished(
    tmp_path: Path, leases: Leases
) -> None:
    root = str(tmp_path / "sr")
    initial = await prepare(root, leases)
    before = await Repository.attach(root, leases, writable=True, who="before", uuid=SR_UUID)
    await before.scan()
    lease = await before.lease(CHILD, LeaseMode.REPLACE, HOLDER)
    fork = Fork(before.directory, lease, base=BASE, child=NEW, files=before.files)
    await trio.to_thread.run_sync(fork.prepare)
    await before.restructure(fork.publish, (CHILD, NEW))
    lease.release()
    await lease.released()
    await replace_image(before, CHILD, b"\x44" * SAMPLE)
    await before.detach()
    files = RecordingFileCalls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    target = await repository.lease(CHILD, LeaseMode.REPLACE, HOLDER)
    source = await repository.lease(NEW, LeaseMode.READ, HOLDER)
    revert = Revert(repository.directory, target, source, files)
    target.move_to(await trio.to_thread.run_sync(revert.prepare))
    await repository.restructure(revert.publish, (CHILD,))
    files.mark("done")
    for held in (target, source):
        held.release()
        await held.released()
    await repository.detach()
    async for state in states(files, tmp_path, 3):
        again = await after_the_crash(state, leases)
        found = read(again.images[CHILD].path, SAMPLE)
        assert found in (initial[CHILD], *(() if "done" in state.marks else (b"\x44" * SAMPLE,))), state
        for uuid in (PARENT, NEW):
            assert read(again.images[uuid].path, SAMPLE) == initial[PARENT], state
        assert not check_vhd(again.images[CHILD].path).problems, state
        await again.detach()


async def test_a_recovery_that_is_interrupted_is_done_again(tmp_path: Path, leases: Leases) -> None:
    root = str(tmp_path / "sr")
    initial = await prepare(root, leases)
    os.unlink(os.path.join(root, f"{CHILD}.vhd"))
    files = RecordingFileCalls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    lease = await repository.lease(PARENT, LeaseMode.REPLACE, HOLDER)
    fork = Fork(repository.directory, lease, base=BASE, child=NEW, files=files)
    await trio.to_thread.run_sync(fork.prepare)
    await repository.restructure(fork.publish, (PARENT, BASE, NEW))
    lease.release()
    await lease.released()
    await repository.detach()
    interrupted = 0
    for number, state in enumerate(files.kill_states(tmp_path / "first")):
        if not unfinished_forks(SRDirectory(str(state.directory))):
            continue
        interrupted += 1
        recovering = RecordingFileCalls(state.directory)
        os.unlink(SRDirectory(str(state.directory)).owner)
        again = await Repository.attach(
            str(state.directory), leases, writable=True, who="second", uuid=SR_UUID, files=recovering
        )
        await again.detach()
        async for second in states(recovering, tmp_path / f"second {number}", 1):
            last = await after_the_crash(second, leases)
            assert read(last.images[PARENT].path, SAMPLE) == initial[PARENT], f"{state} {second}"
            await last.detach()
    assert interrupted > 5
