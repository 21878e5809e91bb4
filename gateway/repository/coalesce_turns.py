"""The candidates of one SR's plan, one at a time, each with what it has come to: copied, blocked, failed.

A candidate that must wait keeps its task and its place, and others have their turn. While nothing has begun,
only the lowest of a chain has a task, for those above it wait for the same people.

The trap: a lease of ours that is still being closed looks like somebody who is in the way; so its end is
waited for before anything else is tried.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final

import structlog
import trio

from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.leases import Holder, Lease, LeaseRefused
from gateway.core.limits import Limits
from gateway.core.tasks import Tasks
from gateway.images.errors import ImageError
from gateway.repository.coalesce_plan import Candidate
from gateway.repository.coalesce_records import CoalesceRecords
from gateway.repository.coalesce_run import CandidateGone, CoalesceRun
from gateway.repository.coalesce_timing import GoesFirst, Key, Postponed, key_of
from gateway.repository.coalesce_work import LONGEST_RELINK_MS, REASON, RELINK_MS, Work
from gateway.repository.repository import Repository

log = structlog.get_logger("gateway.repository")

WHO: Final = "the gateway"
OPERATION: Final = "coalesce"
# A program outside the gateway doesn't tell when it closes a file; nor does a rename that is under way.
_ASK_AGAIN_SECONDS: Final = 1.0
_SOON_SECONDS: Final = 0.1
_TELL_SECONDS: Final = 1.0
# Who comes back as soon as he has left is quicker than a new attempt. Then the coalesce stands in the queue,
# for so short a time that nobody minds.
_ATTEMPTS_IN_VAIN: Final = 3
_LITTLE_SECONDS: Final = 0.02


class Turns:
    """`sr_uuid` is for tasks and the log; `wake` is called when the plan should be made anew."""

    def __init__(
        self,
        repository: Repository,
        records: CoalesceRecords,
        tasks: Tasks,
        limits: Limits,
        *,
        sr_uuid: str,
        wake: Callable[[], None],
    ) -> None:
        self.postponed: Final = Postponed(limits)
        self.sr_is_full = False
        self._repository = repository
        self._records = records
        self._tasks = tasks
        self._sr_uuid = sr_uuid
        self._wake = wake
        self._first = GoesFirst(limits)
        self._first_seconds = limits.coalesce_first_seconds
        # A copy has a thread of its own: it must not wait for others, nor others for it.
        self._limiter = trio.CapacityLimiter(1)
        self._runs: dict[Key, CoalesceRun] = {}
        self._works: dict[Key, Work] = {}
        self._blocked: dict[Key, LeaseRefused] = {}
        self._in_vain: dict[Key, int] = {}
        self._current: tuple[Key, trio.CancelScope] | None = None
        self._untold = trio.Event()
        self._longest_relink_ms = 0.0

    async def attempt(self, candidate: Candidate, nursery: trio.Nursery) -> bool:
        """Get as far with it as people let; True when the plan should be made anew.

        Its task is held in `nursery`.
        """
        key = key_of(candidate)
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
                await self._gone(key, str(gone))
                return True
            except (XenAPIError, ImageError, OSError) as error:
                if isinstance(error, XenAPIError) and error.code == "VDI_MISSING":
                    # Somebody was quicker in destroying it than this in leasing it.
                    await self._gone(key, "the image was destroyed")
                else:
                    await self._failed(key, error)
                return True
            finally:
                self._current = None
        if run.finished:
            with trio.CancelScope(shield=True):
                try:
                    await self._succeeded(key, run)
                finally:
                    # All is done and durable; this takes its time and holds nobody up.
                    await run.free_blocks()
            return True
        return scope.cancelled_caught

    def interrupt(self) -> None:
        """What runs now stops at the next block."""
        if self._current is not None:
            self._current[1].cancel()

    def waits(self, candidate: Candidate) -> bool:
        """Whether it was tried and waits for people, or rests."""
        return key_of(candidate) in self._blocked or self.postponed.rest(candidate) > 0

    def pause(self, waiting: list[Candidate]) -> float:
        """How long it makes no sense to try them again, unless a lease ends."""
        pause = math.inf
        for candidate in waiting:
            refused = self._blocked.get(key_of(candidate))
            if (rest := self.postponed.rest(candidate)) > 0:
                pause = min(pause, rest)
            elif refused is None or not refused.blockers:
                pause = min(pause, _SOON_SECONDS)
            elif any(blocker.holder is None for blocker in refused.blockers):
                pause = min(pause, _ASK_AGAIN_SECONDS)
        return pause

    async def show_blocked(self, waiting: list[Candidate], nursery: trio.Nursery) -> None:
        """See that a task tells for whom each chain waits."""
        children = {candidate.child for candidate in waiting}
        for candidate in waiting:
            key = key_of(candidate)
            if candidate.parent not in children and key in self._blocked and key not in self._works:
                await self._begin(key, self._runs[key], nursery)
                self._block(key, self._blocked[key])

    async def tell(self) -> None:
        """Tell in tasks who is waited for, not more often than once a second. Never returns."""
        while True:
            await self._untold.wait()
            self._untold = trio.Event()
            for work in list(self._works.values()):
                await work.tell()
            await trio.sleep(_TELL_SECONDS)

    def cancelled(self) -> Mapping[str, str]:
        """The children whose tasks somebody has cancelled, by uuid, and why they are not tried again."""
        keys = [key for key, work in self._works.items() if work.cancel_requested]
        return {key[1]: self.postponed.cancelled(key) for key in keys}

    async def keep_only(
        self, candidates: tuple[Candidate, ...], why: Callable[[str], str], *, runs_too: bool
    ) -> None:
        """Let go of all but these; `why` says it of a child's uuid.

        Unless `runs_too`, what was copied of them counts still when they come back.
        """
        wanted = {key_of(candidate) for candidate in candidates}
        for key in [key for key in self._works if key not in wanted]:
            await self._gone(key, why(key[1]), forget=False)
        for key in self._blocked.keys() - wanted:
            del self._blocked[key]
        for key in self._in_vain.keys() - wanted:
            del self._in_vain[key]
        if runs_too:
            for key in self._runs.keys() - wanted:
                del self._runs[key]

    def end(self, error: XenAPIError) -> None:
        """All tasks end with this soon, and all is begun anew."""
        for work in self._works.values():
            work.end_soon(error)
        self._works.clear()
        self._blocked.clear()
        self._runs.clear()

    def text(self, candidate: Candidate) -> str:
        """What becomes of it, in words."""
        key = key_of(candidate)
        work, refused = self._works.get(key), self._blocked.get(key)
        has_turn = self._current is not None and self._current[0] == key
        if has_turn and work is not None and refused is None:
            part = work.run.done / work.run.total if work.run.total else 0.0
            return f"is being merged into {candidate.parent}, {part:.0%}"
        text = f"will be merged into {candidate.parent}"
        if work is not None and work.blocked is not None:
            by, since = work.blocked
            return f"{text}, waits for {by} since {since.astimezone():%Y-%m-%d %H:%M:%S}"
        if refused is not None:
            who = refused.blockers[0] if refused.blockers else refused.message
            return f"{text}, waits for {who}"
        if self.postponed.rest(candidate) > 0:
            return f"{text}, {self.postponed.why_it_rests(candidate)}"
        return text

    # One turn

    async def _turn(self, key: Key, run: CoalesceRun, nursery: trio.Nursery) -> None:
        """Copy and relink until it is finished or somebody wants the chain."""
        while not run.finished:
            often = self._in_vain.get(key, 0) >= _ATTEMPTS_IN_VAIN
            lease = await run.take(
                self._holder(key),
                until=self._goes_first_until(key, run),
                wait=_LITTLE_SECONDS if often else 0.0,
            )
            try:
                self._unblock(key)
                work = self._works.get(key) or await self._begin(key, run, nursery)
                lease.work_under(work.task)
                if run.must_grow:
                    lease.release()
                    await lease.released()
                    await run.grow_parent(self._holder(key))
                elif not run.copied and not await run.copy(lease, self._holder(key)):
                    return
                elif not lease.is_released and not await self._relink(run, lease):
                    # A writer came while people were let in.
                    pause = self.postponed.copied_in_vain(key)
                    log.info("to be copied again", **self._about(key), why="it was written to", rest=pause)
                    return
            finally:
                lease.release()
                with trio.CancelScope(shield=True):
                    await lease.released()

    async def _relink(self, run: CoalesceRun, lease: Lease) -> bool:
        # Whatever else was put here since the plan was made: nothing may stand on a node that goes.
        for problem in (await self._repository.scan()).errors():
            raise CandidateGone(problem)
        return await run.relink(lease)

    def _holder(self, key: Key) -> Holder:
        work = self._works.get(key)
        return Holder(WHO, OPERATION, self._records.ref(key[1]), None if work is None else work.task)

    def _goes_first_until(self, key: Key, run: CoalesceRun) -> float | None:
        """People go first, until that was waited for in vain."""
        if key not in self._blocked:
            return None
        until = self._first.until(run.candidate, full=self.sr_is_full)
        if until is not None:
            seconds = round(until - trio.current_time(), 1)
            log.warning("coalescing goes first", **self._about(key), seconds=seconds, sr_full=self.sr_is_full)
        return until

    async def _begin(self, key: Key, run: CoalesceRun, nursery: trio.Nursery) -> Work:
        def cancelled() -> None:
            self._wake()
            if self._current is not None and self._current[0] == key:
                self.interrupt()

        # Whoever interrupts this now must not leave a task behind that nobody ends.
        with trio.CancelScope(shield=True):
            work = self._works[key] = await Work.begin(self._tasks, run, self._sr_uuid, nursery, cancelled)
        log.info("coalescing", **self._about(key), task=work.task)
        return work

    def _block(self, key: Key, refused: LeaseRefused) -> None:
        self._blocked[key] = refused
        self._in_vain[key] = self._in_vain.get(key, 0) + 1
        work = self._works.get(key)
        if work is None or not refused.blockers:
            return
        blocker, before = refused.blockers[0], work.blocked
        # Of a program outside only is known since when it has been seen.
        if before is None or before[0] != str(blocker) or blocker.holder is not None:
            work.blocked = str(blocker), blocker.since
            self._untold.set()

    def _unblock(self, key: Key) -> None:
        self._blocked.pop(key, None)
        work = self._works.get(key)
        if work is not None and work.blocked is not None:
            work.blocked = None
            self._untold.set()

    # The end of a candidate

    async def _succeeded(self, key: Key, run: CoalesceRun) -> None:
        del self._runs[key]
        self.postponed.done(key)
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
        measured = {RELINK_MS: f"{relink_ms:.1f}", LONGEST_RELINK_MS: f"{self._longest_relink_ms:.1f}"}
        await self._end(key, None, measured)

    async def _failed(self, key: Key, error: Exception) -> None:
        told = as_xenapi_error(error)
        pause = self.postponed.failed(key, told.message)
        log.warning("coalescing failed", **self._about(key), why=str(error), again_in_seconds=int(pause))
        await self._end(key, told, {})

    async def _gone(self, key: Key, reason: str, *, forget: bool = True) -> None:
        """There is nothing left to do for it, or nothing that may be done."""
        if forget:
            self._runs.pop(key, None)
        if key in self._works:
            log.info("not coalesced", **self._about(key), why=reason)
            await self._end(key, XenAPIError("TASK_CANCELLED", self._works[key].task), {REASON: reason})

    async def _end(self, key: Key, error: XenAPIError | None, noted: Mapping[str, str]) -> None:
        self._blocked.pop(key, None)
        work = self._works.pop(key, None)
        if work is not None:
            work.blocked = None
            try:
                await work.tell()
                await work.note(noted)
            finally:
                # Nobody else would: the coalescer, and with it the gateway, would wait for it for ever.
                await work.end(error)

    def _about(self, key: Key) -> dict[str, str]:
        kind, child, parent = key
        return {"sr": self._sr_uuid, "kind": kind, "vdi": child, "into": parent}
