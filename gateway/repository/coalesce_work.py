"""The task of one candidate of coalescing: from the first time that it has work or waits, to its end.

Whoever looks at the task learns how far the copy is, and for whom it waits since when (other_config
blocked-by and blocked-since). The trap: people come and go hundreds of times a second, and each change of a
task is a write to the database and an event. So what is to be told is kept here, and told once in a while.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

import structlog
import trio

from gateway.core.errors import XenAPIError
from gateway.core.tasks import Task, Tasks
from gateway.repository.coalesce_plan import Candidate
from gateway.repository.coalesce_run import CoalesceRun

log = structlog.get_logger("gateway.repository")

TASK_NAME: Final = "coalesce"
BLOCKED_BY: Final = "blocked-by"
BLOCKED_SINCE: Final = "blocked-since"
RELINK_MS: Final = "relink-ms"
LONGEST_RELINK_MS: Final = "longest-relink-ms"
REASON: Final = "reason"


class Work:
    """One candidate with its task. `cancelled` is told that somebody has cancelled it."""

    def __init__(self, tasks: Tasks, run: CoalesceRun, task: str, cancelled: Callable[[], None]) -> None:
        self.task: Final = task
        self.run: Final = run
        self.cancel_requested = False
        self.blocked: tuple[str, datetime] | None = None
        self._tasks = tasks
        self._cancelled = cancelled
        self._told: tuple[str, datetime] | None = None
        self._over = trio.Event()
        self._ended = trio.Event()
        self._error: XenAPIError | None = None

    @classmethod
    async def begin(
        cls,
        tasks: Tasks,
        run: CoalesceRun,
        sr_uuid: str,
        nursery: trio.Nursery,
        cancelled: Callable[[], None],
    ) -> "Work":
        """Make the task, and hold it in `nursery` until `end`."""
        candidate = run.candidate
        task = await tasks.create(
            TASK_NAME,
            f"the VDI {candidate.child} goes into {candidate.parent}",
            client_made=False,
            other_config=_about(candidate, sr_uuid),
        )
        work = cls(tasks, run, task.ref, cancelled)
        await nursery.start(work._hold)
        return work

    def end_soon(self, error: XenAPIError | None = None) -> None:
        """Let the task end with `error`, or as a success."""
        self._error = error
        self._over.set()

    async def end(self, error: XenAPIError | None = None) -> None:
        """End the task, which says so on return."""
        self.end_soon(error)
        with trio.CancelScope(shield=True):
            await self._ended.wait()

    async def tell(self) -> None:
        """Bring the task up to date with who is waited for."""
        if self.blocked == self._told:
            return
        self._told = told = self.blocked
        added = {}
        if told is not None:
            added = {BLOCKED_BY: told[0], BLOCKED_SINCE: _iso(told[1])}
        await self.note(added, without=(BLOCKED_BY, BLOCKED_SINCE))

    async def note(self, added: Mapping[str, str], *, without: tuple[str, ...] = ()) -> None:
        """Change the task's other_config; nothing if a client has destroyed the task."""

        def changed(task: Task) -> Mapping[str, object]:
            kept = {key: value for key, value in task.other_config.items() if key not in without}
            return {"other_config": {**kept, **added}}

        with suppress(XenAPIError):
            await self._tasks.edit(self.task, changed)

    def _request_cancel(self) -> None:
        self.cancel_requested = True
        self._cancelled()

    async def _hold(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with self._tasks.operation(self.task, self._request_cancel) as operation:
                operation.progress = self._progress
                task_status.started()
                # Who ends the work ends it whatever is cancelled; then the task says what became of it.
                with trio.CancelScope(shield=True):
                    await self._over.wait()
                if self._error is not None:
                    raise self._error
        except XenAPIError as error:
            if not self._over.is_set():
                # Somebody was quicker, and cancelled the task before its work began.
                self._request_cancel()
                task_status.started()
            log.debug("a task of coalescing ended", task=self.task, why=error.error_info)
        finally:
            self._ended.set()

    def _progress(self) -> float:
        return self.run.done / self.run.total if self.run.total else 0.0


async def end_leftovers(tasks: Tasks, sr_uuid: str) -> None:
    """End the tasks that an earlier run of the gateway has left pending."""
    for task in tasks.by_name_label(TASK_NAME):
        if task.other_config.get("SR") == sr_uuid and not task.client_made:
            await tasks.fail(task.ref, XenAPIError("TASK_INTERRUPTED"))


def _about(candidate: Candidate, sr_uuid: str) -> dict[str, str]:
    return {
        "SR": sr_uuid,
        "VDI": candidate.child,
        "into": candidate.parent,
        "kind": candidate.kind.value,
    }


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
