"""The VDIs of this gateway as XenAPI sees them: records, directories and leases brought together.

Here a file and its record change together. The file comes first: after a crash in between, the next scan
finds it and the record follows. What only records know, a VDI's name, is in the copy that lies in the SR.

The trap: between the file's change and the record's nothing may be cancelled, so the two run shielded.
"""

import errno
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import Final

import structlog
import trio

from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.leases import Holder, Lease, LeaseMode, Leases
from gateway.core.limits import Limits
from gateway.core.records import VDI, Host, ImageFormat, Records
from gateway.core.refs import NULL_REF, new_ref, new_uuid
from gateway.core.tasks import Tasks
from gateway.core.threads import in_thread
from gateway.images.files import FILES, FileCalls
from gateway.images.vhd.format import MAX_VIRTUAL_SIZE, SECTOR, round_up_to_sector, round_up_virtual_size
from gateway.repository.chain_operations import ChainOperations
from gateway.repository.coalescers import Coalescers
from gateway.repository.reconcile import CBT_METADATA, described
from gateway.repository.records_file import STAMP_KEY
from gateway.repository.repository import Repository
from gateway.repository.scan import FileStamp

log = structlog.get_logger("gateway.repository")

# A raw image has no limit of its own; from 2^50 on, a Content-Length means "not known".
MAX_RAW_SIZE: Final = (1 << 50) - SECTOR
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Where(Enum):
    """Where an SR is attached, if not on another host."""

    LOCAL = "local"
    NOWHERE = "nowhere"


class Inventory(ChainOperations):
    """Everything that doors ask of SRs and VDIs. Made by `open`."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        records: Records,
        leases: Leases,
        events: Events,
        *,
        who: str,
        files: FileCalls = FILES,
        tasks: Tasks | None = None,
        limits: Limits | None = None,
    ) -> AsyncIterator["Inventory"]:
        """Attach what is to be attached, for the time of a block; `who` is told to other gateways.

        With `tasks` the SRs are coalesced, under tasks of their own.
        """
        inventory = cls(records, leases, events, who=who, files=files)
        if tasks is not None:
            inventory._coalescers = Coalescers(
                records,
                leases,
                events,
                tasks=tasks,
                limits=limits or Limits(),
                refresh_sizes=inventory.refresh_sizes,
                reconcile=inventory.reconcile,
                drop_emptied=inventory.drop_emptied,
            )
        try:
            await inventory.attach_all()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(inventory._copies.run)
                if inventory._coalescers is not None:
                    nursery.start_soon(inventory._coalescers.run)
                yield inventory
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # What the block raised reaches its caller as it was.
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise
        finally:
            await inventory.detach_all()

    def repository_of(self, vdi: VDI | str) -> Repository:
        """The attached SR of a VDI (record or reference). Raises SR_NOT_ATTACHED, HANDLE_INVALID."""
        record = self.records.vdis.get(vdi) if isinstance(vdi, str) else vdi
        return self.repository(record.sr)

    def where_is(self, sr: str) -> Where | Host:
        """Where an SR can be reached: here if it is attached here, else the host that has it, or nowhere."""
        if sr in self._attached:
            return Where.LOCAL
        for pbd in self.records.pbds_of_sr(sr):
            if pbd.currently_attached and pbd.host != self.records.this_host.ref:
                return self.records.hosts.get(pbd.host)
        return Where.NOWHERE

    async def lease(
        self, vdi: VDI | str, mode: LeaseMode, holder: Holder, wait: float | None = None
    ) -> Lease:
        """Lease a VDI's chain; raises what Repository.lease raises, SR_NOT_ATTACHED, VDI_READONLY.

        VDI_READONLY is also the answer for a snapshot and for a hidden parent, VDI_INCOMPATIBLE_TYPE for a
        snapshot whose data is destroyed.
        """
        record = self.records.vdis.get(vdi) if isinstance(vdi, str) else vdi
        if record.type == CBT_METADATA:
            raise XenAPIError("VDI_INCOMPATIBLE_TYPE", record.ref, record.type)
        if mode is not LeaseMode.READ and (record.read_only or record.is_a_snapshot or not record.managed):
            raise XenAPIError("VDI_READONLY", record.ref)
        return await self.lease_data(self.repository(record.sr), record, mode, holder, wait)

    async def vdi_create(
        self,
        *,
        sr: str,
        virtual_size: int,
        name_label: str = "",
        name_description: str = "",
        type: str = "user",  # noqa: A002 - XenAPI's field
        sharable: bool = False,
        read_only: bool = False,
        other_config: Mapping[str, str] | None = None,
        xenstore_data: Mapping[str, str] | None = None,
        sm_config: Mapping[str, str] | None = None,
        tags: Sequence[str] = (),
    ) -> str:
        """Make an empty VDI; its reference.

        The size in bytes is rounded up to 2 MiB as SM does; with `sm_config` type=raw or image-format=raw the
        image is a raw file, rounded up to 512.
        Raises VDI_TOO_LARGE, SR_FULL, SR_NOT_ATTACHED, OPERATION_NOT_ALLOWED in a read-only SR, OSError,
        VDI_INCOMPATIBLE_TYPE for the type that only a snapshot gets whose data is destroyed.
        """
        if type == CBT_METADATA:
            raise XenAPIError("VDI_INCOMPATIBLE_TYPE", "", type)
        repository = self.repository(sr)
        if not repository.writable:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "the SR is attached read-only")
        image_format = _format_of(sm_config or {})
        size = _rounded(virtual_size, image_format)
        uuid = new_uuid()
        self._being_created.add(uuid)
        try:
            try:
                image = await repository.create_image(uuid, size, image_format)
            except OSError as error:
                if error.errno in _NO_SPACE:
                    total, used = await repository.space()
                    raise XenAPIError("SR_FULL", str(size), str(total - used)) from error
                if error.errno == errno.EFBIG:
                    raise XenAPIError("VDI_TOO_LARGE", str(size), "what its file system holds") from error
                raise
            vdi = VDI(
                ref=new_ref(),
                uuid=uuid,
                sr=sr,
                name_label=name_label,
                name_description=name_description,
                type=type,
                sharable=sharable,
                read_only=read_only,
                other_config=dict(other_config or {}),
                xenstore_data=dict(xenstore_data or {}),
                sm_config=dict(sm_config or {}),
                tags=tuple(tags),
            )
            with trio.CancelScope(shield=True):
                await self._add_new(repository, described(vdi, image, writable=True, written=False))
        finally:
            self._being_created.discard(uuid)
        return vdi.ref

    async def vdi_resize(
        self, ref: str, size: int, *, who: str = "XenAPI", task: str | None = None, wait: float | None = None
    ) -> None:
        """Make a VDI larger, for `who` under `task`; alone on it, and at once or not at all.

        `size` in bytes is rounded up as `vdi_create` does; what is new reads as zeroes. Raises
        VALUE_NOT_SUPPORTED for less than the VDI has, VDI_TOO_LARGE, SR_FULL, VDI_READONLY, VDI_IN_USE,
        OPERATION_NOT_ALLOWED, SR_NOT_ATTACHED, ImageError, OSError.
        """
        vdi = self.records.vdis.get(ref)
        repository = self.repository(vdi.sr)
        wanted = _rounded(size, vdi.image_format)
        if repository.writable:
            await repository.settle(vdi.uuid)
        lease = await self.lease(vdi, LeaseMode.WRITE, Holder(who, "resize", ref, task), wait)
        try:
            # Under the lease nobody changes the size.
            present = self.records.vdis.get(ref).virtual_size
            if size < present:
                reason = f"the VDI has {present} bytes and can only become larger"
                raise XenAPIError("VALUE_NOT_SUPPORTED", "size", str(size), reason)
            if wanted <= present:
                return
            for parent in lease.chain.nodes[1:]:
                image = repository.images.get(os.path.splitext(os.path.basename(parent.path))[0])
                if image is None or image.virtual_size > present:
                    # What its parent has beyond its end would come to light.
                    raise XenAPIError("OPERATION_NOT_ALLOWED", "the VDI stands on a larger one")
            await self._replace_by_larger(repository, lease, ref, wanted)
        finally:
            lease.release()
            with trio.CancelScope(shield=True):
                await lease.released()

    async def _replace_by_larger(self, repository: Repository, lease: Lease, ref: str, size: int) -> None:
        try:
            async with repository.staging(lease, whole=False, size=size) as staging:
                with trio.CancelScope(shield=True):
                    try:
                        await staging.commit()
                    finally:
                        # After a rename the disk is the larger one, even if making it durable failed.
                        if staging.committed is not None:
                            await self.vdi_changed(ref)
        except OSError as error:
            if error.errno in _NO_SPACE:
                total, used = await repository.space()
                raise XenAPIError("SR_FULL", str(size), str(total - used)) from error
            if error.errno == errno.EFBIG:
                raise XenAPIError("VDI_TOO_LARGE", str(size), "what its file system holds") from error
            raise

    async def vdi_destroy(
        self, ref: str, *, who: str = "XenAPI", task: str | None = None, wait: float | None = None
    ) -> None:
        """Remove a VDI and its image, for `who` under `task`.

        Raises VDI_IN_USE, OPERATION_NOT_ALLOWED (see Repository.destroy_image), VDI_READONLY in a read-only
        SR, SR_NOT_ATTACHED.
        """
        vdi = self.records.vdis.get(ref)
        repository = self.repository(vdi.sr)
        if not repository.writable:
            raise XenAPIError("VDI_READONLY", ref)
        if not vdi.managed:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "it is the hidden parent of other VDIs")
        holder = Holder(who, "destroy", ref, task)

        async def forget_changes(lease: Lease | None) -> None:
            if tracked:
                await self.forget_changes(vdi, lease, holder)

        async with self.logs_kept(ref) as tracked:
            try:
                await repository.destroy_image(vdi.uuid, holder, wait=wait, before=forget_changes)
            except XenAPIError as error:
                # A VDI without an image is gone already, if the SR is there to say so.
                if error.code != "VDI_MISSING" or not await repository.available():
                    raise
                # Somebody may have failed, or been killed, between removing it and making that durable.
                await repository.sync_names()
                await forget_changes(None)
            with trio.CancelScope(shield=True):
                await self._remove_vdi(ref)
                await self.refresh_sizes(vdi.sr)
        self.coalesce(vdi.sr)

    async def vdi_forget(self, ref: str) -> None:
        """Remove a VDI's record; the next scan finds its image again, without a name."""
        await self._remove_vdi(ref)

    async def vdi_changed(self, ref: str, content_id: str | None = None) -> None:
        """The VDI's content is new: another content id, and the sizes as they are now.

        `content_id` is that of the VDI that has the same bytes in the same blocks; else it gets its own.
        """
        vdi = self.records.vdis.get(ref)
        repository = self.repository(vdi.sr)
        with trio.CancelScope(shield=True):
            image = await repository.look_again(vdi.uuid)
            content_id = content_id or new_uuid()

            def changes(record: VDI) -> dict[str, object]:
                now = described(record, image, writable=repository.writable, written=False)
                return {
                    "content_id": content_id,
                    "sm_config": now.sm_config,
                    "virtual_size": now.virtual_size,
                    "physical_utilisation": now.physical_utilisation,
                }

            # Nobody may be sent the new bytes under the old id, also if the database can't be written.
            await self.records.vdis.record_fact(ref, changes)
            await self.refresh_sizes(vdi.sr)

    async def vdi_as_it_is(self, ref: str) -> VDI:
        """The record of a VDI that is leased for reading; if its file was changed from outside, by XenServer
        or another gateway, it gets a new content id first, as a scan would give it.

        Raises SR_NOT_ATTACHED, VDI_MISSING, ImageError, OSError.
        """
        if not await self.is_as_recorded(ref):
            await self.vdi_changed(ref)
        return self.records.vdis.get(ref)

    async def is_as_recorded(self, ref: str) -> bool:
        """Whether the file under the VDI's name is the one that its record speaks of, as it was then.

        True also while somebody here replaces it or writes to it: the record follows. Raises SR_NOT_ATTACHED,
        VDI_MISSING, OSError.
        """
        while True:
            vdi = self.records.vdis.get(ref)
            path = self.repository(vdi.sr).image_path(vdi.uuid)
            ours = any(mode is not LeaseMode.READ for mode in self.leases.modes_for(ref))
            try:
                stamp = FileStamp.of(await in_thread(os.stat, path))
            except FileNotFoundError:
                raise XenAPIError("VDI_MISSING") from None
            recorded = vdi.sm_config.get(STAMP_KEY)
            if ours or recorded == str(stamp):
                return True
            if self.records.vdis.get(ref).sm_config.get(STAMP_KEY) == recorded:
                return False

    async def _remove_vdi(self, ref: str) -> None:
        for snapshot in self.records.snapshots_of_vdi(ref):
            await self.records.vdis.change(snapshot.ref, snapshot_of=NULL_REF)
        await self.records.vdis.remove(ref)


def _format_of(sm_config: Mapping[str, str]) -> ImageFormat:
    """`type` is SM's key (raw), `image-format` XCP-ng's."""
    wanted = sm_config.get("image-format", sm_config.get("type", "vhd")).lower()
    if wanted == "raw":
        return "raw"
    if wanted in ("vhd", "user", ""):
        return "vhd"
    raise XenAPIError("VALUE_NOT_SUPPORTED", "sm_config:image-format", wanted, "it must be vhd or raw")


def _rounded(size: int, image_format: ImageFormat) -> int:
    maximum = MAX_VIRTUAL_SIZE if image_format == "vhd" else MAX_RAW_SIZE
    if size < 0:
        raise XenAPIError("VALUE_NOT_SUPPORTED", "virtual_size", str(size), "a size is not negative")
    rounded = round_up_virtual_size(size) if image_format == "vhd" else max(SECTOR, round_up_to_sector(size))
    if rounded > maximum:
        raise XenAPIError("VDI_TOO_LARGE", str(size), str(maximum))
    return rounded
