"""Who opens a file gets the disk of now, whatever the mount has heard of it: a feed may be late."""

import os
from pathlib import Path
from typing import Any

from fuse_mount.attributes import Access
from fuse_mount.catalogue import Catalogue, Changes, Sr
from fuse_mount.catalogue import Vdi as Shown
from fuse_mount.descriptions import Descriptions
from fuse_mount.disks import Part
from fuse_mount.operations import VdiOperations
from fuse_mount.partitions import Partitions
from fuse_mount.tree import ROOT_INODE, Tree
from tests.fuse_mount.partition_tables import made
from tests.fuse_mount.served_site import control_socket, disks_of, write
from tests.system.site import MIB, Site, Vdi

CONTEXT: Any = None


class Deaf:
    """The mount of a gateway that tells it of no change."""

    def __init__(self, site: Site, vdi: Vdi) -> None:
        self.disks = disks_of(site)
        self.asked_again: list[int] = []
        tree = Tree(Catalogue())
        shown = Shown("disk", vdi.uuid, "web", "sr", vdi.size, 0)
        tree.apply(
            Changes({"disk": shown}, {"sr": Sr("sr", "s" * 36, "disks")}, frozenset({"sr"}), whole=True)
        )
        descriptions = Descriptions(control_socket(site), lambda: None)
        partitions = Partitions(
            lambda uuid: self.disks.open(uuid, Part.RAW, write=False), descriptions, self.disks.held
        )
        self.operations = VdiOperations(
            tree, self.disks, descriptions, partitions, Access(), ask_again=self.asked_again.append
        )

    async def inode(self, path: str) -> int:
        inode = ROOT_INODE
        for name in path.split("/"):
            inode = (await self.operations.lookup(inode, name.encode(), CONTEXT)).st_ino
        return inode

    async def size_and_begin(self, inode: int) -> tuple[int, bytes]:
        """The size that an open file is told to have, and its first bytes."""
        self.asked_again.clear()
        handle = (await self.operations.open(inode, os.O_RDONLY, CONTEXT)).fh
        try:
            assert self.asked_again == [inode]
            told = await self.operations.getattr(inode, CONTEXT)
            return told.st_size, bytes(await self.operations.read(handle, 0, 4))
        finally:
            await self.operations.release(handle)


def disk(path: Path, size: int, start: int, sectors: int, content: bytes) -> bytes:
    data = bytearray(made(path, size, f"label: dos\n{start},{sectors}\n").read_bytes())
    data[start * 512 : start * 512 + len(content)] = content
    return bytes(data)


async def test_a_partition_lies_where_the_table_of_now_says(site: Site, tmp_path: Path) -> None:
    vdi = site.create_vdi(8 * MIB)
    write(site, vdi, 0, disk(tmp_path / "first", vdi.size, 2048, 2048, b"old!"))
    mount = Deaf(site, vdi)
    inode = await mount.inode("disks/web/partitions/1.raw")
    assert await mount.size_and_begin(inode) == (MIB, b"old!")
    write(site, vdi, 0, disk(tmp_path / "second", vdi.size, 8192, 4096, b"new!"))
    assert await mount.size_and_begin(inode) == (2 * MIB, b"new!")
    await mount.disks.close()
    site.gateway.call("VDI.destroy", vdi.ref)


async def test_an_open_file_has_the_size_of_what_was_opened(site: Site) -> None:
    vdi = site.create_vdi(8 * MIB)
    mount = Deaf(site, vdi)
    raw, vhd = [await mount.inode(f"disks/web/{name}") for name in ("disk.raw", "disk.vhd")]
    empty, _ = await mount.size_and_begin(vhd)
    assert await mount.size_and_begin(raw) == (8 * MIB, bytes(4))
    write(site, vdi, 0, os.urandom(4 * MIB))
    size, _ = await mount.size_and_begin(vhd)
    assert size > empty + 4 * MIB
    site.gateway.call("VDI.resize", vdi.ref, str(16 * MIB))
    assert (await mount.size_and_begin(raw))[0] == 16 * MIB
    await mount.disks.close()
    site.gateway.call("VDI.destroy", vdi.ref)
