"""A VDI whose changes are tracked, for tests: what it was at each snapshot, and what has to be told since."""

import os
from pathlib import Path

import trio

from gateway.core.leases import Holder, LeaseMode
from gateway.images.chain import open_chain_files, open_disk
from gateway.repository.inventory import Inventory

MIB = 1 << 20
GRAIN = 1 << 16


def marked(bits: bytes) -> set[int]:
    return {block for block in range(8 * len(bits)) if bits[block >> 3] & 0x80 >> (block & 7)}


def differing(one: bytes, other: bytes) -> set[int]:
    """The blocks of the other disk that differ; what the one doesn't have is zeroes."""
    one = one.ljust(len(other), b"\0")
    return {
        start // GRAIN
        for start in range(0, len(other), GRAIN)
        if one[start : start + GRAIN] != other[start : start + GRAIN]
    }


def content(inventory: Inventory, ref: str) -> bytes:
    path = inventory.repository_of(ref).image_path(inventory.records.vdis.get(ref).uuid)
    disk = open_disk(open_chain_files(path, writable=False))
    data = bytearray(disk.size)
    disk.pread_into(data, 0)
    disk.close()
    return bytes(data)


async def write(inventory: Inventory, ref: str, *pieces: tuple[int, bytes]) -> None:
    """As over NBD: in place."""
    lease = await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
    files = inventory.repository_of(ref).files
    disk = await trio.to_thread.run_sync(lambda: lease.open_disk(files=files))
    for offset, data in pieces:
        await trio.to_thread.run_sync(disk.pwrite, data, offset)
    disk.flush()
    disk.close()
    lease.release()
    await lease.released()
    await inventory.vdi_changed(ref)


async def told(inventory: Inventory, older: str, newer: str) -> set[int]:
    return marked(await inventory.vdi_list_changed_blocks(older, newer))


def file_of(inventory: Inventory, ref: str, suffix: str = "vhd") -> Path:
    vdi = inventory.records.vdis.get(ref)
    return Path(inventory.repository_of(ref).directory.root) / f"{vdi.uuid}.{suffix}"


async def tracked(inventory: Inventory, directory: Path, size: int = 8 * MIB) -> tuple[str, str]:
    """The SR and the VDI."""
    sr = await inventory.sr_create("sr", str(directory))
    ref = await inventory.vdi_create(sr=sr, virtual_size=size, name_label="disk")
    await inventory.vdi_enable_cbt(ref)
    return sr, ref


def names(inventory: Inventory, sr: str) -> set[str]:
    return {name for name in os.listdir(inventory.repository(sr).directory.root) if not name.startswith(".")}
