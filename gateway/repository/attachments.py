"""The SRs that this gateway has attached: plugged, scanned, unplugged, and their records kept true.

A PBD of this host says where an SR is (`device_config` {"location": path, "writable": "true" | "false"});
plugging it attaches the directory. PBDs of other hosts are only records.

The trap: a share that is not mounted looks like an SR that lost every image. So an SR whose directory is
missing or unmarked is unavailable, and its records stay as they are until it is back.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog
import trio

from gateway.core.database import DatabaseFailed
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.core.records import PBD, VDI, Records
from gateway.images.files import FILES, FileCalls
from gateway.repository.reconcile import Reconciled, reconcile
from gateway.repository.records_copies import RecordsCopies
from gateway.repository.records_file import RecordsCopy, RecordsUnreadable
from gateway.repository.repository import Repository
from gateway.repository.scan import ScanResult

if TYPE_CHECKING:
    from gateway.repository.coalescers import Coalescers

log = structlog.get_logger("gateway.repository")

# In SR.sm_config once we have put our marker into the directory: from then on its absence means something.
MARKED_KEY: Final = "gateway-marker"
# In PBD.other_config: was plugged, and shall be again as soon as the directory is there.
PLUG_KEY: Final = "gateway-plug-at-start"


def is_writable(pbd: PBD) -> bool:
    """Whether this PBD attaches the SR writable; it has to say so."""
    return pbd.device_config.get("writable", "false").lower() == "true"


class Attachments:
    """Every SR that this gateway knows, and those it has attached. `who` is told to other gateways."""

    def __init__(
        self, records: Records, leases: Leases, events: Events, *, who: str, files: FileCalls = FILES
    ) -> None:
        self.records: Final = records
        self.leases: Final = leases
        self._who = who
        self._files = files
        self._attached: dict[str, Repository] = {}
        self._copies = RecordsCopies(records, events, self._attached)
        # None: nothing is coalesced.
        self._coalescers: Coalescers | None = None
        # One SR is plugged, unplugged or scanned by one task at a time.
        self._locks: dict[str, trio.Lock] = {}
        # And so with an SR's logs of changed blocks; these come before any lease.
        self._log_locks: dict[str, trio.Lock] = {}
        # VDIs whose file is there before their record.
        self._being_created: set[str] = set()
        # Those of them that are being filled, by uuid: in which SR, and for whom.
        self._being_filled: dict[str, tuple[str, Holder]] = {}

    async def pbd_plug(self, ref: str) -> None:
        """Attach the SR to the host, and bring its records up to date; nothing if it is attached.

        What is wrong with single images is logged, and said by `sr_scan`. Raises SR_BACKEND_FAILURE_47 when
        the directory is not there or not this SR, SR_BACKEND_FAILURE_16 when another gateway owns it.
        """
        pbd = self.records.pbds.get(ref)
        if pbd.host != self.records.this_host.ref:
            await self.records.pbds.change(ref, currently_attached=True)
            return
        async with self._lock(pbd.sr):
            if pbd.sr in self._attached:
                return
            sr = self.records.srs.get(pbd.sr)
            writable = is_writable(pbd)
            repository = await Repository.attach(
                pbd.device_config["location"],
                self.leases,
                writable=writable,
                who=self._who,
                uuid=sr.uuid,
                introduce=None if MARKED_KEY in sr.sm_config else sr.uuid,
                known_images=any(not vdi.missing for vdi in self.records.vdis_of_sr(sr.ref)),
                files=self._files,
            )
            try:
                for name in repository.swept:
                    log.info("left over from an interrupted transfer, removed", sr=sr.uuid, file=name)
                result = await repository.scan()
                copy = await read_copy(repository)
                # What comes later is believed first.
                kept = (*repository.intended, *(copy.vdis if copy is not None else ()))
                problems = await self._apply(sr.ref, repository, result, kept)
                await repository.forget_intended()
            except BaseException:
                await repository.detach()
                raise
            for problem in problems:
                log.warning("an image cannot be used", sr=sr.uuid, problem=problem)
            for name in result.strange:
                log.info("no image, left alone", sr=sr.uuid, file=name)
            with trio.CancelScope(shield=True):
                self._enter(sr.ref, repository)
                if writable:
                    sm_config = {**self.records.srs.get(sr.ref).sm_config, MARKED_KEY: "true"}
                    await self.records.srs.change(sr.ref, sm_config=sm_config)
                other_config = {key: value for key, value in pbd.other_config.items() if key != PLUG_KEY}
                await self.records.pbds.change(ref, currently_attached=True, other_config=other_config)
                await self.refresh_sizes(sr.ref)

    async def pbd_unplug(self, ref: str) -> None:
        """Detach the SR from the host. Raises VDI_IN_USE while one of its VDIs is."""
        pbd = self.records.pbds.get(ref)
        if pbd.host != self.records.this_host.ref:
            await self.records.pbds.change(ref, currently_attached=False)
            return
        async with self._lock(pbd.sr):
            if self._coalescers is not None:
                await self._coalescers.end(pbd.sr)
            try:
                self._require_unused(pbd.sr)
                await self._hand_over(pbd.sr)
                self._require_unused(pbd.sr)
                with trio.CancelScope(shield=True):
                    await self._detach(pbd.sr)
                    other_config = {key: value for key, value in pbd.other_config.items() if key != PLUG_KEY}
                    await self.records.pbds.change(ref, currently_attached=False, other_config=other_config)
            except BaseException:
                if pbd.sr in self._attached:
                    self._enter(pbd.sr, self._attached[pbd.sr])
                raise

    async def _hand_over(self, sr: str) -> None:
        """What others will need to find in an SR that is about to be detached; nobody uses it now."""

    async def sr_scan(self, sr: str) -> ScanResult:
        """Look at every file of an SR and bring the records up to date.

        After that, raises SR_BACKEND_FAILURE_40 with a sentence for each image that cannot be used, among
        them one whose VDI is in another SR. Strange names are no error. Raises SR_NOT_ATTACHED,
        SR_BACKEND_FAILURE_47 when the directory is not there: then no record changes.
        """
        try:
            result, problems = await self.reconcile(sr)
        finally:
            self.coalesce(sr)
        if problems:
            raise XenAPIError(
                "SR_BACKEND_FAILURE_40", "", f"The SR scan failed [opterr={'; '.join(problems)}]", ""
            )
        return result

    async def reconcile(self, sr: str) -> tuple[ScanResult, list[str]]:
        """What a scan finds is written to the records; also what is wrong, a sentence each."""
        self.records.srs.get(sr)
        async with self._lock(sr):
            repository = self.repository(sr)
            result = await repository.scan()
            problems = await self._apply(sr, repository, result)
            await self.refresh_sizes(sr)
        return result, problems

    def repository(self, sr: str) -> Repository:
        """The attached SR. Raises SR_NOT_ATTACHED."""
        repository = self._attached.get(sr)
        if repository is None:
            raise XenAPIError("SR_NOT_ATTACHED", sr)
        return repository

    async def attach_all(self) -> None:
        """Attach what was attached when the gateway stopped. What cannot be is unplugged, and logged."""
        for pbd in self.records.pbds_of_host(self.records.this_host.ref):
            if not pbd.currently_attached and PLUG_KEY not in pbd.other_config:
                continue
            try:
                await self.pbd_plug(pbd.ref)
            except (XenAPIError, OSError) as error:
                sr = self.records.srs.get(pbd.sr)
                log.warning("the SR is unavailable", sr=sr.uuid, name=sr.name_label, why=str(error))
                await self.records.pbds.change(
                    pbd.ref,
                    currently_attached=False,
                    other_config={**pbd.other_config, PLUG_KEY: "true"},
                )

    async def detach_all(self) -> None:
        """Write what is left to write and let go of every SR; the PBDs stay plugged for the next start."""
        with trio.CancelScope(shield=True):
            for sr in list(self._attached):
                await self._detach(sr)

    def coalesce(self, sr: str) -> None:
        """There may be something to coalesce in an SR, or remove."""
        if self._coalescers is not None:
            self._coalescers.trigger(sr)

    async def sr_coalesce(self, sr: str) -> None:
        """Coalesce an SR until all that is left to do waits for people, or failed.

        Raises SR_NOT_ATTACHED, OPERATION_NOT_ALLOWED where nothing is coalesced (read-only, paused, switched
        off), SR_BACKEND_FAILURE_40 with what is wrong with images: then nothing is done.
        """
        self.records.srs.get(sr)
        self.repository(sr)
        if self._coalescers is None:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "nothing is coalesced here")
        await self._coalescers.of(sr).coalesce()

    def sr_coalesce_state(self, sr: str) -> dict[str, str]:
        """What becomes of the nodes of an SR: see Coalescer.state; empty if it isn't coalesced here."""
        self.records.srs.get(sr)
        return {} if self._coalescers is None else self._coalescers.state(sr)

    async def refresh_sizes(self, sr: str) -> None:
        """Bring the sizes of an attached SR up to date. A failure is logged: what changed them is done."""
        try:
            total, used = await self.repository(sr).space()
            allocated = sum(vdi.virtual_size for vdi in self.records.vdis_of_sr(sr))
            await self.records.srs.change(
                sr, physical_size=total, physical_utilisation=used, virtual_allocation=allocated
            )
        except (OSError, DatabaseFailed) as error:
            log.warning("the size of the SR is not known", sr=sr, why=str(error))

    def is_written(self, vdi: VDI) -> bool:
        """Whether somebody here writes to the VDI in place now."""
        return LeaseMode.WRITE in self.leases.modes_for(vdi.ref)

    async def _apply(
        self, sr: str, repository: Repository, scan: ScanResult, copy: Sequence[VDI] = ()
    ) -> list[str]:
        """Write to the records what a scan found, with what else is known; what is wrong, a sentence each."""
        while True:
            # What was created or destroyed since the scan is in the repository's own view already. What is
            # being created has a record at last, and then it must not seem to have no image.
            known = {vdi.uuid for vdi in self.records.vdis_of_sr(sr)}
            images = {
                uuid: image
                for uuid, image in repository.images.items()
                if uuid in known or uuid not in self._being_created
            }
            now = replace(scan, images=images)
            found = self._reconcile(sr, repository, now, copy)
            try:
                with trio.CancelScope(shield=True):
                    await self.records.vdis.change_all(found.change)
                    await self.records.vdis.add_all(found.add)
            except XenAPIError as error:
                # One of them was destroyed, or came from elsewhere, a moment ago: look again.
                if error.code not in ("HANDLE_INVALID", "DB_UNIQUENESS_CONSTRAINT_VIOLATION"):
                    raise
                continue
            return found.problems

    def _reconcile(
        self, sr: str, repository: Repository, scan: ScanResult, copy: Sequence[VDI]
    ) -> Reconciled:
        others = {vdi.uuid: vdi.sr for vdi in self.records.vdis.all() if vdi.sr != sr}
        return reconcile(
            self.records.srs.get(sr),
            scan,
            self.records.vdis_of_sr(sr),
            copy,
            writable=repository.writable,
            elsewhere=lambda uuid: self.records.srs.get(others[uuid]) if uuid in others else None,
            is_written=self.is_written,
            ref_is_free=lambda ref: ref not in self.records.vdis,
        )

    def _require_unused(self, sr: str) -> None:
        for vdi in self.records.vdis_of_sr(sr):
            for holder in self.leases.holders_for(vdi.ref):
                raise XenAPIError("VDI_IN_USE", vdi.ref, str(holder))
        for used, holder in self._being_filled.values():
            if used == sr:
                raise XenAPIError("VDI_IN_USE", holder.vdi, str(holder))

    def _enter(self, sr: str, repository: Repository) -> None:
        self._attached[sr] = repository
        if self._coalescers is not None:
            self._coalescers.begin(sr, repository)

    async def _detach(self, sr: str) -> None:
        if self._coalescers is not None:
            await self._coalescers.end(sr)
        await self._copies.write(sr)
        self._copies.forget(sr)
        repository = self._attached.pop(sr, None)
        if repository is not None:
            await repository.detach()

    def _lock(self, sr: str) -> trio.Lock:
        return self._locks.setdefault(sr, trio.Lock())


async def read_copy(repository: Repository) -> RecordsCopy | None:
    try:
        return await repository.read_records()
    except RecordsUnreadable as error:
        log.warning("the copy of the records cannot be used", why=str(error))
        return None
