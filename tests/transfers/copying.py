"""Copies of disks for tests: made, held in the middle, and read by programs that aren't ours.

The trap: a copy is made in a thread, which a test that holds it at a write has to let go on however it ends.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import trio

from gateway.core.records import VDI
from gateway.core.refs import NULL_REF
from gateway.core.task import Operation
from gateway.images.chain import open_chain_files
from gateway.images.files import Buffer, FileCalls
from gateway.repository.inventory import Inventory
from gateway.transfers.copy_disk import copy_disk
from gateway.transfers.import_raw import PIECE_BYTES
from gateway.transfers.publications import Publications
from tests.images.disks import libvhdi_reads
from tests.repository.vdis import replace as import_into

MIB = 1 << 20


async def copy(
    inventory: Inventory,
    vdi: str,
    sr: str = NULL_REF,
    into: str = NULL_REF,
    *,
    operation: Operation | None = None,
    publications: Publications | None = None,
) -> VDI:
    made = await copy_disk(
        inventory,
        publications or Publications(),
        operation or Operation("OpaqueRef:task", None),
        vdi=vdi,
        sr=sr,
        into=into,
        who="the test",
        turns=trio.CapacityLimiter(1),
    )
    return inventory.records.vdis.get(made)


def path_of(inventory: Inventory, vdi: VDI | str) -> Path:
    record = inventory.records.vdis.get(vdi) if isinstance(vdi, str) else vdi
    return Path(inventory.repository_of(record).image_path(record.uuid))


def foreign_reads(inventory: Inventory, vdi: VDI | str) -> bytes:
    """What a program that isn't ours reads from a VDI."""
    path = path_of(inventory, vdi)
    if path.suffix == ".raw":
        return path.read_bytes()
    chain = open_chain_files(str(path), writable=False)
    paths = [Path(node.path) for node in chain.nodes]
    chain.close()
    return libvhdi_reads(paths)


async def other_sr(inventory: Inventory, tmp_path: Path) -> str:
    return await inventory.sr_create("other", str(tmp_path / "other"))


def names(directory: Path) -> set[str]:
    """What lies in an SR, in our directory there, and in its staging directory."""
    service = directory / ".vdi-gateway"
    found = {name for place in (directory, service, service / "staging") for name in os.listdir(place)}
    return found - {".vdi-gateway", "staging", "sr.json", "owner", "records.json", "records.json.new"}


class Held(FileCalls):
    """Holds the copy's thread at its n-th write until it is let go; `at_write` is called there."""

    def __init__(self, number: int, at_write: Callable[[], None] | None = None) -> None:
        self.number = number
        self.writes = 0
        self.at_write = at_write or self._hold
        self.held = trio.Event()
        self.go_on = threading.Event()

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        # The bytes of a disk, not its metadata.
        if len(data) >= PIECE_BYTES:
            self.writes += 1
            if self.writes == self.number:
                self.at_write()
        super().pwrite(fd, data, offset)

    def _hold(self) -> None:
        trio.from_thread.run_sync(self.held.set)
        self.go_on.wait()


async def filled(inventory: Inventory, tmp_path: Path) -> tuple[str, str]:
    """A disk of 16 MiB without a zero."""
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=16 * MIB, name_label="source")
    await import_into(inventory, ref, b"\x5a" * 16 * MIB)
    return sr, ref
