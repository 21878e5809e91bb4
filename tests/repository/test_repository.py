import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.core.records import ImageFormat
from gateway.images.chain import open_chain_files, open_disk
from gateway.images.files import FileCalls
from gateway.images.vhd.create import create_dynamic
from gateway.repository.directory import DirectoryOwned, DirectoryUnavailable
from gateway.repository.repository import Repository
from tests.repository.conftest import SR_UUID, listing
from tests.repository.failing_once import FailingOnce
from tests.repository.test_scan import make_child

A, B = "00000001-0000-4000-8000-000000000000", "00000002-0000-4000-8000-000000000000"
MIB = 1 << 20
HOLDER = Holder("root", "import_raw_vdi", "OpaqueRef:vdi")


def read(path: str, length: int, offset: int = 0) -> bytes:
    disk = open_disk(open_chain_files(path, writable=False))
    try:
        buffer = bytearray(length)
        disk.pread_into(buffer, offset)
        return bytes(buffer)
    finally:
        disk.close()


async def replace(repository: Repository, uuid: str, data: bytes, *, whole: bool = True) -> None:
    lease = await repository.lease(uuid, LeaseMode.REPLACE, HOLDER)
    try:
        async with repository.staging(lease, whole=whole) as staging:
            await trio.to_thread.run_sync(staging.disk.pwrite, data, 0)
            await staging.commit()
    finally:
        lease.release()
        with trio.CancelScope(shield=True):
            await lease.released()


def staged(repository: Repository) -> list[str]:
    return os.listdir(repository.directory.staging)


@contextmanager
def another_owner(root: str) -> Iterator[None]:
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from gateway.repository.directory import OwnerLock, SRDirectory
lock = OwnerLock(SRDirectory(sys.argv[2]), "process two")
print("owned", flush=True)
sys.stdin.read()
"""
    arguments = [sys.executable, "-c", script, str(Path(__file__).parents[2]), root]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"owned\n"
        yield
        process.kill()


async def test_a_new_repository_needs_an_empty_or_absent_directory(tmp_path: Path, leases: Leases) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(OSError, match="empty"):
        await Repository.create(str(tmp_path), SR_UUID, leases, who="me")
    assert os.listdir(tmp_path) == ["precious"]


async def test_a_second_owner_is_refused_with_the_first_ones_name(
    repository: Repository, leases: Leases
) -> None:
    with pytest.raises(DirectoryOwned, match="attached writable by the test"):
        await Repository.attach(repository.directory.root, leases, writable=True, who="another")
    await repository.detach()
    other = await Repository.attach(repository.directory.root, leases, writable=True, who="another")
    await other.detach()


async def test_an_owner_in_another_process_counts_until_it_ends(
    repository: Repository, leases: Leases
) -> None:
    root = repository.directory.root
    await repository.detach()
    with another_owner(root):
        with pytest.raises(DirectoryOwned, match="process two"):
            await Repository.attach(root, leases, writable=True, who="me")
    await (await Repository.attach(root, leases, writable=True, who="me")).detach()


async def test_attaching_read_only_and_reading_changes_nothing_at_all(
    repository: Repository, leases: Leases
) -> None:
    await repository.create_image(A, 4 * MIB, "vhd")
    await repository.detach()
    before = listing(repository.directory.root)
    reader = await Repository.attach(repository.directory.root, leases, writable=False, who="me")
    assert set((await reader.scan()).images) == {A}
    lease = await reader.lease(A, LeaseMode.READ, HOLDER)
    lease.release()
    await lease.released()
    with pytest.raises(XenAPIError, match="VDI_READONLY"):
        await reader.lease(A, LeaseMode.WRITE, HOLDER)
    with pytest.raises(XenAPIError, match="SR_NOT_ATTACHED"):
        await reader.create_image(B, 4 * MIB, "vhd")
    await reader.detach()
    assert listing(repository.directory.root) == before


async def test_what_was_begun_before_a_detach_is_told_that_the_sr_is_not_attached(
    repository: Repository,
) -> None:
    """An unplug waits for leases, not for who is on the way to one."""
    await repository.create_image(A, 4 * MIB, "vhd")
    await repository.detach()
    for begun in (
        repository.create_image(B, 4 * MIB, "vhd"),
        repository.restructure(lambda: None, (A,)),
        repository.remove_service_files(),
    ):
        with pytest.raises(XenAPIError, match="SR_NOT_ATTACHED"):
            await begun


async def test_a_directory_without_its_marker_or_images_is_not_mounted(
    repository: Repository, leases: Leases, tmp_path: Path
) -> None:
    root = repository.directory.root
    await repository.create_image(A, 4 * MIB, "vhd")
    os.rename(root, tmp_path / "elsewhere")
    with pytest.raises(DirectoryUnavailable):
        await repository.scan()
    os.mkdir(root)
    assert not await repository.available()
    for attempt in (repository.scan(), repository.create_image(B, 4 * MIB, "vhd")):
        with pytest.raises(DirectoryUnavailable):
            await attempt
    with pytest.raises(DirectoryUnavailable):
        await repository.lease(A, LeaseMode.READ, HOLDER)
    await repository.detach()
    with pytest.raises(DirectoryUnavailable, match="marker"):
        await Repository.attach(root, leases, writable=True, who="me", uuid=SR_UUID)
    with pytest.raises(DirectoryUnavailable, match="mounted"):
        await Repository.attach(root, leases, writable=False, who="me", known_images=True)
    assert os.listdir(root) == []


async def test_another_sr_under_the_path_is_refused(repository: Repository, leases: Leases) -> None:
    await repository.detach()
    for writable in (True, False):
        with pytest.raises(DirectoryUnavailable, match=SR_UUID):
            await Repository.attach(repository.directory.root, leases, writable=writable, who="me", uuid=A)


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_a_created_image_reads_as_zeroes_and_is_destroyed(
    repository: Repository, image_format: ImageFormat
) -> None:
    image = await repository.create_image(A, 4 * MIB, image_format)
    assert read(image.path, 4 * MIB) == bytes(4 * MIB)
    assert image == (await repository.scan()).images[A]
    with pytest.raises(FileExistsError):
        await repository.create_image(A, 4 * MIB, "vhd")
    await repository.destroy_image(A, HOLDER)
    assert os.path.basename(image.path) not in os.listdir(repository.directory.root)
    assert staged(repository) == []
    with pytest.raises(XenAPIError, match="VDI_MISSING"):
        await repository.destroy_image(A, HOLDER)


async def test_nothing_is_destroyed_that_is_in_use_or_has_children(repository: Repository) -> None:
    await repository.create_image(A, 4 * MIB, "vhd")
    lease = await repository.lease(A, LeaseMode.READ, HOLDER)
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await repository.destroy_image(A, HOLDER)
    lease.release()
    await lease.released()
    make_child(Path(repository.directory.root), B, A)
    with pytest.raises(XenAPIError, match=B):
        await repository.destroy_image(A, HOLDER)
    with pytest.raises(XenAPIError, match="OPERATION_NOT_ALLOWED"):
        await repository.lease(A, LeaseMode.REPLACE, HOLDER)


async def test_one_unreadable_file_or_journal_keeps_everything_from_being_destroyed(
    repository: Repository,
) -> None:
    root = Path(repository.directory.root)
    await repository.create_image(A, 4 * MIB, "vhd")
    for name in (f"{B}.vhd", f"clone_{B}"):
        (root / name).write_text("broken")
        with pytest.raises(XenAPIError, match=name):
            await repository.destroy_image(A, HOLDER)
        (root / name).unlink()
    create_dynamic(str(root / f"{B}.vhd"), 4 * MIB)
    make_child(root, "00000003-0000-4000-8000-000000000000", B)
    (root / f"{B}.vhd").unlink()
    with pytest.raises(XenAPIError, match=f"{B}.vhd is missing"):
        await repository.destroy_image(A, HOLDER)
    assert (root / f"{A}.vhd").exists()


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_a_commit_replaces_the_image_while_readers_keep_the_old_one(
    repository: Repository, image_format: ImageFormat
) -> None:
    image = await repository.create_image(A, 5 * MIB, image_format)
    await replace(repository, A, b"first" * 1000)
    reading = await repository.lease(A, LeaseMode.READ, HOLDER)
    old = await trio.to_thread.run_sync(reading.open_disk)
    await replace(repository, A, b"second" * 1000)
    buffer = bytearray(5)
    old.pread_into(buffer, 0)
    assert buffer == b"first"
    old.close()
    reading.release()
    assert read(image.path, 6) == b"second"
    assert staged(repository) == []
    assert repository.images[A].virtual_size == 5 * MIB


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_a_partial_replacement_begins_as_a_copy(
    repository: Repository, image_format: ImageFormat
) -> None:
    image = await repository.create_image(A, 6 * MIB, image_format)
    await replace(repository, A, b"\x11" * (3 * MIB))
    await replace(repository, A, b"\x22" * 1024, whole=False)
    assert read(image.path, 2048) == b"\x22" * 1024 + b"\x11" * 1024
    assert read(image.path, 1024, 3 * MIB - 512) == b"\x11" * 512 + bytes(512)


async def test_a_partial_replacement_keeps_the_parent_and_a_whole_one_drops_it(
    repository: Repository,
) -> None:
    root = Path(repository.directory.root)
    await repository.create_image(A, 6 * MIB, "vhd")
    await replace(repository, A, b"\x11" * (2 * MIB))
    make_child(root, B, A)
    await repository.scan()
    await replace(repository, B, b"\x22" * 512, whole=False)
    assert repository.images[B].parent == A
    assert read(str(root / f"{B}.vhd"), 1024) == b"\x22" * 512 + b"\x11" * 512
    await replace(repository, B, b"\x33" * 512)
    assert repository.images[B].parent is None
    assert read(str(root / f"{B}.vhd"), 1024) == b"\x33" * 512 + bytes(512)


async def test_without_a_commit_the_old_image_stays_and_the_staging_file_goes(repository: Repository) -> None:
    image = await repository.create_image(A, 4 * MIB, "vhd")
    before = listing(repository.directory.root)[os.path.basename(image.path)]
    lease = await repository.lease(A, LeaseMode.REPLACE, HOLDER)
    with trio.CancelScope() as scope:
        async with repository.staging(lease, whole=True) as staging:
            staging.disk.pwrite(b"x" * 512, 0)
            assert len(staged(repository)) == 1
            scope.cancel()
            await staging.commit()
    lease.release()
    assert scope.cancelled_caught
    assert staged(repository) == []
    assert listing(repository.directory.root)[os.path.basename(image.path)] == before


async def test_a_cancellation_after_the_rename_began_comes_too_late(tmp_path: Path, leases: Leases) -> None:
    class Cancelling(FileCalls):
        def rename(self, source: str, target: str) -> None:
            super().rename(source, target)
            if target.endswith(".vhd") and armed:
                trio.from_thread.run_sync(scope.cancel)

    armed: list[bool] = []
    repository = await Repository.create(str(tmp_path / "sr"), SR_UUID, leases, who="me", files=Cancelling())
    image = await repository.create_image(A, 4 * MIB, "vhd")
    armed.append(True)
    with trio.CancelScope() as scope:
        await replace(repository, A, b"new")
    assert read(image.path, 3) == b"new"
    assert leases.holders_for(HOLDER.vdi) == ()
    await repository.detach()


async def test_a_foreign_replacement_under_the_lease_is_not_renamed_over(repository: Repository) -> None:
    image = await repository.create_image(A, 4 * MIB, "vhd")
    create_dynamic(f"{image.path}.foreign", 4 * MIB)
    lease = await repository.lease(A, LeaseMode.REPLACE, HOLDER)
    async with repository.staging(lease, whole=True) as staging:
        os.rename(f"{image.path}.foreign", image.path)
        foreign = os.stat(image.path).st_ino
        with pytest.raises(XenAPIError, match="replaced from outside"):
            await staging.commit()
    lease.release()
    assert os.stat(image.path).st_ino == foreign
    assert staged(repository) == []


async def test_what_comes_into_the_sr_meanwhile_under_a_new_images_uuid_stays(repository: Repository) -> None:
    image = repository.directory.image(A, "vhd")
    async with repository.staging_new(A, 4 * MIB, "vhd") as staging:
        create_dynamic(image, 2 * MIB)
        foreign = os.stat(image).st_ino
        with pytest.raises(FileExistsError):
            await staging.commit()
    assert os.stat(image).st_ino == foreign
    assert staged(repository) == []


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_a_new_image_that_cannot_be_begun_leaves_nothing(
    tmp_path: Path, leases: Leases, image_format: ImageFormat
) -> None:
    files = FailingOnce()
    repository = await Repository.create(str(tmp_path / "sr"), SR_UUID, leases, who="me", files=files)
    for number in itertools.count():
        files.left = number
        try:
            async with repository.staging_new(A, 4 * MIB, image_format):
                files.left, begun = float("inf"), True
        except OSError:
            begun = False
        assert staged(repository) == [], number
        if begun:
            break
    assert number >= 2
    await repository.detach()


async def test_a_full_file_system_is_enospc_and_leaves_the_old_image(tmp_path: Path, leases: Leases) -> None:
    class Full(FileCalls):
        def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().pwrite(fd, data, offset)

    full: list[bool] = []
    repository = await Repository.create(str(tmp_path / "sr"), SR_UUID, leases, who="me", files=Full())
    image = await repository.create_image(A, 4 * MIB, "vhd")
    await replace(repository, A, b"old")
    full.append(True)
    for work in (replace(repository, A, b"new"), repository.create_image(B, 4 * MIB, "vhd")):
        with pytest.raises(OSError, match="No space") as failure:
            await work
        assert failure.value.errno == errno.ENOSPC
    assert read(image.path, 3) == b"old"
    assert staged(repository) == []
    await repository.detach()


async def test_attaching_sweeps_only_staging_files_that_nobody_has_locked(
    repository: Repository, leases: Leases
) -> None:
    await repository.create_image(A, 4 * MIB, "vhd")
    lease = await repository.lease(A, LeaseMode.REPLACE, HOLDER)
    async with repository.staging(lease, whole=True):
        in_use = set(staged(repository))
        (Path(repository.directory.staging) / "left over").touch()
        root = repository.directory.root
        await repository.detach()
        again = await Repository.attach(root, leases, writable=True, who="me")
        assert again.swept == ("left over",)
        assert set(staged(again)) == in_use
        await again.detach()
    lease.release()
