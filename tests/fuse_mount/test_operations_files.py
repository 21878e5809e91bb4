"""The handlers of open files, called as pyfuse3 calls them: what is read, written and refused."""

import errno
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import trio
from pyfuse3 import EntryAttributes, SetattrFields

from fuse_mount.catalogue import Changes
from fuse_mount.disks import Part, Window
from gateway.access.client import AccessRefused
from gateway.access.protocol import Refused
from gateway.images.errors import CorruptImage
from tests.fuse_mount.operations_house import CONTEXT, DISK, MIB, FakeFile, House, code_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.usefixtures("quiet")


async def test_the_record_is_read_as_it_was_when_it_was_opened(house: House) -> None:
    handle = await house.open("disks/web/record.json")
    house.tree.apply(Changes({"disk": replace(DISK, record=b'{"new": 1}')}, {}, frozenset({"sr"})))
    content = DISK.document()
    assert bytes(await house.operations.read(handle, 0, 1 << 20)) == content
    assert bytes(await house.operations.read(handle, 3, 5)) == content[3:8]
    assert bytes(await house.operations.read(handle, len(content), 5)) == b""
    again = await house.open("disks/web/record.json")
    assert b'"new": 1' in bytes(await house.operations.read(again, 0, 1 << 20))


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("disk.raw", Part.RAW),
        ("disk.vhd", Part.VHD),
        ("disk.qcow2", Part.QCOW2),
        ("partitions/1.raw", Window(MIB, 2 * MIB)),
    ],
)
async def test_a_file_of_a_disk_is_opened_read_and_closed(
    house: House, path: str, part: Part | Window
) -> None:
    info = await house.operations.open(await house.inode(f"disks/web/{path}"), os.O_RDONLY, CONTEXT)
    assert (info.direct_io, info.keep_cache) == (True, False)
    assert house.fake.opened == [(DISK.uuid, part, False)]
    assert await house.operations.read(info.fh, 5, 3) == b"xxx"
    await house.operations.flush(info.fh)
    await house.operations.fsync(info.fh, datasync=True)
    await house.operations.release(info.fh)
    assert house.fake.file.calls == [("read", 5, 3), ("flush",), ("close",)]
    assert await code_of(house.operations.read(info.fh, 0, 1)) == errno.EIO


async def test_a_disk_that_is_written_to_is_flushed_when_it_is_synced_and_closed(writable: House) -> None:
    handle = await writable.open("disks/web/disk.raw", os.O_RDWR)
    assert writable.fake.opened == [(DISK.uuid, Part.RAW, True)]
    assert await writable.operations.write(handle, 512, b"abc") == 3
    await writable.operations.fsync(handle, datasync=False)
    await writable.operations.flush(handle)
    await writable.operations.release(handle)
    assert writable.fake.file.calls == [("write", 512, b"abc"), ("flush",), ("flush",), ("close",)]


async def test_while_files_are_open_on_what_a_disk_was_those_of_what_it_is_have_another_inode(
    house: House,
) -> None:
    names = ("disk.raw", "disk.vhd", "disk.qcow2", "partitions/1.raw")
    others = [await house.inode(f"disks/web{name}") for name in ("", "/record.json", "/partitions")]
    before = [await house.inode(f"disks/web/{name}") for name in names]
    old = await house.open("disks/web/disk.raw")
    again = await house.open("disks/web/disk.vhd")
    record = await house.open("disks/web/record.json")
    was = house.fake.file
    house.fake.next_file = FakeFile()
    assert await code_of(house.operations.open(before[3], os.O_RDONLY, CONTEXT)) == errno.ESTALE
    assert house.fake.file.calls == [("close",)]
    after = [await house.inode(f"disks/web/{name}") for name in names]
    assert set(before).isdisjoint(after)
    for inode in before:  # by a name that the kernel still believes in, before it asks again
        assert await code_of(house.operations.open(inode, os.O_RDONLY, CONTEXT)) == errno.ESTALE
        assert (await house.operations.getattr(inode, CONTEXT)).st_ino == inode
    for inode in after:
        await house.operations.open(inode, os.O_RDONLY, CONTEXT)
    await house.operations.read(old, 0, 4096)
    for handle in (old, again, record):
        await house.operations.release(handle)
    assert was.calls == [("read", 0, 4096), ("close",), ("close",)]
    assert [await house.inode(f"disks/web/{name}") for name in names] == after
    assert [await house.inode(f"disks/web{name}") for name in ("", "/record.json", "/partitions")] == others


async def test_an_inode_stays_when_nobody_has_the_old_content_open_any_more(house: House) -> None:
    inode = await house.inode("disks/web/disk.raw")
    for _ in range(3):
        house.fake.next_file = FakeFile()
        handle = await house.open("disks/web/disk.raw")
        await house.operations.release(handle)
    assert await house.inode("disks/web/disk.raw") == inode


@pytest.mark.parametrize("flags", [os.O_DSYNC, os.O_SYNC])
async def test_a_write_by_who_wants_it_durable_is_flushed_before_it_is_answered(
    writable: House, flags: int
) -> None:
    handle = await writable.open("disks/web/disk.raw", os.O_WRONLY | flags)
    assert await writable.operations.write(handle, 512, b"abc") == 3
    assert writable.fake.file.calls == [("write", 512, b"abc"), ("flush",)]
    reader = await writable.open("disks/web/record.json", os.O_RDONLY | flags)
    await writable.operations.release(reader)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
async def test_what_can_not_be_written_to_is_not_opened_for_it(
    house: House, writable: House, flags: int
) -> None:
    for name in ("disk.raw", "disk.vhd", "record.json", "partitions/1.raw"):
        assert await code_of(house.open(f"disks/web/{name}", flags)) == errno.EROFS
    for name in ("disk.vhd", "disk.qcow2", "record.json"):
        assert await code_of(writable.open(f"disks/web/{name}", flags)) == errno.EPERM
    assert writable.fake.opened == []


def fields(**names: bool) -> SetattrFields:
    class Fields:
        update_atime = update_mtime = update_ctime = False
        update_mode = update_uid = update_gid = update_size = False

    told = Fields()
    for name, value in names.items():
        setattr(told, name, value)
    return told  # type: ignore[return-value]  # pyfuse3's own can't be filled from outside


async def test_a_disk_keeps_its_size_as_a_block_device_does(writable: House) -> None:
    inode = await writable.inode("disks/web/disk.raw")
    wanted = EntryAttributes()
    wanted.st_size = 1
    changed = await writable.operations.setattr(
        inode, wanted, fields(update_size=True, update_mtime=True), None, CONTEXT
    )
    assert changed.st_size == 8 * MIB


async def test_owner_and_mode_can_not_be_changed_but_to_what_they_are(writable: House, house: House) -> None:
    inode = await writable.inode("disks/web/disk.raw")
    wanted = EntryAttributes()
    wanted.st_mode, wanted.st_uid, wanted.st_gid = stat.S_IFREG | 0o600, 1234, 5678
    same = fields(update_mode=True, update_uid=True, update_gid=True)
    await writable.operations.setattr(inode, wanted, same, None, CONTEXT)
    for change in ({"st_mode": stat.S_IFREG | 0o644}, {"st_uid": 0}, {"st_gid": 0}):
        other = EntryAttributes()
        other.st_mode, other.st_uid, other.st_gid = wanted.st_mode, wanted.st_uid, wanted.st_gid
        for name, value in change.items():
            setattr(other, name, value)
        assert await code_of(writable.operations.setattr(inode, other, same, None, CONTEXT)) == errno.EPERM
    record = await writable.inode("disks/web/record.json")
    assert await code_of(writable.operations.setattr(record, wanted, same, None, CONTEXT)) == errno.EPERM
    inode = await house.inode("disks/web/disk.raw")
    assert await code_of(house.operations.setattr(inode, wanted, same, None, CONTEXT)) == errno.EROFS


async def test_nothing_is_made_removed_or_renamed(writable: House) -> None:
    operations: Any = writable.operations
    for call in (
        operations.create(1, b"x", 0o600, 0, CONTEXT),
        operations.mknod(1, b"x", 0o600, 0, CONTEXT),
        operations.mkdir(1, b"x", 0o700, CONTEXT),
        operations.unlink(1, b"disks", CONTEXT),
        operations.rmdir(1, b"disks", CONTEXT),
        operations.symlink(1, b"x", b"y", CONTEXT),
        operations.rename(1, b"disks", 1, b"x", 0, CONTEXT),
        operations.link(1, 1, b"x", CONTEXT),
    ):
        assert await code_of(call) == errno.EPERM


FAILURES = [
    (OSError(errno.EIO, "bad sector"), errno.EIO),
    (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
    (OSError(errno.ENOSYS, "would never be asked again"), errno.EIO),
    (OSError(100_000, "no number that the kernel takes"), errno.EIO),
    (OSError(-5, "nor this one"), errno.EIO),
    (OSError("without a number"), errno.EIO),
    (CorruptImage("a.vhd", "its BAT is broken"), errno.EIO),
    (AccessRefused(Refused("VDI_IN_USE", (), "in use")), errno.EBUSY),
    (AccessRefused(Refused("UUID_INVALID", (), "no such VDI")), errno.ENOENT),
    (ValueError("a mistake of ours"), errno.EINVAL),
    (KeyError("another one"), errno.EIO),
    (AssertionError(), errno.EIO),
    (ExceptionGroup("several", [ValueError()]), errno.EIO),
    (RecursionError(), errno.EIO),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), errno.EINVAL),
    (trio.BusyResourceError("a mistake of ours"), errno.EIO),
]


@pytest.mark.parametrize(("failure", "code"), FAILURES, ids=lambda value: repr(value)[:40])
async def test_every_failure_is_an_errno_that_the_kernel_takes(
    writable: House, failure: Exception, code: int
) -> None:
    handle = await writable.open("disks/web/disk.raw", os.O_RDWR)
    inode = await writable.inode("disks/web/disk.raw")
    writable.fake.failure = writable.fake.file.failure = failure
    operations = writable.operations
    handlers: list[Callable[[], Awaitable[Any]]] = [
        lambda: operations.read(handle, 0, 1),
        lambda: operations.write(handle, 0, b"x"),
        lambda: operations.flush(handle),
        lambda: operations.fsync(handle, datasync=False),
        lambda: operations.open(inode, os.O_RDONLY, CONTEXT),
        lambda: operations.release(handle),
    ]
    for handler in handlers:
        assert await code_of(handler()) == code


async def test_a_failure_is_told_in_the_log_with_its_disk_and_not_again_and_again(house: House) -> None:
    handle = await house.open("disks/web/disk.raw")
    house.fake.file.failure = CorruptImage("a.vhd", "its BAT is broken")
    with structlog.testing.capture_logs() as lines:
        for _ in range(50):
            assert await code_of(house.operations.read(handle, 0, 4096)) == errno.EIO
    assert [(line["log_level"], line["vdi"], line["errno"], line["why"]) for line in lines] == [
        ("warning", DISK.uuid, "EIO", "a.vhd: its BAT is broken")
    ]
    house.fake.file.failure = ZeroDivisionError("a mistake of ours")
    with structlog.testing.capture_logs() as lines:
        await code_of(house.operations.read(handle, 0, 4096))
    assert [(line["log_level"], type(line["exc_info"])) for line in lines] == [("error", ZeroDivisionError)]
    house.fake.file.failure = OSError(errno.EIO, "a bad sector")
    with structlog.testing.capture_logs() as lines:
        await code_of(house.operations.release(handle))
    assert [(line["request"], line["vdi"]) for line in lines] == [("release", DISK.uuid)]


async def test_the_log_names_the_disk_that_could_not_be_opened_and_none_where_none_is_meant(
    house: House,
) -> None:
    inode = await house.inode("disks/web/disk.raw")
    house.fake.failure = OSError(errno.EIO, "a bad sector")
    requests = (
        house.operations.open(inode, os.O_RDONLY, CONTEXT),
        house.operations.readdir(99, 0, CONTEXT),
        house.operations.releasedir(99),
    )
    with structlog.testing.capture_logs() as lines:
        assert [await code_of(request) for request in requests] == [errno.EIO] * 3
    assert [(line["request"], line["vdi"]) for line in lines] == [
        ("open", DISK.uuid),
        ("readdir", None),
        ("releasedir", None),
    ]


async def test_a_disk_of_another_size_is_opened_although_nobody_says_how_large_it_is(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_vdi: str) -> None:
        raise OSError(errno.EHOSTDOWN, "the gateway is away")

    inode = await house.inode("disks/web/disk.raw")
    house.fake.file.size = 9 * MIB
    monkeypatch.setattr(house.fake, "describe", refuse)
    handle = (await house.operations.open(inode, os.O_RDONLY, CONTEXT)).fh
    assert await house.operations.read(handle, 0, 1) == b"x"
    assert house.asked_again == [inode]
