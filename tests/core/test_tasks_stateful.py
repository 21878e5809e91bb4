# Random orders of everything that may happen to a task, against a few lines that say what must come out.

import tempfile
from typing import Any

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from trio.testing import MockClock

from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.limits import Limits
from gateway.core.tasks import Operation, Tasks, TaskStatus

FINAL = {TaskStatus.SUCCESS, TaskStatus.FAILURE, TaskStatus.CANCELLED}


class TaskLife(RuleBasedStateMachine):
    # Each rule is one run of trio; operations stay open between rules, as they do between requests.
    tasks = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.expected: dict[str, TaskStatus] = {}
        self.running: dict[str, Operation] = {}

    def run(self, function: Any, *arguments: Any) -> Any:
        return trio.run(function, *arguments, clock=MockClock(autojump_threshold=0))

    def attempt(self, function: Any, *arguments: Any) -> Any:
        # What `function` returns, or the code of its refusal.
        try:
            return self.run(function, *arguments)
        except XenAPIError as refusal:
            return refusal.code

    async def open(self) -> None:
        self.database = await Database.open(f"{self.directory.name}/gateway.sqlite3")
        self.board = await Tasks.load(self.database, Events(), limits=Limits())

    @initialize()
    def start(self) -> None:
        self.run(self.open)

    @rule(target=tasks)
    def create(self) -> str:
        async def create() -> str:
            return (await self.board.create("t")).ref

        ref: str = self.run(create)
        self.expected[ref] = TaskStatus.PENDING
        return ref

    @rule(ref=tasks)
    def begin(self, ref: str) -> None:
        outcome = self.attempt(self.board._begin, ref, lambda: None)
        if self.expected.get(ref) is TaskStatus.PENDING and ref not in self.running:
            assert isinstance(outcome, Operation)
            self.running[ref] = outcome
        else:
            assert isinstance(outcome, str)

    @rule(ref=tasks, error=st.sampled_from(["", "VDI_IO_ERROR", "TASK_CANCELLED"]))
    def end(self, ref: str, error: str) -> None:
        operation = self.running.pop(ref, None)
        if operation is None:
            return
        if error:
            told = "TASK_CANCELLED" if operation.cancel_requested else error
            operation.error = XenAPIError(told)
        self.run(self.board._end, operation)
        if ref in self.expected:
            code = None if operation.error is None else operation.error.code
            self.expected[ref] = {
                None: TaskStatus.SUCCESS,
                "TASK_CANCELLED": TaskStatus.CANCELLED,
            }.get(code, TaskStatus.FAILURE)

    @rule(ref=tasks)
    def cancel(self, ref: str) -> None:
        outcome = self.attempt(self.board.cancel, ref)
        status = self.expected.get(ref)
        if status is TaskStatus.PENDING:
            assert outcome is None
            is_running = ref in self.running
            self.expected[ref] = TaskStatus.CANCELLING if is_running else TaskStatus.CANCELLED
            assert not is_running or self.running[ref].cancel_requested
        elif status is None:
            assert outcome == "HANDLE_INVALID"
        elif status in {TaskStatus.CANCELLING, TaskStatus.CANCELLED}:
            assert outcome is None
        else:
            assert outcome == "OPERATION_NOT_ALLOWED"

    @rule(ref=tasks)
    def refuse(self, ref: str) -> None:
        done = self.attempt(self.board.fail, ref, XenAPIError("VDI_IN_USE"))
        assert done == (self.expected.get(ref) is TaskStatus.PENDING and ref not in self.running)
        if done:
            self.expected[ref] = TaskStatus.FAILURE

    @rule(ref=tasks, status=st.sampled_from(sorted(FINAL)))
    def set_status(self, ref: str, status: TaskStatus) -> None:
        outcome = self.attempt(self.board.set_status, ref, status)
        if outcome is None:
            assert self.expected[ref] is TaskStatus.PENDING
            assert ref not in self.running
            self.expected[ref] = status

    @rule(ref=consumes(tasks))
    def destroy(self, ref: str) -> None:
        outcome = self.attempt(self.board.destroy, ref)
        assert (outcome is None) == (self.expected.pop(ref, None) is not None)

    @rule()
    def restart_after_a_crash(self) -> None:
        async def restart() -> None:
            await self.database.aclose()
            await self.open()
            await self.board._interrupt_unannounced()

        self.run(restart)
        for ref in self.running.keys() & self.expected.keys():
            is_cancelling = self.expected[ref] is TaskStatus.CANCELLING
            self.expected[ref] = TaskStatus.CANCELLED if is_cancelling else TaskStatus.FAILURE
        self.running.clear()

    @invariant()
    def every_task_is_what_it_must_be_in_memory_and_on_disk(self) -> None:
        if not hasattr(self, "board"):
            return

        async def both() -> list[dict[str, TaskStatus]]:
            again = await Tasks.load(self.database, Events())
            return [{task.ref: task.status for task in board.all()} for board in (self.board, again)]

        assert self.run(both) == [self.expected, self.expected]

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.run(self.database.aclose)
        self.directory.cleanup()


TestTaskLife = TaskLife.TestCase
TestTaskLife.settings = settings(max_examples=15, stateful_step_count=25)
