"""What a VDI's files are at one moment, without a lease: for those who show it and don't read it.

So anybody may write to the files or rename others over them meanwhile. What was read counts only if the names
still lead to the same files and the content id is the same before and after; else it is read again.
"""

from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from gateway.access.protocol import Described
from gateway.core.errors import XenAPIError
from gateway.core.threads import in_thread
from gateway.images.allocation import stored_blocks
from gateway.images.chain import ChainFiles, chain_is_current, open_chain_files, open_disk
from gateway.images.export_layout import SparseFormat, sparse_size
from gateway.images.vhd.format import BLOCK_SIZE
from gateway.repository.reconcile import CBT_METADATA

if TYPE_CHECKING:
    from gateway.core.limits import Limits
    from gateway.core.records import VDI
    from gateway.repository.inventory import Inventory
    from gateway.transfers.publications import Publications

_ATTEMPTS: Final = 8
_AT_A_TIME: Final = 4  # a whole directory may be asked for, and those who open disks go first


class Describing:
    """Answers what VDIs are. `publications` are those of all who give VDIs new content."""

    def __init__(self, inventory: "Inventory", limits: "Limits", publications: "Publications") -> None:
        self._inventory = inventory
        self._limits = limits
        self._publications = publications
        # Waited for before the lock of an SR, not with it in hand.
        self._turns = trio.Semaphore(_AT_A_TIME)
        self._threads = trio.CapacityLimiter(_AT_A_TIME)

    async def describe(self, uuid: str) -> Described:
        """What the VDI with this uuid is.

        Raises what opening it for reading would: UUID_INVALID, VDI_MISSING, VDI_INCOMPATIBLE_TYPE,
        SR_NOT_ATTACHED, ImageError, OSError; VDI_IN_USE when it changes all the time.
        """
        vdis = self._inventory.records.vdis
        for _ in range(_ATTEMPTS):
            before = vdis.by_uuid(uuid)
            if before.type == CBT_METADATA:
                raise XenAPIError("VDI_INCOMPATIBLE_TYPE", before.ref, before.type)
            async with self._turns:
                found = await self._look(before)
            if found is None:
                continue
            await self._publications.settled(before.ref, found.leaf)
            if vdis.by_uuid(uuid).content_id == before.content_id:
                return found
        raise XenAPIError("VDI_IN_USE", before.ref, "its files are being renamed")

    async def _look(self, vdi: "VDI") -> Described | None:
        chain = await self._open(vdi)
        try:
            return await in_thread(_described, chain, vdi.content_id, limiter=self._threads)
        finally:
            chain.close()  # if it was cancelled before it began

    async def _open(self, vdi: "VDI") -> ChainFiles:
        repository = self._inventory.repository_of(vdi)
        path = repository.image_path(vdi.uuid)
        with trio.move_on_after(self._limits.lease_wait):
            await repository.structure_lock.acquire()
            try:
                return await in_thread(partial(open_chain_files, path, writable=False), limiter=self._threads)
            except FileNotFoundError as error:
                raise XenAPIError("VDI_MISSING") from error
            finally:
                repository.structure_lock.release()
        raise XenAPIError("VDI_IN_USE", vdi.ref, "files of its storage repository are being renamed")


def _described(chain: ChainFiles, content_id: str) -> Described | None:
    """What the files are, which are closed then; None if one was replaced meanwhile. ImageError, OSError."""
    try:
        blocks = stored_blocks(chain)
        disk = open_disk(chain)
    except BaseException:
        chain.close()
        raise
    try:
        stored = len(blocks) * BLOCK_SIZE
        if blocks:
            stored -= max(0, (blocks[-1] + 1) * BLOCK_SIZE - disk.size)
        found = Described(
            content_id,
            chain.nodes[0].identity,
            disk.size,
            stored,
            sparse_size(disk, blocks, SparseFormat.VHD),
            sparse_size(disk, blocks, SparseFormat.QCOW2),
        )
        return found if chain_is_current(chain) else None
    finally:
        disk.close()
