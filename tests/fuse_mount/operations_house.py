"""The handlers over a tree with one disk, whose files, descriptions and partitions are a test's."""

import os
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import pytest
from pyfuse3 import EntryAttributes, FUSEError

from fuse_mount.attributes import Access
from fuse_mount.catalogue import Catalogue, Changes, Sr, Vdi
from fuse_mount.descriptions import Description
from fuse_mount.disks import Part, Window
from fuse_mount.operations import VdiOperations
from fuse_mount.partitions import Partition
from fuse_mount.tree import ROOT_INODE, Tree

MIB = 1 << 20
SR = Sr("sr", "5500dddd-0000-4000-8000-000000000000", "disks")
DISK = Vdi("disk", "aaaaaaaa-0000-4000-8000-000000000000", "web", "sr", 8 * MIB, 4 * MIB)
ALL = Changes({"disk": DISK}, {"sr": SR}, frozenset({"sr"}), whole=True)
DESCRIPTION = Description("content", 8 * MIB, 2 * MIB, 3 * MIB, 5 * MIB)
CONTEXT: Any = None


class FakeFile:
    def __init__(self) -> None:
        self.size = 8 * MIB
        self.content = object()
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
        self.next_file: FakeFile | None = None
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
        if self.next_file is not None:
            self.file, self.next_file = self.next_file, None
        return self.file

    async def of(self, vdi: str) -> tuple[Partition, ...]:
        self._fail()
        return self.partitions

    async def describe(self, vdi: str) -> Description:
        self._fail()
        self.description = DESCRIPTION
        return DESCRIPTION

    def forget(self, vdi: str) -> None:
        self.description = None

    def known(self, vdi: str) -> Description | None:
        return self.description

    def last_known(self, vdi: str) -> Description | None:
        return self.description or self.last


class House:
    def __init__(self, *, writable: bool = False, others: bool = False, shown: Vdi = DISK) -> None:
        self.fake = FakeHouse()
        self.tree = Tree(Catalogue())
        self.tree.apply(replace(ALL, vdis={"disk": shown}))
        access = Access(writable, others, 1234, 5678)
        fake: Any = self.fake
        self.asked_again: list[int] = []
        self.operations = VdiOperations(
            self.tree, fake, fake, fake, access, ask_again=self.asked_again.append
        )

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
