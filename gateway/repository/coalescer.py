"""Coalesces one attached SR: as long as there is something to do and people leave a chain alone.

A plan is made from a scan, its garbage removed, its candidates tried in order, each with leases that are
taken at once or not at all; after each that was done the plan is made anew. What people hold is waited for,
with a task that says for whom and since when. They go first, but not for ever: in a tall tree or on a full SR
a candidate goes first for once, for a limited time. Whoever changes the SR's switches stops a copy at its
next block.

The trap: nothing here may run on for nothing. Every turn of a loop has got something done, or waits for a
lease to end, for somebody who asks, or for time to pass; and a candidate that failed is skipped until then.
"""

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import structlog
import trio

from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.leases import Holder, LeaseMode, LeaseRefused, Leases
from gateway.core.limits import Limits
from gateway.core.records import SR, Records
from gateway.core.tasks import Tasks
from gateway.images.errors import ImageError
from gateway.images.vhd.merge import extra_space
from gateway.repository.coalesce_plan import Candidate, Plan, Refusal, Switches, child_size, make_plan
from gateway.repository.coalesce_records import CoalesceRecords
from gateway.repository.coalesce_run import CandidateGone, CoalesceRun
from gateway.repository.coalesce_work import LONGEST_RELINK_MS, REASON, RELINK_MS, Work
from gateway.repository.relink_steps import opened
from gateway.repository.repository import Repository
from gateway.repository.scan import ScannedImage

log = structlog.get_logger("gateway.repository")

PAUSED_KEY: Final = "gateway-coalesce-paused"
"""In SR.other_config; "true" while nothing is to be coalesced in the SR."""

_SWITCHES: Final = (PAUSED_KEY, "gc", "coalesce", "leaf-coalesce")
_WHO: Final = "the gateway"
_OPERATION: Final = "coalesce"
# From here on a coalesce may go before people for once: levels of a chain, part of the SR's space.
_TALL: Final = 25
_FULL: Final = 0.95
# A program outside the gateway doesn't tell when it closes a file; nor does a rename that is under way.
_ASK_AGAIN_SECONDS: Final = 1.0
_SOON_SECONDS: Final = 0.02
_LONGEST_BACK_OFF_SECONDS: Final = 24 * 3600.0
_TELL_SECONDS: Final = 1.0
# A leaf that was written to before it could be relinked has been copied in vain: it rests for a while.
_FIRST_REST_SECONDS: Final = 1.0

_Key = tuple[str, str, str]


def is_paused(sr: SR) -> bool:
    """Whether somebody has paused coalescing in the SR."""
    return sr.other_config.get(PAUSED_KEY, "").lower() == "true"


@dataclass(slots=True)
class _Skipped:
    """A candidate that isn't tried before a person asks, or `again` (trio's clock)."""

    again: float
    failures: int
    reason: str


class Coalescer:
    """One attached writable SR; `run` does the work. `refresh_sizes` brings the SR's record up to date."""

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
    ) -> None:
        self.sr: Final = sr
        self._repository = repository
        self._srs = records.srs
        self._records = CoalesceRecords(sr, records, repository, refresh_sizes)
        self._leases = leases
        self._tasks = tasks
        self._limits = limits
        # A copy has a thread of its own: it must not wait for others, nor others for it.
        self._limiter = trio.CapacityLimiter(1)
        self._scope = trio.CancelScope()
        self._ending = XenAPIError("TASK_INTERRUPTED")
        self._runs_now = False
        self._ended = trio.Event()
        self._plan = Plan()
        self._problem: XenAPIError | None = None
        self._full = False
        self._longest_relink_ms = 0.0
        self._runs: dict[_Key, CoalesceRun] = {}
        self._works: dict[_Key, Work] = {}
        self._blocked: dict[_Key, LeaseRefused] = {}
        self._skipped: dict[_Key, _Skipped] = {}
        self._resting: dict[_Key, _Skipped] = {}
        self._current: tuple[_Key, trio.CancelScope] | None = None
        # Requests are counted, so that each is answered by a plan that was made after it.
        self._asked = 0
        self._answered = 0
        self._something = trio.Event()
        self._untold = trio.Event()
        self._waiting_for_answers = trio.lowlevel.ParkingLot()
        self._first_until = -math.inf
        self._first_again = -math.inf
        self._switches = self._read_switches()

    # What others ask

    def trigger(self) -> None:
        """Look for work now, also at what failed before."""
        self._asked += 1
        self._skipped.clear()
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
            raise self._problem
        if self._plan.problems:
            problems = "; ".join(self._plan.problems)
            raise XenAPIError("SR_BACKEND_FAILURE_40", "", f"The SR scan failed [opterr={problems}]", "")

    def switches_may_have_changed(self) -> None:
        """The SR's record is another: what runs stops if it is switched off, what was paused begins."""
        switches = self._read_switches()
        if switches != self._switches:
            self._switches = switches
            self._something.set()
            if self._current is not None:
                self._current[1].cancel()

    async def stop(self, why: XenAPIError) -> None:
        """End, at the next block; tasks end with `why`. What was copied is made durable."""
        if self._runs_now:
            self._ending = why
            self._scope.cancel()
            with trio.CancelScope(shield=True):
                await self._ended.wait()

    def state(self) -> dict[str, str]:
        """What becomes of which node, in words by uuid; under the SR's uuid what concerns all of it."""
        texts = {refusal.uuid: f"is not merged: {refusal.reason}" for refusal in self._plan.refused}
        texts |= {candidate.child: self._text(candidate) for candidate in self._plan.candidates}
        sr = self._srs.get(self.sr)
        if is_paused(sr):
            texts[sr.uuid] = "coalescing is paused"
        elif self._problem is not None:
            texts[sr.uuid] = f"nothing is coalesced: {self._problem.message}"
        elif self._plan.problems:
            problems = "; ".join(self._plan.problems)
            texts[sr.uuid] = f"nothing is coalesced until this is resolved: {problems}"
        return texts

    def _text(self, candidate: Candidate) -> str:
        key = _key(candidate)
        if self._current is not None and self._current[0] == key and key in self._works:
            run = self._runs[key]
            part = run.done / run.total if run.total else 0.0
            return f"is being merged into {candidate.parent}, {part:.0%}"
        text = f"will be merged into {candidate.parent}"
        work, refused = self._works.get(key), self._blocked.get(key)
        if work is not None and work.blocked is not None:
            by, since = work.blocked
            return f"{text}, waits for {by} since {since.astimezone():%Y-%m-%d %H:%M:%S}"
        if refused is not None:
            return f"{text}, waits for {_blocker_of(refused)}"
        if self._rests(candidate):
            return f"{text}, {self._resting[key].reason}"
        return text

    def _read_switches(self) -> tuple[str | None, ...]:
        if self.sr not in self._srs:
            return ()
        other_config = self._srs.get(self.sr).other_config
        return tuple(other_config.get(key) for key in _SWITCHES)

    # The loops

    async def run(self) -> None:
        """Coalesce until `stop` or cancellation. What goes wrong here is logged, and tried again later."""
        self._runs_now = True
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
            self._runs_now = False
            self._ended.set()
            self._waiting_for_answers.unpark_all()

    async def _run_passes(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell)
            try:
                while True:
                    await self._pass(nursery)
                    await self._rest()
            finally:
                for work in self._works.values():
                    work.end_soon(self._ending)
                self._works.clear()
                self._blocked.clear()

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
            await self._forget_what_is_gone()
            if await self._collect_garbage():
                continue
            if await self._work_through(asked, nursery):
                self._answer(asked)
                return

    async def _work_through(self, asked: int, nursery: trio.Nursery) -> bool:
        """Try the candidates of the plan; False as soon as there should be a new one."""
        planned = trio.current_time()
        while True:
            releases = self._leases.releases
            waiting: list[Candidate] = []
            for candidate in self._plan.candidates:
                if not self._rests(candidate) and (
                    await self._attempt(candidate, nursery) or self._something.is_set()
                ):
                    return False
                waiting.append(candidate)
            if not waiting:
                return True
            await self._show_blocked(waiting, nursery)
            if all(_key(each) in self._blocked or self._rests(each) for each in waiting):
                self._answer(asked)
            left = planned + self._limits.coalesce_interval - trio.current_time()
            if left <= 0:
                return False
            await self._wait(releases, min(left, self._pause(waiting)))
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

    def _pause(self, waiting: list[Candidate]) -> float:
        """How long it makes no sense to try again if no lease ends."""
        pause = math.inf
        for candidate in waiting:
            refused = self._blocked.get(_key(candidate))
            if self._rests(candidate):
                pause = min(pause, self._resting[_key(candidate)].again - trio.current_time())
            elif refused is None or not refused.blockers:
                pause = min(pause, _SOON_SECONDS)
            elif any(blocker.holder is None for blocker in refused.blockers):
                pause = min(pause, _ASK_AGAIN_SECONDS)
        return pause

    def _answer(self, asked: int) -> None:
        self._answered = max(self._answered, asked)
        self._waiting_for_answers.unpark_all()

    # The plan

    async def _make_plan(self) -> Plan:
        record = self._srs.get(self.sr)
        if is_paused(record):
            return Plan()
        found = await self._repository.scan()
        total, used = await self._repository.space()
        self._full = used > _FULL * total
        skip = self._skip()
        switches = Switches.of(record.other_config)
        before = self._plan.problems

        def plan() -> Plan:
            return make_plan(found, switches, total - used, skip=skip, extra_bytes=_extra_bytes)

        made = await trio.to_thread.run_sync(plan, limiter=self._limiter)
        if made.problems and made.problems != before:
            log.warning("nothing is coalesced in this SR", sr=self._uuid, problems=list(made.problems))
        return made

    def _skip(self) -> dict[str, str]:
        now = trio.current_time()
        return {key[1]: skipped.reason for key, skipped in self._skipped.items() if skipped.again > now}

    async def _forget_what_is_gone(self) -> None:
        wanted = {_key(candidate) for candidate in self._plan.candidates}
        for key, work in list(self._works.items()):
            if work.cancel_requested:
                reason = "its task was cancelled"
                self._skipped[key] = _Skipped(math.inf, 0, reason)
                self._plan = _refusing(self._plan, key, reason)
                await self._end_gone(key, reason)
            elif key not in wanted:
                await self._end_gone(key, self._why_gone(key))
        for key in self._blocked.keys() - wanted:
            del self._blocked[key]
        if not is_paused(self._srs.get(self.sr)):
            for key in self._runs.keys() - wanted:
                del self._runs[key]
            for key in self._resting.keys() - wanted:
                del self._resting[key]

    def _why_gone(self, key: _Key) -> str:
        if is_paused(self._srs.get(self.sr)):
            return "coalescing was paused"
        for refusal in self._plan.refused:
            if refusal.uuid == key[1]:
                return refusal.reason
        if self._problem is not None:
            return self._problem.message
        if key[1] not in self._repository.images:
            return "the image was destroyed"
        return "; ".join(self._plan.problems) or "the chain has become another"

    async def _collect_garbage(self) -> bool:
        """Remove hidden images that nothing stands on; whether any was."""
        collected = False
        for uuid in self._plan.garbage:
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
        holder = Holder(_WHO, _OPERATION, self._records.ref(uuid))
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

    # One candidate

    async def _attempt(self, candidate: Candidate, nursery: trio.Nursery) -> bool:
        """Get as far with it as people let; True when the plan should be made anew."""
        key = _key(candidate)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = CoalesceRun(self._repository, self._records, candidate, self._limiter)
        with trio.CancelScope() as scope:
            self._current = key, scope
            try:
                await self._turn(key, run, nursery)
            except LeaseRefused as refused:
                self._block(key, refused)
            except CandidateGone as gone:
                del self._runs[key]
                await self._end_gone(key, str(gone))
                return True
            except (XenAPIError, ImageError, OSError) as error:
                await self._failed(key, error)
                return True
            finally:
                self._current = None
        if run.finished:
            with trio.CancelScope(shield=True):
                await self._succeeded(key, run)
            return True
        return scope.cancelled_caught

    async def _turn(self, key: _Key, run: CoalesceRun, nursery: trio.Nursery) -> None:
        """Copy and relink until it is finished or somebody wants the chain."""
        while not run.finished:
            work = self._works.get(key)
            holder = Holder(_WHO, _OPERATION, self._records.ref(key[1]), None if work is None else work.task)
            until = self._goes_first_until(run.candidate) if key in self._blocked else None
            lease = await run.take(holder, until=until)
            try:
                self._unblock(key)
                if work is None:
                    work = await self._begin(key, run, nursery)
                    holder = replace(holder, task=work.task)
                    lease.work_under(work.task)
                if run.must_grow:
                    lease.release()
                    await lease.released()
                    await run.grow_parent(holder)
                    continue
                if not run.copied:
                    if not await run.copy(lease, holder):
                        return
                    # Whatever else was put here meanwhile: nothing may stand on a node that goes.
                    for problem in (await self._repository.scan()).errors():
                        raise CandidateGone(problem)
                    if lease.is_released:
                        continue
                if not await run.relink(lease):
                    # A writer came while people were let in.
                    self._restarted(key)
                    return
            finally:
                lease.release()

    async def _begin(self, key: _Key, run: CoalesceRun, nursery: trio.Nursery) -> Work:
        def cancelled() -> None:
            self._something.set()
            if self._current is not None and self._current[0] == key:
                self._current[1].cancel()

        work = await Work.begin(self._tasks, run, self._uuid, nursery, cancelled)
        self._works[key] = work
        log.info("coalescing", **self._about(key), task=work.task)
        return work

    def _rests(self, candidate: Candidate) -> bool:
        rest = self._resting.get(_key(candidate))
        return rest is not None and rest.again > trio.current_time()

    def _restarted(self, key: _Key) -> None:
        times = self._resting[key].failures + 1 if key in self._resting else 0
        seconds = min(_FIRST_REST_SECONDS * 2 ** min(times, 20), self._limits.coalesce_interval)
        reason = "was written to meanwhile and is copied again"
        self._resting[key] = _Skipped(trio.current_time() + seconds, times, reason)
        log.info("to be copied again", **self._about(key), why="it was written to meanwhile", rest=seconds)

    async def _succeeded(self, key: _Key, run: CoalesceRun) -> None:
        self._runs.pop(key)
        self._skipped.pop(key, None)
        self._resting.pop(key, None)
        relink_ms = run.relink_seconds * 1000
        self._longest_relink_ms = max(self._longest_relink_ms, relink_ms)
        log.info(
            "coalesced",
            **self._about(key),
            bytes=run.total,
            copy_seconds=round(run.copy_seconds, 3),
            flush_seconds=round(run.flush_seconds, 3),
            relink_ms=round(relink_ms, 1),
            longest_relink_ms=round(self._longest_relink_ms, 1),
        )
        work = self._works.pop(key)
        work.blocked = None
        await work.tell()
        await work.note({RELINK_MS: f"{relink_ms:.1f}", LONGEST_RELINK_MS: f"{self._longest_relink_ms:.1f}"})
        await work.end()

    async def _failed(self, key: _Key, error: Exception) -> None:
        told = as_xenapi_error(error)
        failures = 1
        if (before := self._skipped.get(key)) is not None:
            failures += before.failures
        pause = min(self._limits.coalesce_interval * 2 ** min(failures, 20), _LONGEST_BACK_OFF_SECONDS)
        self._skipped[key] = _Skipped(
            trio.current_time() + pause, failures, f"it failed, and is tried again later: {told.message}"
        )
        self._blocked.pop(key, None)
        log.warning("coalescing failed", **self._about(key), why=str(error), again_in_seconds=int(pause))
        work = self._works.pop(key, None)
        if work is not None:
            work.blocked = None
            await work.tell()
            await work.end(told)

    async def _end_gone(self, key: _Key, reason: str) -> None:
        """There is nothing left to do for this candidate, or nothing that may be done."""
        self._blocked.pop(key, None)
        work = self._works.pop(key, None)
        if work is not None:
            log.info("not coalesced", **self._about(key), why=reason)
            work.blocked = None
            await work.tell()
            await work.note({REASON: reason})
            await work.end(XenAPIError("TASK_CANCELLED", work.task))

    # People first

    def _goes_first_until(self, candidate: Candidate) -> float | None:
        """Until when this candidate goes before those who come later; None if they go first."""
        now = trio.current_time()
        if now < self._first_until:
            return self._first_until
        if now < self._first_again or not (self._full or candidate.tree_height >= _TALL):
            return None
        self._first_until = now + self._limits.coalesce_first_seconds
        self._first_again = self._first_until + self._limits.coalesce_first_pause_seconds
        log.warning(
            "coalescing goes first for a while",
            **self._about(_key(candidate)),
            seconds=self._limits.coalesce_first_seconds,
            levels=candidate.tree_height,
            sr_full=self._full,
        )
        return self._first_until

    def _block(self, key: _Key, refused: LeaseRefused) -> None:
        self._blocked[key] = refused
        work = self._works.get(key)
        if work is not None:
            blocker = refused.blockers[0] if refused.blockers else None
            if blocker is None:
                return
            before = work.blocked
            # Of a program outside only is known since when it has been seen.
            if before is None or before[0] != str(blocker) or blocker.holder is not None:
                work.blocked = str(blocker), blocker.since
                self._untold.set()

    def _unblock(self, key: _Key) -> None:
        self._blocked.pop(key, None)
        work = self._works.get(key)
        if work is not None and work.blocked is not None:
            work.blocked = None
            self._untold.set()

    async def _show_blocked(self, waiting: list[Candidate], nursery: trio.Nursery) -> None:
        """The lowest candidate of each chain that waits has a task to say so; those above would wait too."""
        children = {candidate.child: candidate for candidate in waiting}
        for candidate in waiting:
            key = _key(candidate)
            if candidate.parent not in children and key in self._blocked and key not in self._works:
                await self._begin(key, self._runs[key], nursery)
                self._block(key, self._blocked[key])

    async def _tell(self) -> None:
        while True:
            await self._untold.wait()
            self._untold = trio.Event()
            for work in list(self._works.values()):
                await work.tell()
            await trio.sleep(_TELL_SECONDS)

    @property
    def _uuid(self) -> str:
        return self._srs.get(self.sr).uuid if self.sr in self._srs else self.sr

    def _about(self, key: _Key) -> dict[str, str]:
        kind, child, parent = key
        return {"sr": self._uuid, "kind": kind, "vdi": child, "into": parent}


def _key(candidate: Candidate) -> _Key:
    return candidate.kind.value, candidate.child, candidate.parent


def _refusing(plan: Plan, key: _Key, reason: str) -> Plan:
    """The plan without this candidate."""
    kept = tuple(candidate for candidate in plan.candidates if _key(candidate) != key)
    return replace(plan, candidates=kept, refused=(*plan.refused, Refusal(key[1], reason)))


def _blocker_of(refused: LeaseRefused) -> str:
    return str(refused.blockers[0]) if refused.blockers else refused.message


def _extra_bytes(child: ScannedImage, parent: ScannedImage) -> int:
    """By how much the parent may grow, from the tables of both; blocks."""
    with suppress(ImageError, OSError), opened(child.path) as above, opened(parent.path) as below:
        return extra_space(above, below)
    return child_size(child, parent)
