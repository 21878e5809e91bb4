"""The handlers, called as pyfuse3 calls them; what goes through the kernel is in test_mount_*.py."""

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pyfuse3
import pytest
import structlog
import trio
from pyfuse3 import EntryAttributes, FUSEError, SetattrFields

from fuse_mount.attributes import READ_SIZE, TIMEOUT_SECONDS, Access
from fuse_mount.catalogue import Catalogue, Changes, Sr, Vdi
from fuse_mount.descriptions import Description
from fuse_mount.disks import Part, Window
from fuse_mount.operations import VdiOperations
from fuse_mount.partitions import Partition
from fuse_mount.tree import ROOT_INODE, Tree
from gateway.access.client import AccessRefused
from gateway.access.protocol import Refused
from gateway.images.errors import CorruptImage

MIB = 1 << 20
SR = Sr("sr", "5500dddd-0000-4000-8000-000000000000", "disks")
DISK = Vdi("disk", "aaaaaaaa-0000-4000-8000-000000000000", "web", "sr", 8 * MIB, 4 * MIB)
ALL = Changes({"disk": DISK}, {"sr": SR}, frozenset({"sr"}), whole=True)
DESCRIPTION = Description("content", 8 * MIB, 2 * MIB, 3 * MIB, 5 * MIB)
CONTEXT: Any = None


class FakeFile:
    def __init__(self) -> None:
        self.size = 8 * MIB
        self.calls: list[Any] = []
        self.failure: Exception | None = None

    def _do(self, *call: Any) -> None:
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure

    async def read(self, offset: int, length: int) -> bytes:
        self._do("read", offset, length)
        return b"x" * length

    async def write(self, offset: int, data: bytes) -> int:
        self._do("write", offset, data)
        return len(data)

    async def flush(self) -> None:
        self._do("flush")

    async def close(self) -> None:
        self._do("close")


class FakeHouse:
    """Disks, descriptions and partitions in one."""

    def __init__(self) -> None:
        self.file = FakeFile()
        self.opened: list[Any] = []
        self.failure: Exception | None = None
        self.description: Description | None = None
        self.last: Description | None = None
        self.partitions: tuple[Partition, ...] = (Partition(1, MIB, 2 * MIB, "83", "", ""),)
        self.held: dict[str, str] = {}

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def open(self, vdi: str, part: Part | Window, *, write: bool) -> FakeFile:
        self._fail()
        self.opened.append((vdi, part, write))
        return self.file

    async def of(self, vdi: str) -> tuple[Partition, ...]:
        self._fail()
        return self.partitions

    async def describe(self, vdi: str) -> Description:
        self._fail()
        self.description = DESCRIPTION
        return DESCRIPTION

    def known(self, vdi: str) -> Description | None:
        return self.description

    def last_known(self, vdi: str) -> Description | None:
        return self.description or self.last


class House:
    def __init__(self, *, writable: bool = False, others: bool = False) -> None:
        self.fake = FakeHouse()
        self.tree = Tree(Catalogue())
        self.tree.apply(ALL)
        access = Access(writable, others, 1234, 5678)
        fake: Any = self.fake
        self.operations = VdiOperations(self.tree, fake, fake, fake, access)

    async def inode(self, path: str) -> int:
        return (await self.at(path)).st_ino

    async def at(self, path: str) -> EntryAttributes:
        inode = ROOT_INODE
        for name in path.split("/"):
            found = await self.operations.lookup(inode, name.encode(), CONTEXT)
            inode = found.st_ino
        return found

    async def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        return (await self.operations.open(await self.inode(path), flags, CONTEXT)).fh


async def code_of(answer: Awaitable[Any]) -> int:
    with pytest.raises(FUSEError) as caught:
        await answer
    return caught.value.errno


@pytest.fixture
async def house() -> House:
    return House()


@pytest.fixture
async def writable() -> House:
    return House(writable=True)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


async def test_each_file_has_the_size_and_the_blocks_that_are_known(house: House) -> None:
    sizes = {}
    for name in ("disk.raw", "disk.vhd", "disk.qcow2", "record.json", "partitions/1.raw"):
        told = await house.at(f"disks/web/{name}")
        sizes[name] = (told.st_size, told.st_blocks * 512)
        assert (stat.S_ISREG(told.st_mode), told.st_nlink, told.st_uid, told.st_gid) == (True, 1, 1234, 5678)
    document = len(DISK.document())
    assert sizes == {
        "disk.raw": (8 * MIB, 4 * MIB),
        "disk.vhd": (3 * MIB, 3 * MIB),
        "disk.qcow2": (5 * MIB, 5 * MIB),
        "record.json": (document, -(-document // 512) * 512),
        "partitions/1.raw": (2 * MIB, 2 * MIB),
    }
    assert (await house.at("disks/web/disk.raw")).st_blocks * 512 == 2 * MIB  # it was described meanwhile


@pytest.mark.parametrize(
    ("writable", "others", "modes"),
    [
        (False, False, (0o500, 0o400, 0o400)),
        (True, False, (0o500, 0o600, 0o400)),
        (False, True, (0o555, 0o444, 0o444)),
        (True, True, (0o555, 0o644, 0o444)),
    ],
)
async def test_the_modes_say_who_may_what(writable: bool, others: bool, modes: tuple[int, ...]) -> None:
    house = House(writable=writable, others=others)
    for path, mode in [
        *((path, modes[0]) for path in ("by-uuid", "disks", "disks/web", "disks/web/partitions")),
        *((path, modes[1]) for path in ("disks/web/disk.raw", "disks/web/partitions/1.raw")),
        *((f"disks/web/{name}", modes[2]) for name in ("disk.vhd", "disk.qcow2", "record.json")),
    ]:
        assert stat.S_IMODE((await house.at(path)).st_mode) == mode, path


async def test_a_size_that_the_gateway_does_not_tell_is_not_believed_for_a_moment(house: House) -> None:
    house.fake.failure = ConnectionRefusedError(errno.ECONNREFUSED, "no gateway")
    told = await house.at("disks/web/disk.vhd")
    assert (told.st_size, told.entry_timeout, told.attr_timeout) == (0, 0, 0)
    told = await house.at("disks/web/disk.raw")
    assert (told.st_size, told.entry_timeout) == (8 * MIB, TIMEOUT_SECONDS)


async def test_while_the_gateway_is_away_a_file_has_the_size_that_was_known_last(house: House) -> None:
    house.fake.failure = ConnectionRefusedError(errno.ECONNREFUSED, "no gateway")
    house.fake.last = DESCRIPTION
    told = await house.at("disks/web/disk.qcow2")
    assert (told.st_size, told.attr_timeout) == (5 * MIB, 0)


async def test_only_a_look_into_partitions_asks_for_a_lease(house: House) -> None:
    house.fake.failure = AccessRefused(Refused("VDI_IN_USE", ("disk",), "in use"))
    for path in ("disks/web", "disks/web/disk.raw", "disks/web/disk.qcow2", "disks/web/partitions"):
        await house.at(path)
    inode = await house.inode("disks/web/partitions")
    assert await code_of(house.operations.opendir(inode, CONTEXT)) == errno.EBUSY
    assert await code_of(house.operations.lookup(inode, b"1.raw", CONTEXT)) == errno.EBUSY


@pytest.mark.parametrize(
    "name", [b"2.raw", b"01.raw", b"0.raw", b"1", b"raw", b".raw", b"-1.raw", b"1.raw.raw"]
)
async def test_a_partition_that_is_not_there_is_not_found(house: House, name: bytes) -> None:
    inode = await house.inode("disks/web/partitions")
    assert await code_of(house.operations.lookup(inode, name, CONTEXT)) == errno.ENOENT


async def test_names_that_are_not_there_and_inodes_of_nothing_are_not_found(house: House) -> None:
    assert await code_of(house.operations.lookup(ROOT_INODE, b"nothing", CONTEXT)) == errno.ENOENT
    for inode in (7, 1 << 40, (1 << 63) + 1):
        assert await code_of(house.operations.getattr(inode, CONTEXT)) == errno.ESTALE
        assert await code_of(house.operations.open(inode, os.O_RDONLY, CONTEXT)) == errno.ESTALE


async def test_lookups_are_counted_and_forgotten(house: House) -> None:
    inode = await house.inode("disks/web/disk.raw")
    directory, sr = await house.inode("disks/web"), await house.inode("disks")
    assert house.tree.lookups == 3 + 2 + 1
    await house.operations.forget([(inode, 1), (directory, 2), (sr, 3), (ROOT_INODE, 99)])
    assert house.tree.lookups == 0


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
    assert house.fake.file.calls == [("read", 5, 3), ("close",)]
    assert await code_of(house.operations.read(info.fh, 0, 1)) == errno.EIO


async def test_a_disk_that_is_written_to_is_flushed_when_it_is_synced_and_closed(writable: House) -> None:
    handle = await writable.open("disks/web/disk.raw", os.O_RDWR)
    assert writable.fake.opened == [(DISK.uuid, Part.RAW, True)]
    assert await writable.operations.write(handle, 512, b"abc") == 3
    await writable.operations.fsync(handle, datasync=False)
    await writable.operations.flush(handle)
    await writable.operations.release(handle)
    assert writable.fake.file.calls == [("write", 512, b"abc"), ("flush",), ("flush",), ("close",)]


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


async def test_a_disk_that_has_gone_is_not_opened_and_what_was_open_goes_on(house: House) -> None:
    inode = await house.inode("disks/web/disk.raw")
    directory = await house.inode("disks/web")
    handle = await house.open("disks/web/disk.raw")
    house.tree.apply(Changes({"disk": None}, {}, frozenset({"sr"})))
    for call in (
        house.operations.open(inode, os.O_RDONLY, CONTEXT),
        house.operations.opendir(directory, CONTEXT),
        house.operations.lookup(directory, b"disk.raw", CONTEXT),
    ):
        assert await code_of(call) == errno.ESTALE
    assert await house.operations.read(handle, 0, 2) == b"xx"
    told = await house.operations.getattr(inode, CONTEXT)
    assert (told.st_nlink, told.st_size) == (0, 8 * MIB)


async def test_a_partition_that_another_table_does_not_have_is_not_opened(house: House) -> None:
    inode = await house.inode("disks/web/partitions/1.raw")
    house.fake.partitions = ()
    assert await code_of(house.operations.open(inode, os.O_RDONLY, CONTEXT)) == errno.ENOENT
    assert await code_of(house.operations.getattr(inode, CONTEXT)) == errno.ENOENT


async def test_programs_are_advised_to_read_large_pieces_of_disks(house: House) -> None:
    assert (await house.at("disks/web/disk.raw")).st_blksize == READ_SIZE
    assert (await house.at("disks/web/record.json")).st_blksize == 4096


async def test_the_link_is_read_and_nothing_else(house: House) -> None:
    link = await house.at(f"by-uuid/{DISK.uuid}")
    target = await house.operations.readlink(link.st_ino, CONTEXT)
    assert (target, link.st_size, stat.S_ISLNK(link.st_mode)) == (b"../disks/web", 12, True)
    assert await code_of(house.operations.readlink(ROOT_INODE, CONTEXT)) == errno.EINVAL


async def test_the_file_system_has_no_size(house: House) -> None:
    told = await house.operations.statfs(CONTEXT)
    assert (told.f_blocks, told.f_bavail, told.f_namemax) == (0, 0, 255)


def test_pyfuse3_has_no_handler_that_is_not_thought_of() -> None:
    """What isn't overridden answers ENOSYS, after which the kernel does without for ever."""
    handlers = {name for name in vars(pyfuse3.Operations) if not name.startswith("_")}
    # The kernel has its own of these: extended attributes there are none, poll says always, access by mode.
    left = {"getxattr", "listxattr", "removexattr", "setxattr", "poll", "access", "fsyncdir"}
    attributes = {"supports_dot_lookup", "enable_writeback_cache", "enable_acl", "stacktrace"}
    assert handlers - set(vars(VdiOperations)) == left | attributes
