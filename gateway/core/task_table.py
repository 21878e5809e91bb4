"""Where tasks are kept: in memory, by reference, uuid and what they are part of, and as rows of the database.

`Tasks` owns the one table and lets writers take turns; nobody else changes it. The trap: `put` alone reaches
memory only, so what is put so is lost with the process.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, literal_column, select, update

from gateway.core import schema
from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.refs import NULL_REF
from gateway.core.task import Task, TaskStatus


class TaskTable:
    """All tasks as they were last put, oldest first. Made by `TaskTable.load`."""

    def __init__(self, database: Database, events: Events) -> None:
        self._database = database
        self._events = events
        self._tasks: dict[str, Task] = {}
        self._by_uuid: dict[str, str] = {}
        self._subtasks: dict[str, dict[str, None]] = {}

    @classmethod
    async def load(cls, database: Database, events: Events) -> "TaskTable":
        """Read the rows."""
        table = cls(database, events)

        def rows(connection: Connection) -> list[dict[str, Any]]:
            query = select(schema.tasks).order_by(literal_column("rowid"))
            return [dict(row) for row in connection.execute(query).mappings()]

        for row in await database.run(rows):
            table.put(Task(**{**row, "status": TaskStatus(row["status"])}))
        return table

    # Reading

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def find(self, ref: str) -> Task | None:
        """The task, None if there is none."""
        return self._tasks.get(ref)

    def get(self, ref: str) -> Task:
        """The task. Raises HANDLE_INVALID."""
        task = self._tasks.get(ref)
        if task is None:
            raise XenAPIError("HANDLE_INVALID", "task", ref)
        return task

    def by_uuid(self, uuid: str) -> Task:
        """The task with this uuid. Raises UUID_INVALID."""
        ref = self._by_uuid.get(uuid.lower())
        if ref is None:
            raise XenAPIError("UUID_INVALID", "task", uuid)
        return self._tasks[ref]

    def subtasks_of(self, ref: str) -> Iterable[str]:
        """The references of the tasks that say they are part of this one."""
        return self._subtasks.get(ref, {}).keys()

    # Writing; the caller holds the lock of the writers

    async def add(self, task: Task) -> None:
        """A new task, durable when this returns."""
        await self._database.run(lambda connection: connection.execute(insert(schema.tasks), _row(task)))
        self.put(task)
        self._events.publish("task", "add", task.ref)

    async def store(self, task: Task) -> None:
        """What a task is from now on, durable when this returns."""
        statement = update(schema.tasks).where(schema.tasks.c.ref == bindparam("_ref"))
        row = {**_row(task), "_ref": task.ref}
        await self._database.run(lambda connection: connection.execute(statement, row))
        self.put(task)
        self.tell(task.ref)

    def put(self, task: Task) -> None:
        """What a task is from now on, in memory alone; nobody is told."""
        self._tasks[task.ref] = task
        self._by_uuid[task.uuid] = task.ref
        if task.subtask_of != NULL_REF:
            self._subtasks.setdefault(task.subtask_of, {})[task.ref] = None

    def tell(self, ref: str) -> None:
        """Publish that the task has changed."""
        self._events.publish("task", "mod", ref)

    async def remove(self, refs: list[str]) -> None:
        """Forget these tasks."""
        statement = delete(schema.tasks).where(schema.tasks.c.ref == bindparam("_ref"))
        rows = [{"_ref": ref} for ref in refs]
        await self._database.run(lambda connection: connection.execute(statement, rows))
        for ref in refs:
            task = self._tasks.pop(ref)
            del self._by_uuid[task.uuid]
            if (siblings := self._subtasks.get(task.subtask_of)) is not None:
                del siblings[ref]
                if not siblings:
                    del self._subtasks[task.subtask_of]
            self._events.publish("task", "del", ref)


def _row(task: Task) -> dict[str, Any]:
    return {item.name: getattr(task, item.name) for item in fields(task)}
