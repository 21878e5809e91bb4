"""VDIs whose changes are tracked: tracking begins and ends, a snapshot is taken, data or a VDI is destroyed.

When an image goes (data_destroy, destroy), what it was needed for is written to the log of the VDI that comes
after it; or, if that is still written to, an empty image stays in its place (emptied.py) until the log can
say it.

The traps: a log is durable before the image goes that it speaks for. The lock on an SR's logs comes first,
leases after it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import structlog
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, Lease, LeaseMode
from gateway.core.records import VDI
from gateway.core.threads import in_thread
from gateway.images.cbtlog import CbtHeader, CbtLog, all_changed
from gateway.images.errors import ImageError
from gateway.repository.cbt_handover import CbtHandover
from gateway.repository.cbt_logs import CbtLogs, child_of_log
from gateway.repository.cbt_question import sm_error
from gateway.repository.changed_blocks import let_go, own_bits
from gateway.repository.emptied import Emptied
from gateway.repository.reconcile import CBT_METADATA, described
from gateway.repository.repository import Repository

log = structlog.get_logger("gateway.repository")

# XenServer waits so long for a snapshot to be let go of (Xapi_vdi.data_destroy); seconds.
_DATA_DESTROY_WAIT: Final = 4.0


class CbtLifecycle(CbtHandover):
    """The part of the inventory that keeps the logs of changed blocks right, whatever is done to VDIs."""

    async def vdi_enable_cbt(self, ref: str) -> None:
        """Track from now on what changes on a VDI; nothing if that is done already.

        Raises OPERATION_NOT_ALLOWED for a snapshot, a hidden parent and in a read-only SR,
        VDI_INCOMPATIBLE_TYPE, SR_BACKEND_FAILURE_66 for a raw image, SR_NOT_ATTACHED, VDI_MISSING, OSError.
        """
        vdi, repository = self._trackable(ref)
        async with self._logs_of(vdi.sr):
            if self.records.vdis.get(ref).cbt_enabled:
                return
            repository.image_path(vdi.uuid)
            with trio.CancelScope(shield=True):
                new = CbtLog.empty(vdi.virtual_size)
                await in_thread(CbtLogs(repository.directory, repository.files).write, vdi.uuid, new)
                await self.records.vdis.change(ref, cbt_enabled=True)

    async def vdi_disable_cbt(self, ref: str) -> None:
        """Track no more what changes on a VDI; what its snapshots say stays. Raises as vdi_enable_cbt."""
        vdi, repository = self._trackable(ref)
        async with self._logs_of(vdi.sr):
            if not self.records.vdis.get(ref).cbt_enabled:
                return
            await repository.require_available()
            with trio.CancelScope(shield=True):
                await in_thread(_cut_off, CbtLogs(repository.directory, repository.files), vdi.uuid)
                await self.records.vdis.change(ref, cbt_enabled=False)
            await self._drop_emptied(vdi.sr)
        self.coalesce(vdi.sr)

    async def vdi_data_destroy(self, ref: str, *, who: str = "XenAPI", task: str | None = None) -> None:
        """Destroy the data of a snapshot, of which what has changed since can still be asked.

        Nothing if that is done already. Raises OPERATION_NOT_ALLOWED for what is no snapshot, in a read-only
        SR and where nothing is destroyed (see Survey.require_sound), VDI_NO_CBT_METADATA if changes weren't
        tracked, VDI_IN_USE, SR_NOT_ATTACHED, ImageError, OSError.
        """
        vdi = self.records.vdis.get(ref)
        if not vdi.is_a_snapshot:
            raise XenAPIError("OPERATION_NOT_ALLOWED", f"VDI is not a snapshot: {ref}")
        if not vdi.cbt_enabled:
            raise XenAPIError("VDI_NO_CBT_METADATA", ref)
        repository = self._writable(vdi.sr)
        async with self._logs_of(vdi.sr):
            if self.records.vdis.get(ref).type != CBT_METADATA:
                holder = Holder(who, "data_destroy", ref, task)
                lease = await repository.lease(vdi.uuid, LeaseMode.WRITE, holder, _DATA_DESTROY_WAIT)
                try:
                    await self._destroy_data(repository, vdi, lease, holder)
                finally:
                    await let_go(lease)
            await self._drop_emptied(vdi.sr)
            await self.refresh_sizes(vdi.sr)
        self.coalesce(vdi.sr)

    async def drop_emptied(self, sr: str) -> None:
        """Write to logs what they can say by now, and remove the empty images that were there for it."""
        repository = self._attached.get(sr)
        if repository is None or not repository.writable or not self.emptied_in(sr):
            return
        async with self._logs_of(sr):
            await self._drop_emptied(sr)

    def emptied_in(self, sr: str) -> frozenset[str]:
        """The uuids of snapshots whose data is destroyed: their images, if they have any, are needed."""
        return frozenset(vdi.uuid for vdi in self.records.vdis_of_sr(sr) if vdi.type == CBT_METADATA)

    # For snapshots and destroys

    @asynccontextmanager
    async def logs_kept(self, ref: str, needed: bool = True) -> AsyncIterator[bool]:
        """Keep others from the logs of the SR of a VDI, if its changes are tracked; whether they are.

        Taken before the VDI is leased.
        """
        vdi = self.records.vdis.get(ref)
        if not (needed and vdi.cbt_enabled):
            yield False
            return
        async with self._logs_of(vdi.sr):
            yield self.records.vdis.get(ref).cbt_enabled

    async def begin_snapshot_log(self, repository: Repository, source: VDI, snapshot: str) -> None:
        """Before the image of a tracked VDI's snapshot is there. Raises OSError."""
        logs = CbtLogs(repository.directory, repository.files)
        with trio.CancelScope(shield=True):
            await in_thread(logs.begin_snapshot, source.uuid, snapshot, source.virtual_size)

    async def settle_snapshot_log(self, repository: Repository, source: VDI, snapshot: str) -> None:
        """After that, whether there is one now or not. Raises OSError; then the next attach does it."""
        logs = CbtLogs(repository.directory, repository.files)
        with trio.CancelScope(shield=True):
            await in_thread(logs.settle_snapshot, source.uuid, snapshot)

    async def forget_changes(self, vdi: VDI, lease: Lease | None, holder: Holder) -> None:
        """A tracked VDI is about to be destroyed, under its WRITE `lease` if it has an image: what its log
        says goes to the one after it. Raises XenAPIError, ImageError, OSError; then nothing is lost.
        """
        repository = self.repository(vdi.sr)
        logs = CbtLogs(repository.directory, repository.files)
        headers = await in_thread(logs.headers)
        own = headers.get(vdi.uuid)
        if own is None:
            return
        before = own.parent if own.parent in headers else None
        after = child_of_log(headers, vdi.uuid)
        with trio.CancelScope(shield=True):
            if after is not None:
                kept = await in_thread(logs.read, after)
                if kept is not None and before is None:
                    await in_thread(logs.name_child, vdi.uuid, None)
                    await in_thread(logs.write_header, after, replace(kept.header, parent=None))
                elif kept is not None:
                    kept = await self._with_what_is_lost(
                        vdi, lease, headers, kept=kept, after=after, holder=holder
                    )
                    # From here on its log isn't taken for that of a snapshot just being made.
                    await in_thread(logs.name_child, vdi.uuid, None)
                    await in_thread(
                        logs.write, after, kept.with_header(parent=before, child=kept.header.child)
                    )
            await in_thread(logs.name_child, before, after)
            await in_thread(logs.remove, vdi.uuid)

    async def _with_what_is_lost(
        self,
        vdi: VDI,
        lease: Lease | None,
        headers: dict[str, CbtHeader],
        *,
        kept: CbtLog,
        after: str,
        holder: Holder,
    ) -> CbtLog:
        """The log of `after`, if it is to tell since the VDI before `vdi`."""
        before = headers[vdi.uuid].parent
        assert before is not None
        repository = self.repository(vdi.sr)
        known = self._known(repository)
        logs = CbtLogs(repository.directory, repository.files)
        own = await in_thread(logs.read, vdi.uuid)
        if known.is_fixed(after):
            first = await self._bits_between(repository, before, vdi.uuid, holder, lease)
            then = await self._bits_between(repository, vdi.uuid, after, holder, lease)
            full = kept.add(first).add(then)
            return full.with_header(parent=before, child=kept.header.child, consistent=True)
        if known.has_image(before) and own is not None:
            return kept.add(own.bits)
        if lease is None or own is None or not known.is_complete(vdi.uuid, own.header):
            log.warning("what has changed is not known, so all of it", vdi=after, since=before)
            return kept.add(all_changed(kept.header.size))
        # The image of the one before is gone; that of this one marks the place from now on.
        kept = kept.add(own.bits).add(await in_thread(own_bits, lease))
        await self._leave_empty(repository, lease, before)
        return kept

    # What is destroyed

    async def _destroy_data(self, repository: Repository, vdi: VDI, lease: Lease, holder: Holder) -> None:
        logs = CbtLogs(repository.directory, repository.files)
        headers = await in_thread(logs.headers)
        if vdi.uuid not in headers:
            raise XenAPIError("VDI_NO_CBT_METADATA", vdi.ref)
        await repository.require_sound()
        known = self._known(repository)
        await self._seal(repository, vdi.uuid, holder, lease)
        after = child_of_log(headers, vdi.uuid)
        with trio.CancelScope(shield=True):
            if after is not None and known.is_fixed(after):
                await self._seal(repository, after, holder, lease)
            elif after is not None:
                kept = await in_thread(logs.read, after)
                if kept is not None:
                    more = kept.add(await in_thread(own_bits, lease))
                    if more != kept:
                        await in_thread(logs.write, after, more)
            # The record first: whoever comes after a crash in between knows what the image is for.
            await self.records.vdis.change(vdi.ref, type=CBT_METADATA)
            if after is None or known.is_fixed(after):
                await repository.collect(lease, vdi.uuid)
                await self.records.vdis.change(vdi.ref, physical_utilisation=0)
            else:
                await self._leave_empty(repository, lease, vdi.uuid)

    async def _leave_empty(self, repository: Repository, lease: Lease, uuid: str) -> None:
        """Let the name of `uuid` have the image of `lease`, emptied and hidden."""
        emptied = Emptied(repository.directory, lease, uuid, repository.files)
        try:
            identity = await in_thread(emptied.prepare)
            if repository.directory.image(uuid, "vhd") == lease.leaf_path:
                lease.move_to(identity)
            await repository.restructure(emptied.publish, (uuid,))
        finally:
            await in_thread(emptied.discard)
        vdi, image = self._known(repository).find(uuid), repository.images[uuid]
        if vdi is not None:

            def changes(record: VDI) -> dict[str, object]:
                now = described(record, image, writable=True, written=False)
                return {
                    "content_id": now.content_id,
                    "sm_config": now.sm_config,
                    "physical_utilisation": now.physical_utilisation,
                }

            await self.records.vdis.edit(vdi.ref, changes)

    async def _drop_emptied(self, sr: str) -> None:
        repository = self.repository(sr)
        known = self._known(repository)
        logs = CbtLogs(repository.directory, repository.files)
        headers = await in_thread(logs.headers)
        for vdi in self.records.vdis_of_sr(sr):
            image = repository.images.get(vdi.uuid)
            if vdi.type != CBT_METADATA or image is None or image.error is not None:
                continue
            after = child_of_log(headers, vdi.uuid)
            if after is not None and not known.is_fixed(after) and image.hidden:
                continue
            holder = Holder("the gateway", "data_destroy", vdi.ref)
            try:
                await self._drop(repository, vdi, after, holder)
            except (XenAPIError, ImageError, OSError) as error:
                log.info("what is left of a snapshot stays for now", vdi=vdi.uuid, why=str(error))

    async def _drop(self, repository: Repository, vdi: VDI, after: str | None, holder: Holder) -> None:
        known = self._known(repository)
        lease = await repository.lease_to_coalesce(vdi.uuid, LeaseMode.WRITE, holder, wait=0)
        try:
            await repository.require_sound()
            with trio.CancelScope(shield=True):
                if after is not None and not known.is_fixed(after):
                    # A crash came before it was emptied; what it has by itself is in the log already.
                    await self._leave_empty(repository, lease, vdi.uuid)
                    return
                if after is not None:
                    await self._seal(repository, after, holder, lease)
                await repository.collect(lease, vdi.uuid)
                await self.records.vdis.change(vdi.ref, physical_utilisation=0)
        finally:
            await let_go(lease)

    def _trackable(self, ref: str) -> tuple[VDI, Repository]:
        vdi = self.records.vdis.get(ref)
        if vdi.is_a_snapshot:
            raise XenAPIError("OPERATION_NOT_ALLOWED", f"VDI is a snapshot: {ref}")
        if vdi.type not in ("user", "system"):
            raise XenAPIError("VDI_INCOMPATIBLE_TYPE", ref, vdi.type)
        if not vdi.managed:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "it is the hidden parent of other VDIs")
        if vdi.image_format == "raw":
            raise sm_error(66, "Invalid VDI type", "Raw VDI or snapshot not permitted")
        return vdi, self._writable(vdi.sr)

    def _writable(self, sr: str) -> Repository:
        repository = self.repository(sr)
        if not repository.writable:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "the SR is attached read-only")
        return repository


def _cut_off(logs: CbtLogs, uuid: str) -> None:
    """Remove the last log of a row."""
    own = logs.headers().get(uuid)
    if own is not None:
        logs.name_child(own.parent, None)
    logs.remove(uuid)
