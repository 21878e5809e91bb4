"""Snapshots, clones and reverts: the files of fork.py and the records that go with them; and new VDIs that
are filled with a copy.

The former need only that nobody writes to the VDI; who reads it is not disturbed. No data is copied. The
bytes of the source, the new VDI and the base copy are the same, so all three carry the source's content id.

The trap: the source's file is another one afterwards, and what isn't said to have the same content gets a new
content id at the next scan, as after a change from outside.
"""

import errno
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import structlog
import trio

from gateway.core.clock import utc_now
from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, Lease, LeaseMode
from gateway.core.records import VDI
from gateway.core.refs import new_ref, new_uuid
from gateway.core.threads import in_thread
from gateway.images.errors import ImageError
from gateway.images.files import FileIdentity
from gateway.repository.cbt_lifecycle import CbtLifecycle
from gateway.repository.fork import Fork, Revert
from gateway.repository.intended import forget_intended, write_intended
from gateway.repository.reconcile import CBT_METADATA, described
from gateway.repository.records_file import STAMP_KEY
from gateway.repository.repository import Repository
from gateway.repository.scan import FileStamp, ScannedImage
from gateway.repository.staging import Staging

log = structlog.get_logger("gateway.repository")

# What XenServer calls the hidden parent that a snapshot leaves behind.
BASE_COPY_NAME: Final = "base copy"
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

Publishing: TypeAlias = Callable[[str, FileIdentity], AbstractContextManager[None]]
"""A block for a VDI (its reference) in which its file is another than this one; see vdi_revert."""


@dataclass(slots=True)
class NewVDI:
    """A VDI that is being filled. Nobody knows of it until `staging` is committed; until then `vdi`, the
    record that it will have, may be replaced.
    """

    vdi: VDI
    staging: Staging


class ChainOperations(CbtLifecycle):
    """The part of the inventory that makes VDIs of VDIs."""

    @asynccontextmanager
    async def vdi_new(self, vdi: VDI, holder: Holder) -> AsyncIterator[NewVDI]:
        """Fill a VDI that has this record and size; it is there once it is committed, whole and durable.

        Raises OPERATION_NOT_ALLOWED in a read-only SR, SR_NOT_ATTACHED, ImageError, OSError (ENOSPC too).
        """
        repository = self.repository(vdi.sr)
        if not repository.writable:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "the SR is attached read-only")
        self._being_created.add(vdi.uuid)
        self._being_filled[vdi.uuid] = vdi.sr, holder
        new: NewVDI | None = None
        intended = (repository.directory, vdi.uuid)
        try:
            try:
                async with repository.staging_new(vdi.uuid, vdi.virtual_size, vdi.image_format) as staging:
                    await in_thread(write_intended, *intended, (vdi,), repository.files)
                    new = NewVDI(vdi, staging)
                    yield new
            finally:
                committed = new is not None and new.staging.committed is not None
                image = repository.images.get(vdi.uuid)
                with trio.CancelScope(shield=True):
                    try:
                        if committed and new is not None and image is not None:
                            await self._add_new(repository, _with_content(new.vdi, image, new.vdi.content_id))
                    finally:
                        # What is there and has no record keeps its name for the next attach.
                        gone = image is not None and vdi.uuid not in repository.images
                        if not committed or gone or vdi.ref in self.records.vdis:
                            await in_thread(forget_intended, *intended, repository.files)
        finally:
            self._being_created.discard(vdi.uuid)
            del self._being_filled[vdi.uuid]

    async def _add_new(self, repository: Repository, vdi: VDI) -> None:
        """The image of a VDI is there and gets its record; if it can't have one, the image goes."""
        try:
            await self.records.vdis.add(vdi)
        except BaseException:
            await self._remove_unknown(repository, vdi)
            raise
        await self.refresh_sizes(vdi.sr)

    async def _remove_unknown(self, repository: Repository, vdi: VDI) -> None:
        """Remove an image of which nobody is told: a scan would find it, as a VDI without a name."""
        try:
            await repository.destroy_image(vdi.uuid, Holder("the gateway", "destroy", vdi.ref), wait=0)
        except (XenAPIError, ImageError, OSError) as error:
            log.warning("the image of a VDI that was not made was not removed", vdi=vdi.uuid, why=str(error))

    async def vdi_snapshot(
        self,
        ref: str,
        *,
        who: str = "XenAPI",
        task: str | None = None,
        wait: float | None = None,
        marks: Mapping[str, str] | None = None,
    ) -> str:
        """Keep a VDI as it is now; the snapshot's reference. Its other_config has `marks` from the beginning.

        Raises SR_BACKEND_FAILURE_109 for a chain of 30 levels, VDI_IN_USE while somebody writes,
        OPERATION_NOT_ALLOWED for a raw image or a hidden parent and in a read-only SR, SR_FULL,
        SR_NOT_ATTACHED, ImageError, OSError.
        """
        return (await self._fork(ref, Holder(who, "snapshot", ref, task), wait, marks=marks)).ref

    async def vdi_clone(
        self, ref: str, *, who: str = "XenAPI", task: str | None = None, wait: float | None = None
    ) -> str:
        """Make a writable VDI with the bytes that this one has now; its reference. Raises as vdi_snapshot."""
        return (await self._fork(ref, Holder(who, "clone", ref, task), wait)).ref

    async def vdi_revert(
        self,
        ref: str,
        *,
        who: str = "XenAPI",
        task: str | None = None,
        wait: float | None = None,
        publishing: Publishing = lambda _vdi, _replaced: nullcontext(),
    ) -> None:
        """Give the VDI of which `ref` is a snapshot the snapshot's bytes and size; the snapshot stays.

        What was written to the VDI since is gone. `publishing` is entered while the VDI's name may lead to
        another file than `replaced` and its content id doesn't say so yet. Raises OPERATION_NOT_ALLOWED for
        what is no snapshot or has no VDI any more, and what vdi_snapshot raises.
        """
        repository = self._forkable(ref)
        snapshot = self.records.vdis.get(ref)
        if not snapshot.is_a_snapshot or snapshot.snapshot_of not in self.records.vdis:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "it is not the snapshot of a VDI that exists")
        target = self.records.vdis.get(snapshot.snapshot_of)
        if target.sr != snapshot.sr:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "the snapshot is in another SR than its VDI")
        holder = Holder(who, "revert", target.ref, task)
        async with self._leased(repository, target.ref, holder, wait) as lease:
            # A snapshot that has blocks of its own is first made an empty child of them.
            await self._fork(ref, Holder(who, "revert", ref, task), wait, child=False)
            async with self._leased(
                repository, ref, Holder(who, "revert", ref, task), wait, LeaseMode.READ
            ) as source:
                snapshot = await self.vdi_under(ref, source)
                revert = Revert(repository.directory, lease, source, repository.files)
                with publishing(target.ref, lease.chain.nodes[0].identity):
                    try:
                        await self._replace(repository, lease, revert, target.uuid)
                    finally:
                        if revert.published:
                            with trio.CancelScope(shield=True):
                                image = repository.images[target.uuid]
                                await self._same_content(target.ref, image, snapshot.content_id)
                                await self.refresh_sizes(target.sr)

    async def _replace(self, repository: Repository, lease: Lease, revert: Revert, uuid: str) -> None:
        try:
            lease.move_to(await in_thread(revert.prepare))
            await repository.restructure(revert.publish, (uuid,))
        finally:
            with trio.CancelScope(shield=True):
                await in_thread(revert.discard)

    async def _fork(
        self,
        ref: str,
        holder: Holder,
        wait: float | None,
        *,
        child: bool = True,
        marks: Mapping[str, str] | None = None,
    ) -> VDI:
        """The new VDI; without `child` the source itself, which then has no blocks of its own."""
        repository = self._forkable(ref)
        uuid, base = new_uuid(), new_uuid()
        is_snapshot = child and holder.operation == "snapshot"
        self._being_created.update((uuid, base))
        try:
            async with (
                self.logs_kept(ref, is_snapshot) as tracked,
                self._leased(repository, ref, holder, wait) as lease,
            ):
                source = await self.vdi_under(ref, lease)
                base_copy = _base_copy(source, base)
                made = _made(source, uuid, is_snapshot) if child else source
                if child:
                    known = {**made.other_config, **(marks or {})}
                    made = replace(made, cbt_enabled=tracked, other_config=known)
                fork = Fork(
                    repository.directory,
                    lease,
                    base=base,
                    child=uuid if child else None,
                    records=(made, base_copy) if child else (),
                    files=repository.files,
                )
                try:
                    try:
                        if tracked:
                            await self.begin_snapshot_log(repository, source, uuid)
                        await self._run(repository, lease, fork, (source.uuid, uuid, base))
                    finally:
                        if tracked:
                            await self.settle_snapshot_log(repository, source, uuid)
                    with trio.CancelScope(shield=True):
                        # First, so that nothing can fail any more once there is a snapshot.
                        image = repository.images[source.uuid]
                        await self._same_content(source.ref, image, source.content_id)
                        new = [made] if child else []
                        if fork.has_base:
                            new.append(base_copy)
                        images = repository.images
                        new = [_with_content(vdi, images[vdi.uuid], source.content_id) for vdi in new]
                        await self.records.vdis.add_all(new)
                except BaseException:
                    await self._withdraw(repository, fork, source, uuid if child else None, tracked)
                    raise
                with trio.CancelScope(shield=True):
                    await in_thread(fork.settle)
                    await self.refresh_sizes(source.sr)
        finally:
            self._being_created.difference_update((uuid, base))
        return made

    async def _withdraw(
        self, repository: Repository, fork: Fork, source: VDI, child: str | None, tracked: bool
    ) -> None:
        """Remove a child of which nobody is told: a scan would find it, as a VDI without a name."""
        if child is None:
            return
        with trio.CancelScope(shield=True):
            try:
                await repository.restructure(fork.withdraw, (child,))
                if tracked:
                    await self.settle_snapshot_log(repository, source, child)
            except (XenAPIError, ImageError, OSError) as error:
                log.warning(
                    "what a failed snapshot or clone has left was not removed", vdi=child, why=str(error)
                )

    def _forkable(self, ref: str) -> Repository:
        vdi = self.records.vdis.get(ref)
        repository = self.repository(vdi.sr)
        if not repository.writable:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "the SR is attached read-only")
        if not vdi.managed:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "it is the hidden parent of other VDIs")
        if vdi.type == CBT_METADATA:
            raise XenAPIError("VDI_INCOMPATIBLE_TYPE", ref, vdi.type)
        return repository

    async def lease_data(
        self, repository: Repository, vdi: VDI, mode: LeaseMode, holder: Holder, wait: float | None
    ) -> Lease:
        """As Repository.lease; VDI_INCOMPATIBLE_TYPE if the data of a snapshot was destroyed meanwhile.

        Who has waited for that would get what is left of the image, which reads as zeroes.
        """
        lease = await repository.lease(vdi.uuid, mode, holder, wait)
        if vdi.ref in self.records.vdis and self.records.vdis.get(vdi.ref).type == CBT_METADATA:
            lease.release()
            with trio.CancelScope(shield=True):
                await lease.released()
            raise XenAPIError("VDI_INCOMPATIBLE_TYPE", vdi.ref, CBT_METADATA)
        return lease

    @asynccontextmanager
    async def _leased(
        self,
        repository: Repository,
        ref: str,
        holder: Holder,
        wait: float | None,
        mode: LeaseMode = LeaseMode.REPLACE,
    ) -> AsyncIterator[Lease]:
        lease = await self.lease_data(repository, self.records.vdis.get(ref), mode, holder, wait)
        try:
            yield lease
        finally:
            lease.release()
            with trio.CancelScope(shield=True):
                await lease.released()

    async def vdi_under(self, ref: str, lease: Lease) -> VDI:
        """The record under the lease; with a new content id if the file was changed from outside."""
        status = await in_thread(os.fstat, lease.chain.nodes[0].fd)
        vdi = self.records.vdis.get(ref)
        if vdi.sm_config.get(STAMP_KEY) == str(FileStamp.of(status)):
            return vdi
        return replace(vdi, content_id=new_uuid())

    async def _run(self, repository: Repository, lease: Lease, fork: Fork, uuids: tuple[str, ...]) -> None:
        try:
            try:
                await in_thread(fork.prepare)
                if fork.new_leaf is not None:
                    lease.move_to(fork.new_leaf)
                await repository.restructure(fork.publish, uuids)
            finally:
                with trio.CancelScope(shield=True):
                    await in_thread(fork.discard)
        except OSError as error:
            if error.errno in _NO_SPACE:
                total, used = await repository.space()
                raise XenAPIError("SR_FULL", "unknown", str(total - used)) from error
            raise

    async def _same_content(self, ref: str, image: ScannedImage, content_id: str) -> None:
        """The VDI has another file, and perhaps another parent, with this content."""

        def changes(record: VDI) -> dict[str, object]:
            now = _with_content(record, image, content_id)
            return {
                "content_id": now.content_id,
                "sm_config": now.sm_config,
                "virtual_size": now.virtual_size,
                "physical_utilisation": now.physical_utilisation,
            }

        await self.records.vdis.record_fact(ref, changes)


def _with_content(vdi: VDI, image: ScannedImage, content_id: str) -> VDI:
    """The record of a file that is known to have this content."""
    known = {**vdi.sm_config, STAMP_KEY: str(image.stamp)}
    return described(
        replace(vdi, content_id=content_id, sm_config=known), image, writable=True, written=False
    )


def _made(source: VDI, uuid: str, snapshot: bool) -> VDI:
    """The record of a snapshot or clone; what its image says is still missing."""
    made = VDI(
        ref=new_ref(),
        uuid=uuid,
        sr=source.sr,
        name_label=source.name_label,
        name_description=source.name_description,
        type=source.type,
        sharable=source.sharable,
        other_config=source.other_config,
        xenstore_data=source.xenstore_data,
        tags=source.tags,
    )
    if snapshot:
        made = replace(made, is_a_snapshot=True, snapshot_of=source.ref, snapshot_time=utc_now())
    return made


def _base_copy(source: VDI, uuid: str) -> VDI:
    return VDI(ref=new_ref(), uuid=uuid, sr=source.sr, name_label=BASE_COPY_NAME, type=source.type)
