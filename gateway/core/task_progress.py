"""What clients are told of a task's progress while it runs: an event once in a while, never each step.

The trap: progress itself lives in the operations and is read when somebody asks; here is only what was told.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import trio

from gateway.core.limits import Limits
from gateway.core.task import Operation
from gateway.core.task_table import TaskTable


class TaskProgress:
    """Tells of `operations`, the running ones by their tasks, every `task_progress_seconds`."""

    def __init__(self, table: TaskTable, operations: Mapping[str, Operation], limits: Limits) -> None:
        self._table: Final = table
        self._operations: Final = operations
        self._limits: Final = limits
        # What the last event told, and tasks whose client has set another progress since.
        self._told: Final[dict[str, tuple[float, Mapping[str, str]]]] = {}
        self._moved: set[str] = set()
        self._something_runs = trio.Event()

    def begun(self) -> None:
        """An operation runs now."""
        self._something_runs.set()

    def moved(self, ref: str) -> None:
        """A client has set its own task's progress."""
        self._moved.add(ref)
        self._something_runs.set()

    def ended(self, ref: str) -> None:
        """The operation of this task has ended, which is told in another way."""
        self._told.pop(ref, None)

    def forgotten(self, refs: Iterable[str]) -> None:
        """There are no such tasks any more."""
        self._moved.difference_update(refs)

    async def run(self) -> None:
        """Never returns."""
        while True:
            await self._something_runs.wait()
            await trio.sleep(self._limits.task_progress_seconds)
            moved, self._moved = self._moved, set()
            for ref, operation in self._operations.items():
                progress = operation.current_progress(), operation.current_details()
                if progress != self._told.get(ref, (0.0, {})):
                    self._told[ref] = progress
                    moved.add(ref)
            for ref in moved:
                if self._table.find(ref) is not None:
                    self._table.tell(ref)
            if not self._operations:
                self._something_runs = trio.Event()
