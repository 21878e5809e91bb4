"""Coalesces one attached SR: as long as there is something to do and people leave a chain alone.

A plan is made from a scan, its garbage removed, its candidates given turns in order; after each that was done
the plan is made anew. While all that is left waits for people, so does this. Whoever changes the switches in
the SR's other_config stops a copy at its next block.

The trap: nothing here may run on for nothing. Every turn of a loop has got something done, or waits for a
lease to end, for somebody who asks, or for time to pass; and a candidate that failed is skipped until then.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog
import trio

from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.leases import Holder, LeaseMode, LeaseRefused, Leases
from gateway.core.limits import Limits
from gateway.core.records import SR, Records
from gateway.core.tasks import Tasks
from gateway.core.threads import in_thread
from gateway.images.errors import ImageError
from gateway.images.vhd.merge import extra_space
from gateway.repository.coalesce_plan import Candidate, Plan, Refusal, Switches, child_size, make_plan
from gateway.repository.coalesce_records import CoalesceRecords
from gateway.repository.coalesce_turns import OPERATION, WHO, Turns
from gateway.repository.coalesce_work import end_leftovers
from gateway.repository.relink_steps import opened
from gateway.repository.repository import Repository
from gateway.repository.scan import ScannedImage

log = structlog.get_logger("gateway.repository")

PAUSED_KEY: Final = "gateway-coalesce-paused"
"""In SR.other_config; "true" while nothing is to be coalesced in the SR."""

_SWITCHES: Final = (PAUSED_KEY, "gc", "coalesce", "leaf-coalesce")
# Of an SR's space, from where on a coalesce may go before people for once.
_FULL: Final = 0.95


def is_paused(sr: SR) -> bool:
    """Whether somebody has paused coalescing in the SR."""
    return sr.other_config.get(PAUSED_KEY, "").lower() == "true"


class Coalescer:
    """One attached writable SR; `run` does the work.

    `refresh_sizes` brings the SR's record up to date, `reconcile` those of its VDIs.
    """

    def __init__(
        self,
        sr: str,
        repository: Repository,
        *,
        records: Records,
        leases: Leases,
        tasks: Tasks,
        limits: Limits,
        refresh_sizes: Callable[[str], Awaitable[None]],
        reconcile: Callable[[str], Awaitable[object]],
        drop_emptied: Callable[[str], Awaitable[None]],
    ) -> None:
        self.sr: Final = sr
        self._repository = repository
        self._srs = records.srs
        self._uuid = records.srs.get(sr).uuid
        self._records = CoalesceRecords(sr, records, repository, refresh_sizes)
        self._reconcile = reconcile
        self._drop_emptied = drop_emptied
        self._leases = leases
        self._tasks = tasks
        self._limits = limits
        self._turns = Turns(repository, self._records, tasks, limits, sr_uuid=self._uuid, wake=self._wake)
        self._scope = trio.CancelScope()
        self._ending = XenAPIError("TASK_INTERRUPTED")
        self._is_running = False
        self._ended = trio.Event()
        self._plan = Plan()
        self._problem: XenAPIError | None = None
        # Requests are counted, so that each is answered by a plan that was made after it.
        self._asked = 0
        self._answered = 0
        self._something = trio.Event()
        self._waiting_for_answers = trio.lowlevel.ParkingLot()
        self._switches = self._planned_for = self._read_switches()

    # What others ask

    def trigger(self) -> None:
        """Look for work now, also at what failed before."""
        self._asked += 1
        self._turns.postponed.asked()
        self._something.set()

    async def answered(self) -> None:
        """Wait until all that could be done of what was asked for so far is done."""
        asked = self._asked
        await trio.lowlevel.checkpoint()
        while self._answered < asked and not self._ended.is_set():
            await self._waiting_for_answers.park()

    async def coalesce(self) -> None:
        """Look for work now, and wait until all that is left of it waits for people, or failed.

        Raises OPERATION_NOT_ALLOWED where it is paused or switched off, SR_BACKEND_FAILURE_40 for images
        that cannot be used, SR_NOT_ATTACHED when the SR is detached meanwhile.
        """
        record = self._srs.get(self.sr)
        if is_paused(record):
            raise XenAPIError("OPERATION_NOT_ALLOWED", "coalescing is paused in this SR")
        if not Switches.of(record.other_config).gc:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "the SR's other_config gc is false")
        self.trigger()
        await self.answered()
        if self._ended.is_set():
            raise XenAPIError("SR_NOT_ATTACHED", self.sr)
        if self._problem is not None:
            raise XenAPIError(*self._problem.error_info)
        if self._plan.problems:
            problems = "; ".join(self._plan.problems)
            raise XenAPIError("SR_BACKEND_FAILURE_40", "", f"The SR scan failed [opterr={problems}]", "")

    def switches_may_have_changed(self) -> None:
        """The SR's record is another: what runs stops if it is switched off, what was paused begins."""
        switches = self._read_switches()
        if switches != self._switches:
            self._switches = switches
            self._something.set()
            self._turns.interrupt()

    async def stop(self, why: XenAPIError) -> None:
        """End, at the next block; tasks end with `why`. What was copied is made durable."""
        self._ending = why
        self._scope.cancel()
        if self._is_running:
            with trio.CancelScope(shield=True):
                await self._ended.wait()

    def state(self) -> dict[str, str]:
        """What becomes of which node, in words by uuid; under the SR's uuid what concerns all of it."""
        texts = {refusal.uuid: f"is not merged: {refusal.reason}" for refusal in self._plan.refused}
        texts |= {candidate.child: self._turns.text(candidate) for candidate in self._plan.candidates}
        if is_paused(self._srs.get(self.sr)):
            texts[self._uuid] = "coalescing is paused"
        elif self._problem is not None:
            texts[self._uuid] = f"nothing is coalesced: {self._problem.message}"
        elif self._plan.problems:
            problems = "; ".join(self._plan.problems)
            texts[self._uuid] = f"nothing is coalesced until this is resolved: {problems}"
        return texts

    def _wake(self) -> None:
        self._something.set()

    def _read_switches(self) -> tuple[str | None, ...]:
        if self.sr not in self._srs:
            return ()
        other_config = self._srs.get(self.sr).other_config
        return tuple(other_config.get(key) for key in _SWITCHES)

    # The loops

    async def run(self) -> None:
        """Coalesce until `stop` or cancellation. What goes wrong here is logged, and tried again later."""
        self._is_running = True
        try:
            with self._scope:
                while True:
                    try:
                        await self._run_passes()
                    except Exception as error:
                        # Nobody else may suffer from it; the next request begins anew.
                        log.exception("coalescing failed unexpectedly", sr=self._uuid)
                        self._problem = as_xenapi_error(error)
                        self._answer(self._asked)
                        await self._rest()
        finally:
            self._is_running = False
            self._ended.set()
            self._waiting_for_answers.unpark_all()

    async def _run_passes(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._turns.tell)
            await end_leftovers(self._tasks, self._uuid)
            try:
                while True:
                    await self._pass(nursery)
                    await self._rest()
            except Exception as error:
                self._turns.end(as_xenapi_error(error))
                raise
            finally:
                self._turns.end(self._ending)

    async def _rest(self) -> None:
        with trio.move_on_after(self._limits.coalesce_interval):
            await self._something.wait()

    async def _pass(self, nursery: trio.Nursery) -> None:
        """Until nothing is left to do."""
        while True:
            self._something = trio.Event()
            asked = self._asked
            try:
                self._plan = await self._make_plan()
                self._problem = None
            except (XenAPIError, OSError) as error:
                # The directory is not there, for instance.
                self._plan, self._problem = Plan(), as_xenapi_error(error)
                log.warning("the SR cannot be coalesced", sr=self._uuid, why=str(error))
            await self._let_go()
            if await self._collect_garbage():
                continue
            if await self._work_through(asked, nursery):
                self._answer(asked)
                return

    async def _work_through(self, asked: int, nursery: trio.Nursery) -> bool:
        """Give turns to the candidates of the plan; False as soon as there should be a new one."""
        planned = trio.current_time()
        while True:
            releases = self._leases.releases
            waiting: list[Candidate] = []
            for candidate in self._plan.candidates:
                if self._read_switches() != self._planned_for:
                    return False
                if not self._turns.postponed.rest(candidate) and (
                    await self._turns.attempt(candidate, nursery) or self._something.is_set()
                ):
                    return False
                waiting.append(candidate)
            if not waiting:
                return True
            await self._turns.show_blocked(waiting, nursery)
            if all(map(self._turns.waits, waiting)):
                self._answer(asked)
            left = planned + self._limits.coalesce_interval - trio.current_time()
            if left <= 0:
                return False
            await self._wait(releases, min(left, self._turns.pause(waiting)))
            if self._something.is_set():
                return False

    async def _wait(self, releases: int, seconds: float) -> None:
        """For a lease that ends, for somebody who asks, or so long."""
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as race:

                async def released() -> None:
                    await self._leases.some_release(releases)
                    race.cancel_scope.cancel()

                race.start_soon(released)
                await self._something.wait()
                race.cancel_scope.cancel()

    def _answer(self, asked: int) -> None:
        self._answered = max(self._answered, asked)
        self._waiting_for_answers.unpark_all()

    # The plan

    async def _make_plan(self) -> Plan:
        record = self._srs.get(self.sr)
        self._planned_for = self._read_switches()
        if is_paused(record):
            return Plan()
        await self._drop_emptied(self.sr)
        found = await self._repository.scan()
        if self._records.are_behind():
            # What a crash or a failure had left was recovered from.
            await self._reconcile(self.sr)
        if not any(found.errors()):
            # Also those that were lost before the SR was attached.
            await self._records.remove_lost_nodes()
        total, used = await self._repository.space()
        self._turns.sr_is_full = used > _FULL * total
        skip = {**self._turns.postponed.failures(), **self._turns.cancelled()}
        switches = Switches.of(record.other_config)
        keep = self._records.emptied()

        def plan() -> Plan:
            return make_plan(found, switches, total - used, skip=skip, keep=keep, extra_bytes=_extra_bytes)

        made = await in_thread(plan)
        if made.problems and made.problems != self._plan.problems:
            log.warning("nothing is coalesced in this SR", sr=self._uuid, problems=list(made.problems))
        return made

    async def _let_go(self) -> None:
        """What is not in the plan any more has no task any more."""
        for uuid, reason in self._turns.cancelled().items():
            kept = tuple(candidate for candidate in self._plan.candidates if candidate.child != uuid)
            self._plan = replace(
                self._plan, candidates=kept, refused=(*self._plan.refused, Refusal(uuid, reason))
            )
        paused = is_paused(self._srs.get(self.sr))
        await self._turns.keep_only(self._plan.candidates, self._why_not, runs_too=not paused)

    def _why_not(self, uuid: str) -> str:
        if is_paused(self._srs.get(self.sr)):
            return "coalescing was paused"
        for refusal in self._plan.refused:
            if refusal.uuid == uuid:
                return refusal.reason
        if self._problem is not None:
            return self._problem.message
        if uuid not in self._repository.images:
            return "the image was destroyed"
        return "; ".join(self._plan.problems) or "the chain has become another"

    async def _collect_garbage(self) -> bool:
        """Remove hidden images that nothing stands on; whether there should be a new plan."""
        collected = False
        for uuid in self._plan.garbage:
            if self._read_switches() != self._planned_for:
                return True
            try:
                collected = await self._collect(uuid) or collected
            except LeaseRefused as refused:
                log.info("an image that nobody needs is in use", sr=self._uuid, vdi=uuid, why=str(refused))
            except (XenAPIError, ImageError, OSError) as error:
                log.warning(
                    "an image that nobody needs was not removed", sr=self._uuid, vdi=uuid, why=str(error)
                )
        return collected

    async def _collect(self, uuid: str) -> bool:
        holder = Holder(WHO, OPERATION, self._records.ref(uuid))
        lease = await self._repository.lease_to_coalesce(uuid, LeaseMode.WRITE, holder, wait=0)
        image = self._repository.images.get(uuid)
        with trio.CancelScope(shield=True):
            try:
                if image is None or not image.hidden:
                    return False
                await self._repository.collect(lease, uuid)
                await self._records.chain_changed(uuid, {})
            finally:
                lease.release()
                await lease.released()
        size = 0 if image is None else image.physical_utilisation
        log.info("removed an image that nobody needs", sr=self._uuid, vdi=uuid, bytes=size)
        return True


def _extra_bytes(child: ScannedImage, parent: ScannedImage) -> int:
    """By how much the parent may grow, from the tables of both; blocks."""
    with suppress(ImageError, OSError), opened(child.path) as above, opened(parent.path) as below:
        return extra_space(above, below)
    return child_size(child, parent)
