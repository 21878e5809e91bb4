"""VDIs in SRs of a test's own: made, imported to, written to, and read back beside libvhdi.

The trap: libvhdi reads no parent beyond its end, so of chains that have grown our own reader's word is taken.
"""

from itertools import pairwise
from pathlib import Path
from typing import Final

import pyvhdi
import trio

from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI
from gateway.images.chain import open_chain_files
from gateway.images.vhd.check import check_vhd
from gateway.repository.inventory import Inventory
from tests.images.disks import inspect, libvhdi_reads
from tests.repository.test_repository import read

MIB = 1 << 20
# Whole bytes of the sector bitmap: libvhdi takes clear bits behind a set one for set.
PIECE: Final = 4096


async def make(inventory: Inventory, tmp_path: Path, data: bytes = b"\x11" * 4096) -> tuple[str, str]:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, name_label="disk", tags=["one"])
    await replace(inventory, ref, data)
    return sr, ref


def root_of(inventory: Inventory, sr: str) -> Path:
    return Path(inventory.repository(sr).directory.root)


def pbd_of(inventory: Inventory, sr: str) -> str:
    return inventory.records.pbds_of_sr(sr)[0].ref


def hidden(inventory: Inventory, sr: str) -> list[VDI]:
    return [vdi for vdi in inventory.records.vdis_of_sr(sr) if not vdi.managed]


async def replace(inventory: Inventory, ref: str, data: bytes) -> None:
    lease = await inventory.lease(ref, LeaseMode.REPLACE, Holder("root", "import", ref))
    async with inventory.repository_of(ref).staging(lease, whole=True) as staging:
        await trio.to_thread.run_sync(staging.disk.pwrite, data, 0)
        await staging.commit()
        await inventory.vdi_changed(ref)
    lease.release()
    await lease.released()


async def write(inventory: Inventory, ref: str, data: bytes, offset: int = 0) -> None:
    lease = await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
    disk = await trio.to_thread.run_sync(lease.open_disk)
    await trio.to_thread.run_sync(disk.pwrite, data, offset)
    disk.close()
    lease.release()
    await lease.released()
    await inventory.vdi_changed(ref)


def content(inventory: Inventory, ref: str) -> bytes:
    """All bytes of a VDI, whose chain has no faults and says the same to libvhdi."""
    uuid = inventory.records.vdis.get(ref).uuid
    chain = open_chain_files(inventory.repository_of(ref).image_path(uuid), writable=False)
    paths = [Path(node.path) for node in chain.nodes]
    chain.close()
    for path in paths:
        assert not check_vhd(str(path)).problems
    size = inspect(paths[0]).size
    ours = read(str(paths[0]), size)
    # libvhdi refuses to read beyond the end of a parent.
    if len({inspect(path).size for path in paths}) == 1:
        assert libvhdi_reads(paths) == ours
    return ours


def sound_content(paths: list[str], story: object) -> bytes:
    """What a chain of files, leaf first, reads, if libvhdi reads the same and no file has a fault.

    libvhdi takes the size that a VHD was created with for its size, also after it has grown, and reads no
    parent beyond its end. What it can't see for that is our own reader's word.
    """
    for path in paths:
        assert not check_vhd(path).problems, (path, story)
    files = []
    for path in paths:
        files.append(pyvhdi.file())
        files[-1].open(path)
    for child, parent in pairwise(files):
        child.set_parent(parent)
    size = min(file.get_media_size() for file in files)
    # In pieces: a longer read across small blocks takes runs of clear bits for too long.
    foreign = b"".join(files[0].read_buffer_at_offset(PIECE, offset) for offset in range(0, size, PIECE))
    for file in files:
        file.close()
    ours = read(paths[0], inspect(Path(paths[0])).size)
    assert ours[:size] == foreign, (paths, story)
    return ours
