"""Changed blocks: what has changed on a disk between two of its snapshots, in blocks of 64 KiB.

Nothing is written down while a disk is written to. As long as two snapshots have images, the blocks of the
nodes under one of them alone say where they differ, whatever was coalesced, reverted or imported between.
Only when an image goes, what it was needed for is written to a log before (cbt_lifecycle.py).

So the log of a snapshot is complete ("consistent") or its bits are added to what the images say. Where
neither is known, everything is said to have changed: too much is right, too little never.

The trap: the lock on an SR's logs comes first, leases after it.
"""

from dataclasses import replace
from typing import Final

import structlog
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, Lease, LeaseMode
from gateway.core.threads import in_thread
from gateway.images.cbtlog import all_changed, clipped, united
from gateway.images.changes import EXACT_BLOCKS, Changes
from gateway.images.vhd.image import open_vhd
from gateway.repository.cbt_logs import CbtLogs, way_between
from gateway.repository.cbt_question import KnownVDIs, ask, sm_error
from gateway.repository.repository import Repository
from gateway.repository.sr_lifecycle import SRLifecycle

log = structlog.get_logger("gateway.repository")

# Nobody waits for what is written to a log.
_EXACT_IN_LOGS: Final = 1 << 17


class ChangedBlocks(SRLifecycle):
    """The part of the inventory that tells which blocks have changed."""

    async def vdi_list_changed_blocks(
        self, older: str, newer: str, *, who: str = "XenAPI", task: str | None = None
    ) -> bytes:
        """One bit for each 64 KiB of the newer VDI that may differ from the older one; the first is the
        highest of the first byte. As many bytes as whole groups of 2 MiB need, four each.

        Raises SR_BACKEND_FAILURE_460 unless the one is a later state of the other by the logs,
        SR_BACKEND_FAILURE_459 if the disk has become smaller between them, VDI_IN_USE while one is written
        to, SR_NOT_ATTACHED, DirectoryUnavailable, ImageError, OSError.
        """
        first, last = self.records.vdis.get(older), self.records.vdis.get(newer)
        repository = self.repository(last.sr)
        if older == newer:
            raise _unrelated("Source and target VDI are same")
        if first.sr != last.sr:
            raise _unrelated("Source and target VDI are unrelated")
        holder = Holder(who, "list_changed_blocks", newer, task)
        leases: list[tuple[Lease, Lease]] = []
        try:
            async with self._logs_of(last.sr):
                await repository.require_available()
                logs = CbtLogs(repository.directory, repository.files)
                headers = await in_thread(logs.headers)
                way = way_between(headers, first.uuid, last.uuid)
                if not way:
                    raise _unrelated("Source and target VDI are unrelated")
                question = await in_thread(ask, self._known(repository), way, headers, logs)
                for pair in question.pairs:
                    # One by one, so that those there are will be let go of.
                    leases.append(await self._lease_pair(repository, pair, holder))  # noqa: PERF401

            def answer() -> bytes:
                changes = Changes(question.size, EXACT_BLOCKS)
                for one, other in leases:
                    changes.add_difference(one.chain.nodes, other.chain.nodes)
                bits: bytes = bytes(changes.bits)
                for more in question.bits:
                    bits = united(bits, more)
                return clipped(bits, last.virtual_size)[: 4 * -(-last.virtual_size // (2 << 20))]

            return await in_thread(answer)
        finally:
            for leased in leases:
                for lease in leased:
                    await let_go(lease)

    async def _bits_between(
        self, repository: Repository, older: str, newer: str, holder: Holder, held: Lease | None
    ) -> bytes:
        """What has changed between two of which one follows the other; `held` is a lease on one of them."""
        kept = await in_thread(CbtLogs(repository.directory, repository.files).read, newer)
        known = self._known(repository)
        size = max(known.size(uuid) for uuid in (older, newer))
        if kept is not None and known.is_complete(newer, kept.header):
            return kept.bits
        if kept is None or not all(known.has_image(uuid) for uuid in (older, newer)):
            log.warning("what has changed is not known, so all of it", vdi=newer, since=older)
            return all_changed(size)
        one = two = None
        try:
            one = await self._chain_of(repository, older, holder, held)
            two = await self._chain_of(repository, newer, holder, held)
            changes = Changes(size, _EXACT_IN_LOGS)
            await in_thread(changes.add_difference, one.chain.nodes, two.chain.nodes)
            return united(bytes(changes.bits), kept.bits)
        finally:
            for lease in (one, two):
                if lease is not None and lease is not held:
                    await let_go(lease)

    async def _chain_of(self, repository: Repository, uuid: str, holder: Holder, held: Lease | None) -> Lease:
        if held is not None and held.leaf_path == repository.image_path(uuid):
            return held
        return await repository.lease(uuid, LeaseMode.READ, holder)

    async def _lease_pair(
        self, repository: Repository, pair: tuple[str, str], holder: Holder
    ) -> tuple[Lease, Lease]:
        one = await repository.lease(pair[0], LeaseMode.READ, holder)
        try:
            return one, await repository.lease(pair[1], LeaseMode.READ, holder)
        except BaseException:
            one.release()
            raise

    async def _seal(self, repository: Repository, uuid: str, holder: Holder, lease: Lease | None) -> None:
        """Make the log of a snapshot say all. `lease`, if any, is held on it or on the one before it."""
        logs = CbtLogs(repository.directory, repository.files)
        kept = await in_thread(logs.read, uuid)
        if kept is None or kept.header.consistent:
            return
        if kept.header.parent is not None:
            bits = await self._bits_between(repository, kept.header.parent, uuid, holder, lease)
            kept = kept.add(bits)
        await in_thread(logs.write, uuid, replace(kept, header=replace(kept.header, consistent=True)))

    def _known(self, repository: Repository) -> KnownVDIs:
        return KnownVDIs(self.records, repository.images)

    def _logs_of(self, sr: str) -> trio.Lock:
        return self._log_locks.setdefault(sr, trio.Lock())


def _unrelated(problem: str) -> XenAPIError:
    return sm_error(460, "Failed to calculate changed blocks for given VDIs.", problem)


def own_bits(lease: Lease) -> bytes:
    """What the leaf of a lease has by itself, as the bits of a log. Blocks. Raises ImageError, OSError."""
    node = lease.chain.nodes[0]
    changes = Changes(open_vhd(node.fd, node.path).size, _EXACT_IN_LOGS)
    changes.add_own(node)
    return bytes(changes.bits)


async def let_go(lease: Lease) -> None:
    """End a lease and wait until others can have it, also if cancelled."""
    lease.release()
    with trio.CancelScope(shield=True):
        await lease.released()
