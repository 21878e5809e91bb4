"""SRs and PBDs coming and going: made, introduced, forgotten, destroyed.

Nothing here removes an image. The trap: the directory of an SR that is to be made may be somebody else's
data, and that of one that is to be destroyed may have become so; both have to be empty.
"""

import errno
import os
from typing import Final

import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder
from gateway.core.records import PBD, SR
from gateway.core.refs import NULL_REF, is_uuid, new_ref, new_uuid
from gateway.repository.attachments import MARKED_KEY, Attachments, is_writable, read_copy
from gateway.repository.coalesce_plan import garbage
from gateway.repository.reconcile import CBT_METADATA
from gateway.repository.repository import Repository

# What a wrong path leads to: the caller's mistake, not the storage's.
_WRONG_PLACE: Final = frozenset(
    {
        errno.ENOTEMPTY,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    }
)


class SRLifecycle(Attachments):
    """The part of the inventory that changes which SRs there are."""

    async def sr_create(
        self,
        name_label: str,
        path: str,
        *,
        name_description: str = "",
        content_type: str = "user",
        shared: bool = False,
        other_config: dict[str, str] | None = None,
        sm_config: dict[str, str] | None = None,
    ) -> str:
        """Make an SR in an empty or absent directory and attach it writable; its reference.

        Raises OPERATION_NOT_ALLOWED if there is something in the directory or it can't be made,
        SR_BACKEND_FAILURE_*, OSError.
        """
        location = _normalised(path)
        sr = SR(
            ref=new_ref(),
            uuid=new_uuid(),
            name_label=name_label,
            name_description=name_description,
            content_type=content_type,
            shared=shared,
            other_config=other_config or {},
            sm_config={**(sm_config or {}), MARKED_KEY: "true"},
        )
        self._require_free_location(location, sr.ref)
        try:
            repository = await Repository.create(
                location, sr.uuid, self.leases, who=self._who, files=self._files
            )
        except OSError as error:
            if error.errno not in _WRONG_PLACE:
                raise
            raise XenAPIError("OPERATION_NOT_ALLOWED", f"{location}: {error.strerror}") from error
        with trio.CancelScope(shield=True):
            await self.records.srs.add(sr)
            await self.records.pbds.add(
                PBD(
                    ref=new_ref(),
                    uuid=new_uuid(),
                    host=self.records.this_host.ref,
                    sr=sr.ref,
                    device_config={"location": location, "writable": "true"},
                    currently_attached=True,
                )
            )
            self._enter(sr.ref, repository)
            await self._copies.write(sr.ref)
            await self.refresh_sizes(sr.ref)
        return sr.ref

    async def sr_introduce(
        self,
        uuid: str,
        name_label: str,
        *,
        name_description: str = "",
        content_type: str = "user",
        shared: bool = False,
        sm_config: dict[str, str] | None = None,
    ) -> str:
        """Make an SR known that exists somewhere, without attaching it; its reference."""
        if not is_uuid(uuid):
            raise XenAPIError("UUID_INVALID", "SR", uuid)
        sr = SR(
            ref=new_ref(),
            uuid=uuid.lower(),
            name_label=name_label,
            name_description=name_description,
            content_type=content_type,
            shared=shared,
            sm_config=sm_config or {},
        )
        await self.records.srs.add(sr)
        return sr.ref

    async def sr_attach(self, path: str, *, writable: bool = False, name_label: str = "") -> str:
        """Introduce the SR in a directory if it is new here, and attach it; its reference.

        Raises what `pbd_plug` raises; then nothing that was not known before is.
        """
        location = _normalised(path)
        device_config = {"location": location, "writable": "true" if writable else "false"}
        for pbd in self.records.pbds_of_host(self.records.this_host.ref):
            if pbd.device_config.get("location") == location:
                if pbd.currently_attached and is_writable(pbd) is not writable:
                    raise XenAPIError("SR_HAS_PBD", pbd.sr)
                await self.records.pbds.change(pbd.ref, device_config=device_config)
                await self.pbd_plug(pbd.ref)
                return pbd.sr
        # Looked at read-only first, to learn which SR it is.
        repository = await Repository.attach(location, self.leases, writable=False, who=self._who)
        copy = await read_copy(repository)
        named = _last_part(location).lower()
        uuid = repository.uuid or (copy.sr.uuid if copy else named if is_uuid(named) else new_uuid())
        known = [sr for sr in self.records.srs.all() if sr.uuid == uuid]
        if known:
            sr = known[0].ref
        else:
            sr = await self.sr_introduce(uuid, name_label or _last_part(location))
            if copy is not None:
                kept = {"name_description": copy.sr.name_description, "other_config": copy.sr.other_config}
                await self.records.srs.change(sr, name_label=name_label or copy.sr.name_label, **kept)
        pbd_ref = await self.pbd_create(self.records.this_host.ref, sr, device_config)
        try:
            await self.pbd_plug(pbd_ref)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.records.pbds.remove(pbd_ref)
                if not known:
                    await self.records.srs.remove(sr)
            raise
        return sr

    async def sr_forget(self, sr: str) -> None:
        """Forget an SR, its VDIs and its PBDs; its files stay. Raises SR_HAS_PBD while it is attached."""
        self.records.srs.get(sr)
        async with self._lock(sr):
            self._require_unplugged(sr)
            await self._remove_records(sr)

    async def sr_destroy(self, sr: str) -> None:
        """Forget an SR and what we keep in its directory; hidden images that no VDI stands on go with it.

        Raises SR_HAS_PBD, SR_HAS_NO_PBDS, SR_NOT_EMPTY, VDI_IN_USE.
        """
        record = self.records.srs.get(sr)
        async with self._lock(sr):
            self._require_unplugged(sr)
            # What is left of a snapshot whose data is destroyed is a VDI, to SM too, and a backup needs it.
            if any(vdi.type == CBT_METADATA for vdi in self.records.vdis_of_sr(sr)):
                raise XenAPIError("SR_NOT_EMPTY", sr)
            here = [pbd for pbd in self.records.pbds_of_sr(sr) if pbd.host == self.records.this_host.ref]
            if not here:
                raise XenAPIError("SR_HAS_NO_PBDS", sr)
            location = here[0].device_config["location"]
            repository = await Repository.attach(
                location, self.leases, writable=True, who=self._who, uuid=record.uuid, files=self._files
            )
            try:
                found = await repository.scan()
                holder = Holder(self._who, "destroy", NULL_REF)
                unneeded = garbage(found)
                # One image that is needed, or may be, keeps the SR; then the others stay with it.
                if not (found.images.keys() - set(unneeded) or found.journals or found.strange):
                    for uuid in unneeded:
                        await repository.destroy_image(uuid, holder)
                    found = await repository.scan()
                if found.images or found.journals or found.strange:
                    raise XenAPIError("SR_NOT_EMPTY", sr)
                with trio.CancelScope(shield=True):
                    await repository.remove_service_files()
                    await self._remove_records(sr)
            finally:
                await repository.detach()

    async def pbd_create(
        self,
        host: str,
        sr: str,
        device_config: dict[str, str],
        other_config: dict[str, str] | None = None,
    ) -> str:
        """Say how a host reaches an SR, without attaching it; the PBD's reference."""
        self.records.hosts.get(host)
        self.records.srs.get(sr)
        if host == self.records.this_host.ref:
            location = device_config.get("location", "")
            if not os.path.isabs(location):
                reason = "it must name a directory by its absolute path"
                raise XenAPIError("VALUE_NOT_SUPPORTED", "device_config:location", location, reason)
            self._require_free_location(location, sr)
        for pbd in self.records.pbds_of_sr(sr):
            if pbd.host == host:
                raise XenAPIError(
                    "OPERATION_NOT_ALLOWED", f"the SR has the PBD {pbd.uuid} on this host already"
                )
        pbd = PBD(
            ref=new_ref(),
            uuid=new_uuid(),
            host=host,
            sr=sr,
            device_config=dict(device_config),
            other_config=dict(other_config or {}),
        )
        await self.records.pbds.add(pbd)
        return pbd.ref

    async def pbd_destroy(self, ref: str) -> None:
        """Forget how a host reaches an SR. Raises SR_HAS_PBD while it is plugged."""
        pbd = self.records.pbds.get(ref)
        if pbd.currently_attached:
            raise XenAPIError("SR_HAS_PBD", pbd.sr)
        await self.records.pbds.remove(ref)

    async def _remove_records(self, sr: str) -> None:
        with trio.CancelScope(shield=True):
            await self.records.vdis.remove_all([vdi.ref for vdi in self.records.vdis_of_sr(sr)])
            await self.records.pbds.remove_all([pbd.ref for pbd in self.records.pbds_of_sr(sr)])
            if self.records.pool.default_sr == sr:
                await self.records.pools.change(self.records.pool.ref, default_sr=NULL_REF)
            await self.records.srs.remove(sr)

    def _require_unplugged(self, sr: str) -> None:
        if any(pbd.currently_attached for pbd in self.records.pbds_of_sr(sr)):
            raise XenAPIError("SR_HAS_PBD", sr)

    def _require_free_location(self, location: str, sr: str) -> None:
        wanted = _normalised(location)
        for pbd in self.records.pbds_of_host(self.records.this_host.ref):
            if pbd.sr != sr and _normalised(pbd.device_config.get("location", "")) == wanted:
                other = self.records.srs.get(pbd.sr)
                raise XenAPIError(
                    "OPERATION_NOT_ALLOWED", f"{location} is the SR {other.uuid} ({other.name_label}) already"
                )


def _normalised(path: str) -> str:
    """The absolute path, without asking the file system, which may hang. Links are not followed: that one
    directory is not attached twice is the owner lock's business.
    """
    return os.path.abspath(path)


def _last_part(path: str) -> str:
    return os.path.basename(path)
