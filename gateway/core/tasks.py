"""Tasks: every operation is one, and clients may make their own to follow an operation by.

`Tasks.operation` is the one way work runs under a task; it turns the end of the work into the task's end.
Success is durable before anybody sees it; progress lives in memory and is read when somebody asks. Only a
pending task (one whose cancelling has begun is still pending to its operation) can end, once. The traps: work
that finished although somebody cancelled it is a success, because its data is there; and a client may destroy
a task while its operation runs, which goes on without it.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

import structlog
import trio
from sqlalchemy.exc import SQLAlchemyError

from gateway.core.clock import utc_now
from gateway.core.database import Database, DatabaseFailed
from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.events import Events
from gateway.core.limits import Limits
from gateway.core.refs import NULL_REF, new_ref, new_uuid
from gateway.core.roles import Permission, Role
from gateway.core.task import Actor, Operation, Task, TaskStatus
from gateway.core.task_limits import beyond_the_limits, waiting_for_clients
from gateway.core.task_progress import TaskProgress
from gateway.core.task_table import TaskTable

__all__ = ["Actor", "Operation", "Task", "TaskStatus", "Tasks"]

log: Final[structlog.typing.FilteringBoundLogger] = structlog.get_logger()

# xapi's names for the right to act on the tasks of others.
CANCEL_ANY: Final = Permission("task.cancel/any", Role.POOL_OPERATOR)
DESTROY_ANY: Final = Permission("task.destroy/any", Role.POOL_OPERATOR)
CHANGE_ANY: Final = Permission("task.change/any", Role.POOL_OPERATOR)

# How often old tasks are looked for, in seconds; nobody minds an hour more after a day.
_FORGET_INTERVAL: Final = 3600.0


class Tasks:
    """All tasks of the gateway. Made by `Tasks.load`; `run` must be running beside it."""

    def __init__(
        self,
        table: TaskTable,
        *,
        limits: Limits,
        resident_on: str,
        now: Callable[[], datetime],
    ) -> None:
        self._table = table
        self._limits = limits
        self._resident_on = resident_on
        self._now = now
        # Writers take turns, so that memory and database change in one order.
        self._lock = trio.Lock()
        self._operations: dict[str, Operation] = {}
        # Pending tasks of an earlier run of the gateway whose holder may still come back.
        self._unannounced = {task.ref for task in table if task.worked_on and not task.status.is_final}
        self._progress = TaskProgress(table, self._operations, limits)

    @classmethod
    async def load(
        cls,
        database: Database,
        events: Events,
        *,
        limits: Limits | None = None,
        resident_on: str = NULL_REF,
        now: Callable[[], datetime] = utc_now,
    ) -> "Tasks":
        """Read the tasks; `resident_on` is the reference of this host."""
        table = await TaskTable.load(database, events)
        return cls(table, limits=limits or Limits(), resident_on=resident_on, now=now)

    async def run(self) -> None:
        """What happens by itself: unannounced tasks fail, progress is told, old tasks go. Never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._interrupt_unannounced)
            nursery.start_soon(self._progress.run)
            nursery.start_soon(self._forget_old)

    # Reading

    def __len__(self) -> int:
        return len(self._table)

    def get(self, ref: str) -> Task:
        """The task as it is now, with its live progress. Raises HANDLE_INVALID."""
        return self._live(self._table.get(ref))

    def _live(self, task: Task) -> Task:
        operation = self._operations.get(task.ref)
        if operation is None:
            return task
        return replace(
            task,
            progress=operation.current_progress(),
            other_config={**task.other_config, **operation.current_details()},
        )

    def by_uuid(self, uuid: str) -> Task:
        """The task with this uuid. Raises UUID_INVALID."""
        return self._live(self._table.by_uuid(uuid))

    def all(self) -> list[Task]:
        """Every task, oldest first."""
        return [self._live(task) for task in self._table]

    def by_name_label(self, label: str) -> list[Task]:
        """The tasks with exactly this name."""
        return [self._live(task) for task in self._table if task.name_label == label]

    def subtasks_of(self, ref: str) -> list[Task]:
        """The tasks that say they are part of this one."""
        return [self.get(subtask) for subtask in self._table.subtasks_of(ref)]

    def can_cancel(self, ref: str) -> bool:
        """Whether `cancel` would be heard now. Raises HANDLE_INVALID."""
        operation = self._operations.get(ref)
        is_pending = self._table.get(ref).status is TaskStatus.PENDING
        return is_pending and (operation is None or operation.cancellable)

    # Life

    async def create(
        self,
        name_label: str,
        name_description: str = "",
        *,
        user: str = "",
        session_uuid: str = "",
        client_made: bool = True,
        subtask_of: str = NULL_REF,
        other_config: Mapping[str, str] | None = None,
    ) -> Task:
        """A new pending task.

        `client_made` false: the gateway makes it for an operation that follows at once, so nobody else may
        end it, and a restart does. Raises TOO_MANY_PENDING_TASKS to clients that never end theirs.
        """
        task = Task(
            ref=new_ref(),
            uuid=new_uuid(),
            name_label=name_label,
            name_description=name_description,
            created=self._now(),
            other_config=dict(other_config or {}),
            subtask_of=subtask_of,
            resident_on=self._resident_on,
            user=user,
            session_uuid=session_uuid,
            client_made=client_made,
            worked_on=not client_made,
        )
        async with self._lock:
            if client_made and waiting_for_clients(self._table, user) >= self._limits.task_keep:
                raise XenAPIError("TOO_MANY_PENDING_TASKS", str(self._limits.task_keep))
            await self._table.add(task)
            await self._forget_beyond_the_limits()
        return task

    async def destroy(self, ref: str, actor: Actor | None = None) -> None:
        """Remove the record; an operation under it goes on. Raises HANDLE_INVALID, RBAC_PERMISSION_DENIED."""
        async with self._lock:
            self._table.get(ref).check_actor(actor, DESTROY_ANY)
            await self._forget([ref])

    async def cancel(self, ref: str, actor: Actor | None = None) -> None:
        """Cancel: work is asked to stop and the task is cancelling until it has; without work it is cancelled
        at once.

        Cancelling twice is no error. Raises HANDLE_INVALID, RBAC_PERMISSION_DENIED, and OPERATION_NOT_ALLOWED
        for a task that has ended in another way or whose work cannot be stopped.
        """
        async with self._lock:
            task = self._table.get(ref)
            task.check_actor(actor, CANCEL_ANY)
            if task.status in {TaskStatus.CANCELLING, TaskStatus.CANCELLED}:
                return
            if task.status.is_final:
                raise XenAPIError("OPERATION_NOT_ALLOWED", f"the task has ended already ({task.status})")
            operation = self._operations.get(ref)
            if operation is None:
                await self._finish(task, TaskStatus.CANCELLED, XenAPIError("TASK_CANCELLED", ref))
            else:
                # The work first: it should stop even if the database cannot write.
                operation.request_cancel()
                await self._table.store(replace(task, status=TaskStatus.CANCELLING))

    async def fail(self, ref: str, error: XenAPIError) -> bool:
        """End a task whose operation was refused before it began; whether that was done.

        Nothing happens to a task that is unknown, has ended, or belongs to another operation that runs.
        """
        async with self._lock:
            task = self._table.find(ref)
            if task is None or task.status is not TaskStatus.PENDING or ref in self._operations:
                return False
            await self._finish(task, TaskStatus.FAILURE, error)
            return True

    def announce(self, ref: str) -> None:
        """The holder of a task from before a restart is back and goes on; `operation` may follow at any time.

        Raises HANDLE_INVALID, or what ended the task meanwhile (TASK_CANCELLED, TASK_INTERRUPTED): then stop
        the work.
        """
        self._table.get(ref).check_open()
        self._unannounced.discard(ref)

    @asynccontextmanager
    async def operation(
        self, task: Task | str, cancel: Callable[[], None] | None
    ) -> AsyncIterator[Operation]:
        """Run the block as the work of a pending task.

        `cancel` is called on the trio thread and must not block: it makes the block end soon, by whatever
        exception (a cancelled scope around it will do). None: the work cannot be cancelled.

        The end of the block is the end of the task: normally, success with `operation.result`, durable when
        this exits; XenAPIError, failure with it; an end by exception after `cancel`, or TASK_CANCELLED,
        cancelled; other exceptions as `as_xenapi_error` says, and the cancellation of the surrounding trio
        scope is TASK_INTERRUPTED. The exception goes on to the caller, but one that `cancel` provoked goes on
        as TASK_CANCELLED. `operation.error` is what the task says.

        Raises HANDLE_INVALID; TASK_CANCELLED or what else the task ended with; OTHER_OPERATION_IN_PROGRESS.
        """
        operation = await self._begin(task if isinstance(task, str) else task.ref, cancel)
        try:
            yield operation
        except BaseException as error:
            told = as_xenapi_error(error)
            if operation.cancel_requested or told.code == "TASK_CANCELLED":
                told = XenAPIError("TASK_CANCELLED", operation.task)
            elif told.code == "INTERNAL_ERROR":
                log.exception("an operation failed unexpectedly", task=operation.task)
            operation.error = told
            await self._end(operation)
            if operation.cancel_requested and isinstance(error, Exception):
                raise told from error
            raise
        else:
            await self._end(operation)

    async def _begin(self, ref: str, cancel: Callable[[], None] | None) -> Operation:
        async with self._lock:
            task = self._table.get(ref)
            task.check_open()
            if ref in self._operations:
                raise XenAPIError("OTHER_OPERATION_IN_PROGRESS", "task", ref)
            if not task.worked_on:
                # Durable, so that after a crash the task is known to be without its work.
                await self._table.store(replace(task, worked_on=True))
            operation = Operation(ref, cancel)
            self._operations[ref] = operation
            self._unannounced.discard(ref)
            self._progress.begun()
            return operation

    async def _end(self, operation: Operation) -> None:
        status = TaskStatus.SUCCESS
        if operation.error is not None:
            is_cancelled = operation.error.code == "TASK_CANCELLED"
            status = TaskStatus.CANCELLED if is_cancelled else TaskStatus.FAILURE
        with trio.CancelScope(shield=True):
            async with self._lock:
                progress = operation.current_progress()
                del self._operations[operation.task]
                self._progress.ended(operation.task)
                task = self._table.find(operation.task)
                if task is not None:
                    other_config = {**task.other_config, **operation.current_details()}
                    task = replace(task, progress=progress, other_config=other_config)
                    # Until the end is durable, whoever asks must not see the task back at its beginning.
                    self._table.put(task)
                    progress = 1.0 if status is TaskStatus.SUCCESS else progress
                    task = replace(task, progress=progress, result=operation.result)
                    await self._finish(task, status, operation.error)

    # What clients do to tasks that they made themselves

    async def set_status(self, ref: str, status: TaskStatus, actor: Actor | None = None) -> None:
        """End a client's own task as success, failure or cancelled. Raises OPERATION_NOT_ALLOWED for all
        other tasks.
        """
        async with self._lock:
            task = self._own_pending_task(ref, actor)
            if status is TaskStatus.CANCELLING:
                raise XenAPIError("VALUE_NOT_SUPPORTED", "status", status, "cancel the task instead")
            if status is TaskStatus.PENDING:
                return
            if status is TaskStatus.SUCCESS:
                task = replace(task, progress=1.0)
            await self._finish(task, status, None)

    async def set_progress(self, ref: str, progress: float, actor: Actor | None = None) -> None:
        """Set a client's own task's progress, 0 to 1; kept in memory until the task ends."""
        async with self._lock:
            task = self._own_pending_task(ref, actor)
            if not 0.0 <= progress <= 1.0:
                raise XenAPIError("VALUE_NOT_SUPPORTED", "progress", str(progress), "it goes from 0 to 1")
            self._table.put(replace(task, progress=progress))
            self._progress.moved(ref)

    async def set_result(self, ref: str, result: str, actor: Actor | None = None) -> None:
        """Set a client's own pending task's result."""
        async with self._lock:
            await self._table.store(replace(self._own_pending_task(ref, actor), result=result))

    async def set_error_info(self, ref: str, error_info: Iterable[str], actor: Actor | None = None) -> None:
        """Set a client's own pending task's error, a code and its parameters."""
        async with self._lock:
            await self._table.store(replace(self._own_pending_task(ref, actor), error_info=tuple(error_info)))

    async def edit(
        self, ref: str, compute: Callable[[Task], Mapping[str, Any]], actor: Actor | None = None
    ) -> Task:
        """Set the fields that `compute` makes of the task as it is now: `other_config` alone may be set so,
        at any time.
        """
        async with self._lock:
            task = self._table.get(ref)
            task.check_actor(actor, CHANGE_ANY)
            changes = compute(task)
            if not changes.keys() <= {"other_config"}:
                raise ValueError("a task's own methods set its other fields")
            if changes:
                await self._table.store(replace(task, **changes))
        return self.get(ref)

    def _own_pending_task(self, ref: str, actor: Actor | None) -> Task:
        task = self._table.get(ref)
        task.check_actor(actor, CHANGE_ANY)
        if task.worked_on:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "an operation of the gateway ends this task")
        if task.status is not TaskStatus.PENDING:
            raise XenAPIError("OPERATION_NOT_ALLOWED", f"the task has ended already ({task.status})")
        return task

    # What happens by itself

    async def _interrupt_unannounced(self) -> None:
        await trio.sleep(self._limits.announce_seconds)
        async with self._lock:
            for ref in list(self._unannounced):
                task = self._table.find(ref)
                if task is not None and not task.status.is_final:
                    if task.status is TaskStatus.CANCELLING:
                        await self._finish(task, TaskStatus.CANCELLED, XenAPIError("TASK_CANCELLED", ref))
                    else:
                        await self._finish(task, TaskStatus.FAILURE, XenAPIError("TASK_INTERRUPTED"))
                self._unannounced.discard(ref)

    async def _forget_old(self) -> None:
        while True:
            async with self._lock:
                await self._forget_beyond_the_limits()
            await trio.sleep(_FORGET_INTERVAL)

    # Storing; the lock is held

    async def _finish(self, task: Task, status: TaskStatus, error: XenAPIError | None) -> None:
        error_info = task.error_info if error is None else tuple(error.error_info)
        ended = replace(task, status=status, error_info=error_info, finished=self._now())
        try:
            await self._table.store(ended)
        except Exception as problem:
            # The work is over whatever the database does; but what is not written down is not called a
            # success.
            told = XenAPIError("INTERNAL_ERROR", f"the end of the task could not be recorded: {problem}")
            log.exception("the end of a task could not be recorded", task=task.ref, status=status)
            failed = TaskStatus.FAILURE if status is TaskStatus.SUCCESS else status
            info = tuple(told.error_info) if status is TaskStatus.SUCCESS else error_info
            self._table.put(replace(ended, status=failed, error_info=info))
            self._table.tell(task.ref)
            if status is TaskStatus.SUCCESS:
                raise told from problem
            return
        await self._forget_beyond_the_limits()

    async def _forget_beyond_the_limits(self) -> None:
        try:
            await self._forget(
                beyond_the_limits(list(self._table), self._operations, self._limits, self._now())
            )
        except (SQLAlchemyError, DatabaseFailed):
            # The next task tries it again; this one is what it is.
            log.exception("old tasks could not be removed from the database")

    async def _forget(self, refs: list[str]) -> None:
        if refs:
            await self._table.remove(refs)
            self._unannounced.difference_update(refs)
            self._progress.forgotten(refs)
