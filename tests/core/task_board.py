"""Tasks over a database of their own, and users with different roles, for tests."""

import errno
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.core.clock import utc_now
from gateway.core.database import Database
from gateway.core.events import Events
from gateway.core.limits import Limits
from gateway.core.refs import new_ref
from gateway.core.roles import Role
from gateway.core.tasks import Task, Tasks

HOST = new_ref()


@dataclass(frozen=True)
class Somebody:
    user: str
    role: Role


OWNER = Somebody("ann", Role.READ_ONLY)
STRANGER = Somebody("bob", Role.VM_POWER_ADMIN)
OPERATOR = Somebody("eve", Role.POOL_OPERATOR)


class Board:
    """Tasks over one database, which can be closed and opened again as a restart does."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.now = utc_now()
        self.limits = Limits()

    async def open(self) -> "Board":
        self.database = await Database.open(self.path)
        self.events = Events()
        self.tasks = await Tasks.load(
            self.database, self.events, limits=self.limits, resident_on=HOST, now=lambda: self.now
        )
        return self

    async def restart(self) -> None:
        await self.database.aclose()
        await self.open()

    async def task(self, **fields: Any) -> Task:
        return await self.tasks.create("import", "a disk", user="ann", session_uuid="s", **fields)

    def stored(self, task: Task) -> str:
        """The status that another process reads from the file now."""
        connection = sqlite3.connect(self.path)
        try:
            row = connection.execute("SELECT status FROM tasks WHERE ref = ?", [task.ref]).fetchone()
            return str(row[0])
        finally:
            connection.close()


def nothing() -> None:
    """How work is cancelled that never is."""


async def no_space(_work: object) -> None:
    """What a database on a full file system does instead of its work."""
    raise OSError(errno.ENOSPC, "No space left on device")


def with_key(key: str, value: str) -> Callable[[Task], Mapping[str, object]]:
    return lambda task: {"other_config": {**task.other_config, key: value}}
