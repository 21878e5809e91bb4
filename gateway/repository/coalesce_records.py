"""What a coalesce changes in the records of its SR: nodes go, others stand elsewhere, and no content is new.

The trap: a relinked file has another stamp, and what isn't said to have the same content gets a new content
id at the next scan, as after a change from outside. So the ids are looked up before, and written after.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Final

from gateway.core.errors import XenAPIError
from gateway.core.records import VDI, Records
from gateway.core.refs import NULL_REF, new_uuid
from gateway.repository.reconcile import CBT_METADATA, PARENT_KEY, described
from gateway.repository.records_file import STAMP_KEY
from gateway.repository.repository import Repository
from gateway.repository.scan import FileStamp, ScannedImage


class CoalesceRecords:
    """The records of one SR, by uuid. `refresh_sizes` brings the SR's own sizes up to date."""

    def __init__(
        self,
        sr: str,
        records: Records,
        repository: Repository,
        refresh_sizes: Callable[[str], Awaitable[None]],
    ) -> None:
        self.sr: Final = sr
        self._records = records
        self._repository = repository
        self._refresh_sizes = refresh_sizes

    def find(self, uuid: str) -> VDI | None:
        """The record of a VDI of this SR, if there is one."""
        try:
            vdi = self._records.vdis.by_uuid(uuid)
        except XenAPIError:
            return None
        return vdi if vdi.sr == self.sr else None

    def ref(self, uuid: str) -> str:
        """The reference of a VDI, or the null reference."""
        vdi = self.find(uuid)
        return NULL_REF if vdi is None else vdi.ref

    def emptied(self) -> frozenset[str]:
        """The uuids of snapshots whose data is destroyed: what is left of their images is needed."""
        return frozenset(vdi.uuid for vdi in self._records.vdis_of_sr(self.sr) if vdi.type == CBT_METADATA)

    def content_id(self, uuid: str) -> str:
        """What names the bytes of a VDI; empty without a record."""
        vdi = self.find(uuid)
        return "" if vdi is None else vdi.content_id

    def content_ids(self, stamps: Mapping[str, FileStamp]) -> dict[str, str]:
        """The content ids of images with these stamps: new ones for those that were changed from outside."""
        ids: dict[str, str] = {}
        for uuid, stamp in stamps.items():
            vdi = self.find(uuid)
            if vdi is not None:
                unchanged = vdi.sm_config.get(STAMP_KEY) == str(stamp)
                ids[uuid] = vdi.content_id if unchanged else new_uuid()
        return ids

    def are_behind(self) -> bool:
        """Whether images came or went, or stand on others than the records say, as recoveries leave it."""
        images = self._repository.images
        children = {image.parent for image in images.values()}
        emptied = self.emptied()
        seen = {
            uuid: image.parent
            for uuid, image in images.items()
            if image.error is None and (not image.hidden or uuid in children) and uuid not in emptied
        }
        known = {
            vdi.uuid: vdi.sm_config.get(PARENT_KEY)
            for vdi in self._records.vdis_of_sr(self.sr)
            if not vdi.missing and vdi.uuid not in emptied
        }
        for uuid, image in images.items():
            if uuid not in seen and (image.error is not None or image.hidden):
                known.pop(uuid, None)
        return seen != known

    async def chain_changed(self, gone: str, content_ids: Mapping[str, str]) -> None:
        """Write down which images stand on what now, with these contents, and that one is gone, if it is."""
        for uuid, content_id in content_ids.items():
            image = self._repository.images.get(uuid)
            if image is not None:
                await self._change(uuid, image, content_id)
        await self.remove(gone)
        await self.refresh_sizes()

    async def refresh_sizes(self) -> None:
        """Bring the sizes of the SR up to date."""
        await self._refresh_sizes(self.sr)

    async def remove(self, uuid: str) -> None:
        """Remove the record of an image, if that is gone."""
        vdi = self.find(uuid)
        if vdi is None or uuid in self._repository.images:
            return
        for snapshot in self._records.snapshots_of_vdi(vdi.ref):
            await self._records.vdis.change(snapshot.ref, snapshot_of=NULL_REF)
        await self._records.vdis.remove(vdi.ref)

    async def remove_lost_nodes(self) -> None:
        """Remove the records of hidden images that are gone; nobody but a coalesce has to do with those.

        The caller has scanned and found every image with its parent, so nothing stands on them.
        """
        for vdi in self._records.vdis_of_sr(self.sr):
            if vdi.missing and not vdi.managed:
                await self.remove(vdi.uuid)

    async def renew_content(self, uuid: str) -> None:
        """Other bytes are about to come into a node, which whoever reads it by itself has to notice."""
        vdi = self.find(uuid)
        if vdi is not None:
            await self._records.vdis.change(vdi.ref, content_id=new_uuid())

    async def look_again(self, uuid: str) -> None:
        """Write down what a node is now that was made larger, or into which something was copied."""
        image = await self._repository.look_again(uuid)
        await self._change(uuid, image, self.content_id(uuid))
        await self._refresh_sizes(self.sr)

    async def _change(self, uuid: str, image: ScannedImage, content_id: str) -> None:
        vdi = self.find(uuid)
        if vdi is None:
            return

        def changes(record: VDI) -> dict[str, object]:
            known = {**record.sm_config, STAMP_KEY: str(image.stamp)}
            record = replace(record, content_id=content_id, sm_config=known)
            now = described(record, image, writable=True, written=False)
            return {
                "content_id": now.content_id,
                "sm_config": now.sm_config,
                "virtual_size": now.virtual_size,
                "physical_utilisation": now.physical_utilisation,
                "managed": now.managed,
            }

        await self._records.vdis.edit(vdi.ref, changes)
