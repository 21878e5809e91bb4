"""The handlers of names and attributes, called as pyfuse3 calls them.

What goes through the kernel is in test_mount_*.py.
"""

import errno
import os
import stat
from dataclasses import replace

import pyfuse3
import pytest

from fuse_mount.attributes import READ_SIZE, TIMEOUT_SECONDS
from fuse_mount.catalogue import Changes
from fuse_mount.operations import VdiOperations
from fuse_mount.tree import ROOT_INODE
from gateway.access.client import AccessRefused
from gateway.access.protocol import Refused
from tests.fuse_mount.operations_house import CONTEXT, DESCRIPTION, DISK, MIB, House, code_of

pytestmark = pytest.mark.usefixtures("quiet")


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


@pytest.mark.parametrize("described", [True, False])
async def test_no_disk_is_without_blocks_though_nothing_is_known_to_be_stored(described: bool) -> None:
    house = House(shown=replace(DISK, stored=0))
    house.fake.description = replace(DESCRIPTION, stored_bytes=0) if described else None
    assert (await house.at("disks/web/disk.raw")).st_blocks == 1


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
