import errno
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy.exc import OperationalError
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.clock import EPOCH, utc_now
from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.limits import Limits
from gateway.core.refs import new_ref, new_uuid
from gateway.core.roles import Role
from gateway.core.task_table import TaskTable
from gateway.core.tasks import Operation, Task, Tasks, TaskStatus

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


@pytest.fixture
async def board(tmp_path: Path) -> AsyncIterator[Board]:
    board = await Board(str(tmp_path / "gateway.sqlite3")).open()
    yield board
    await board.database.aclose()


@contextmanager
def refused(*error_info: str) -> Iterator[None]:
    with pytest.raises(XenAPIError) as refusal:
        yield
    assert tuple(refusal.value.error_info[: len(error_info)]) == error_info


def nothing() -> None:
    pass


async def run_until_cancelled(
    board: Board, task: Task, *, started: Callable[[Operation], None] = lambda _operation: None
) -> None:
    with trio.CancelScope() as scope:
        async with board.tasks.operation(task, scope.cancel) as operation:
            started(operation)
            await trio.sleep_forever()


async def test_a_new_task_is_pending_and_found(board: Board) -> None:
    task = await board.task(other_config={"a": "b"})
    assert (task.status, task.progress, task.finished) == (TaskStatus.PENDING, 0.0, EPOCH)
    assert (task.user, task.session_uuid, task.resident_on) == ("ann", "s", HOST)
    assert board.tasks.get(task.ref) == board.tasks.by_uuid(task.uuid.upper()) == task
    assert board.tasks.all() == board.tasks.by_name_label("import") == [task]
    part = await board.task(subtask_of=task.ref)
    assert board.tasks.subtasks_of(task.ref) == [part]
    await board.restart()
    assert board.tasks.all() == [task, part]


async def test_what_is_not_there_is_named(board: Board) -> None:
    missing = new_ref()
    with refused("HANDLE_INVALID", "task", missing):
        board.tasks.get(missing)
    with refused("HANDLE_INVALID", "task", missing):
        await board.tasks.cancel(missing)
    with refused("HANDLE_INVALID", "task", missing):
        async with board.tasks.operation(missing, nothing):
            pytest.fail("no operation without a task")
    with refused("UUID_INVALID", "task"):
        board.tasks.by_uuid(new_uuid())


async def test_work_that_ends_well_is_a_success_with_its_result(board: Board) -> None:
    task = await board.task()
    async with board.tasks.operation(task, nothing) as operation:
        operation.progress = 0.5
        assert board.tasks.get(task.ref).progress == 0.5
        operation.result = "<value>done</value>"
    ended = board.tasks.get(task.ref)
    assert (ended.status, ended.progress, ended.result) == (TaskStatus.SUCCESS, 1.0, "<value>done</value>")
    assert ended.finished == board.now
    assert operation.error is None
    await board.restart()
    assert board.tasks.get(task.ref) == ended


async def test_success_is_durable_before_anybody_sees_it(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await board.task()
    run = board.database.run
    steps: list[tuple[str, str]] = []

    async def watched(work: Any) -> Any:
        steps.append((board.tasks.get(task.ref).status, board.stored(task)))
        result = await run(work)
        steps.append((board.tasks.get(task.ref).status, board.stored(task)))
        return result

    async with board.tasks.operation(task, nothing):
        monkeypatch.setattr(board.database, "run", watched)
    assert steps == [("pending", "pending"), ("pending", "success")]
    assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS


@pytest.mark.parametrize(
    ("error", "error_info"),
    [
        (XenAPIError("VDI_TOO_SMALL", "v", "1"), ("VDI_TOO_SMALL", "v", "1")),
        (OSError(errno.ENOSPC, "No space left on device"), ("SR_FULL",)),
        (OSError(errno.EIO, "Input/output error"), ("VDI_IO_ERROR",)),
        (KeyError("bug"), ("INTERNAL_ERROR", "KeyError: 'bug'")),
        (ExceptionGroup("", [XenAPIError("VDI_MISSING")]), ("VDI_MISSING",)),
    ],
)
async def test_work_that_raises_is_a_failure_and_the_exception_goes_on(
    board: Board, error: Exception, error_info: tuple[str, ...]
) -> None:
    task = await board.task()
    with pytest.raises(type(error)) as raised:
        async with board.tasks.operation(task, nothing) as operation:
            operation.progress = 0.25
            raise error
    assert raised.value is error
    ended = board.tasks.get(task.ref)
    assert (ended.status, ended.progress) == (TaskStatus.FAILURE, 0.25)
    assert ended.error_info[: len(error_info)] == error_info
    assert operation.error is not None
    assert tuple(operation.error.error_info) == ended.error_info
    await board.restart()
    assert board.tasks.get(task.ref) == ended


async def test_cancelling_stops_the_work_and_the_task_is_cancelled_when_it_has(board: Board) -> None:
    task = await board.task()
    seen: list[Operation] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_until_cancelled(board, task, started=seen.append))
        while not seen:
            await trio.lowlevel.checkpoint()
        assert board.tasks.can_cancel(task.ref)
        await board.tasks.cancel(task.ref)
    ended = board.tasks.get(task.ref)
    assert (ended.status, ended.error_info) == (TaskStatus.CANCELLED, ("TASK_CANCELLED", task.ref))
    assert board.stored(task) == "cancelled"
    assert seen[0].error is not None
    assert not board.tasks.can_cancel(task.ref)
    await board.tasks.cancel(task.ref)


async def test_an_exception_that_cancelling_provoked_goes_on_as_task_cancelled(board: Board) -> None:
    task = await board.task()
    with refused("TASK_CANCELLED", task.ref):
        async with board.tasks.operation(task, nothing) as operation:
            await board.tasks.cancel(task.ref)
            assert operation.cancel_requested
            assert board.tasks.get(task.ref).status is TaskStatus.CANCELLING
            assert board.stored(task) == "cancelling"
            raise ConnectionResetError("the body was aborted")
    assert board.tasks.get(task.ref).status is TaskStatus.CANCELLED


async def test_work_that_finished_although_it_was_cancelled_is_a_success(board: Board) -> None:
    task = await board.task()
    async with board.tasks.operation(task, nothing):
        await board.tasks.cancel(task.ref)
        await board.tasks.cancel(task.ref)
    assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_a_task_without_work_is_cancelled_at_once(board: Board) -> None:
    task = await board.task()
    await board.tasks.cancel(task.ref)
    ended = board.tasks.get(task.ref)
    assert (ended.status, ended.error_info) == (TaskStatus.CANCELLED, ("TASK_CANCELLED", task.ref))
    with refused("TASK_CANCELLED", task.ref):
        async with board.tasks.operation(task, nothing):
            pytest.fail("the task was cancelled")


async def test_work_that_cannot_stop_refuses_to_be_cancelled(board: Board) -> None:
    task = await board.task()
    async with board.tasks.operation(task, None):
        assert not board.tasks.can_cancel(task.ref)
        with refused("OPERATION_NOT_ALLOWED"):
            await board.tasks.cancel(task.ref)
    assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_a_finished_task_neither_cancels_nor_runs_again(board: Board) -> None:
    task = await board.task()
    async with board.tasks.operation(task, nothing):
        pass
    with refused("OPERATION_NOT_ALLOWED"):
        await board.tasks.cancel(task.ref)
    with refused("OPERATION_NOT_ALLOWED"):
        async with board.tasks.operation(task, nothing):
            pytest.fail("the task is over")
    assert not await board.tasks.fail(task.ref, XenAPIError("VDI_MISSING"))
    assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_two_operations_do_not_share_a_task(board: Board) -> None:
    task = await board.task()
    async with board.tasks.operation(task, nothing):
        with refused("OTHER_OPERATION_IN_PROGRESS", "task", task.ref):
            async with board.tasks.operation(task.ref, nothing):
                pytest.fail("the first still runs")
        assert not await board.tasks.fail(task.ref, XenAPIError("VDI_IN_USE")), "the first is not to blame"
    assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_stopping_the_gateway_fails_the_task_durably(board: Board) -> None:
    task = await board.task()
    with trio.CancelScope() as shutdown:
        async with board.tasks.operation(task, nothing):
            shutdown.cancel()
            await trio.sleep_forever()
    ended = board.tasks.get(task.ref)
    assert (ended.status, ended.error_info) == (TaskStatus.FAILURE, ("TASK_INTERRUPTED",))
    assert board.stored(task) == "failure"


async def test_an_operation_goes_on_when_its_task_is_destroyed(board: Board) -> None:
    task = await board.task()
    async with board.tasks.operation(task, nothing) as operation:
        await board.tasks.destroy(task.ref)
        operation.progress = 0.5
        with refused("HANDLE_INVALID", "task", task.ref):
            board.tasks.get(task.ref)
    assert board.tasks.all() == []
    other = await board.task()
    with pytest.raises(KeyError):
        async with board.tasks.operation(other, nothing):
            await board.tasks.destroy(other.ref)
            raise KeyError
    await board.restart()
    assert board.tasks.all() == []


async def test_a_refusal_fails_the_task_that_was_given(board: Board) -> None:
    task = await board.task()
    assert await board.tasks.fail(task.ref, XenAPIError("VDI_IN_USE", "v", "import"))
    ended = board.tasks.get(task.ref)
    assert (ended.status, ended.error_info) == (TaskStatus.FAILURE, ("VDI_IN_USE", "v", "import"))
    with refused("VDI_IN_USE", "v", "import"):
        async with board.tasks.operation(task, nothing):
            pytest.fail("the task has failed")
    assert not await board.tasks.fail(new_ref(), XenAPIError("VDI_MISSING"))


async def test_success_that_cannot_be_written_down_is_none(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await board.task()

    async def fail(_work: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with refused("INTERNAL_ERROR"):
        async with board.tasks.operation(task, nothing):
            monkeypatch.setattr(board.database, "run", fail)
    ended = board.tasks.get(task.ref)
    assert (ended.status, ended.error_info[0]) == (TaskStatus.FAILURE, "INTERNAL_ERROR")
    assert board.stored(task) == "pending"


async def test_cancelling_stops_the_work_even_if_it_cannot_be_written_down(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await board.task()
    called: list[bool] = []

    async def fail(_work: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with refused("TASK_CANCELLED"):
        async with board.tasks.operation(task, lambda: called.append(True)):
            monkeypatch.setattr(board.database, "run", fail)
            with pytest.raises(OSError, match="No space"):
                await board.tasks.cancel(task.ref)
            assert called == [True]
            raise ConnectionResetError
    assert board.tasks.get(task.ref).status is TaskStatus.CANCELLED


async def test_progress_is_read_when_asked_for_and_stays_between_0_and_1(board: Board) -> None:
    task = await board.task()
    async with board.tasks.operation(task, nothing) as operation:
        for done, told in ((0.125, 0.125), (-3.0, 0.0), (7.0, 1.0), (float("nan"), 0.0)):
            operation.progress = partial(float, done)
            assert board.tasks.get(task.ref).progress == told
            assert board.tasks.all()[0].progress == told
        operation.progress = lambda: 1 / 0
        assert board.tasks.get(task.ref).progress == 0.0


async def test_what_an_operation_tells_is_in_other_config_while_it_runs_and_stays(board: Board) -> None:
    task = await board.tasks.create("t", other_config={"vdi": "v", "moved": "not yet"}, client_made=False)
    moved = 1
    async with board.tasks.operation(task, nothing) as operation:
        operation.details = lambda: {"moved": str(moved)}
        assert board.tasks.get(task.ref).other_config == {"vdi": "v", "moved": "1"}
        moved = 2
        await board.tasks.edit(task.ref, with_key("a", "b"))
        assert board.tasks.all()[0].other_config == {"vdi": "v", "moved": "2", "a": "b"}
    assert board.tasks.get(task.ref).other_config == {"vdi": "v", "moved": "2", "a": "b"}


async def test_an_operation_that_fails_to_tell_details_ends_as_if_it_had_none(board: Board) -> None:
    task = await board.tasks.create("t", other_config={"vdi": "v"}, client_made=False)
    async with board.tasks.operation(task, nothing) as operation:
        operation.details = lambda: {"moved": str(1 / 0)}
        assert board.tasks.get(task.ref).other_config == {"vdi": "v"}
        operation.details = lambda: {"moved": str(1 / 0)}
    assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_what_an_operation_tells_is_an_event_also_without_progress(
    board: Board, mock_clock: MockClock
) -> None:
    task = await board.task()
    moved = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.tasks.run)
        async with board.tasks.operation(task, nothing) as operation:
            operation.details = lambda: {"moved": str(moved)}
            mock_clock.jump(1)
            await wait_all_tasks_blocked()
            for told in (1, 0):
                moved = 1
                start = board.events.counter
                mock_clock.jump(1)
                await wait_all_tasks_blocked()
                assert board.events.counter - start == told
        nursery.cancel_scope.cancel()


async def test_progress_is_an_event_once_a_second_at_most_and_only_if_it_moves(
    board: Board, mock_clock: MockClock
) -> None:
    task = await board.task()
    done = 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.tasks.run)
        async with board.tasks.operation(task, nothing) as operation:
            operation.progress = lambda: done
            await wait_all_tasks_blocked()
            start = board.events.counter
            for tick in range(20):
                done = tick / 20
                mock_clock.jump(0.25)
                await wait_all_tasks_blocked()
            assert 4 <= board.events.counter - start <= 6
            still = board.events.counter
            for _ in range(20):
                mock_clock.jump(1)
                await wait_all_tasks_blocked()
            assert board.events.counter - still <= 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("method", ["cancel", "destroy"])
async def test_tasks_of_others_are_for_operators(board: Board, method: str) -> None:
    for actor in (OWNER, OPERATOR):
        task = await board.task()
        with refused("RBAC_PERMISSION_DENIED", f"task.{method}/any"):
            await getattr(board.tasks, method)(task.ref, STRANGER)
        assert board.tasks.get(task.ref).status is TaskStatus.PENDING
        await getattr(board.tasks, method)(task.ref, actor)


async def test_a_client_works_on_a_task_of_its_own(board: Board) -> None:
    task = await board.task()
    tasks = board.tasks
    await tasks.set_progress(task.ref, 0.5, OWNER)
    await tasks.set_result(task.ref, "r", OWNER)
    assert tasks.get(task.ref).progress == 0.5
    for progress in (1.5, -0.1, float("nan")):
        with refused("VALUE_NOT_SUPPORTED", "progress"):
            await tasks.set_progress(task.ref, progress)
    with refused("RBAC_PERMISSION_DENIED"):
        await tasks.set_status(task.ref, TaskStatus.SUCCESS, STRANGER)
    with refused("VALUE_NOT_SUPPORTED", "status", "cancelling"):
        await tasks.set_status(task.ref, TaskStatus.CANCELLING)
    await tasks.set_status(task.ref, TaskStatus.PENDING, OWNER)
    await tasks.set_status(task.ref, TaskStatus.SUCCESS, OWNER)
    ended = tasks.get(task.ref)
    assert (ended.status, ended.progress, ended.result) == (TaskStatus.SUCCESS, 1.0, "r")
    for status in TaskStatus:
        with refused("OPERATION_NOT_ALLOWED"):
            await tasks.set_status(task.ref, status)
    with refused("OPERATION_NOT_ALLOWED"):
        await tasks.set_progress(task.ref, 0.1)
    await board.restart()
    assert board.tasks.get(task.ref) == ended


async def test_a_client_fails_a_task_of_its_own_with_a_reason(board: Board) -> None:
    task = await board.task()
    await board.tasks.set_error_info(task.ref, ["MY_CODE", "x"], OWNER)
    await board.tasks.set_status(task.ref, TaskStatus.FAILURE, OWNER)
    assert board.tasks.get(task.ref).error_info == ("MY_CODE", "x")


async def test_a_client_does_not_end_what_the_gateway_works_on(board: Board) -> None:
    made_by_gateway = await board.task(client_made=False)
    given = await board.task()
    async with board.tasks.operation(given, nothing):
        for task in (made_by_gateway, given):
            for status in (TaskStatus.SUCCESS, TaskStatus.FAILURE):
                with refused("OPERATION_NOT_ALLOWED"):
                    await board.tasks.set_status(task.ref, status, OWNER)
            with refused("OPERATION_NOT_ALLOWED"):
                await board.tasks.set_progress(task.ref, 0.5, OWNER)


def with_key(key: str, value: str) -> Callable[[Task], Mapping[str, object]]:
    return lambda task: {"other_config": {**task.other_config, key: value}}


async def test_other_config_changes_at_any_time_and_loses_nothing(board: Board) -> None:
    task = await board.task()
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(board.tasks.edit, task.ref, with_key(str(number), "x"))
    async with board.tasks.operation(task, nothing):
        await board.tasks.edit(task.ref, with_key("y", "y"))
    await board.tasks.edit(task.ref, with_key("z", "z"), OWNER)
    with refused("RBAC_PERMISSION_DENIED"):
        await board.tasks.edit(task.ref, with_key("q", "q"), STRANGER)
    with pytest.raises(ValueError, match="own methods"):
        await board.tasks.edit(task.ref, lambda _task: {"status": TaskStatus.SUCCESS})
    await board.restart()
    assert board.tasks.get(task.ref).other_config.keys() == {*"0123456789yz"}


async def test_each_change_is_an_event(board: Board) -> None:
    task = await board.task()
    async with board.tasks.operation(task, nothing):
        pass
    changes = board.events.since(0)
    assert changes is not None
    assert [(change.class_name, change.operation, change.ref) for change in changes] == [
        ("task", "add", task.ref)
    ]
    await board.tasks.destroy(task.ref)
    gone = board.events.since(0)
    assert gone is not None
    assert gone[-1].operation == "del"


async def crash(board: Board, *tasks: Task) -> None:
    """What kill -9 leaves: work had begun under `tasks` and nobody wrote down how it ended."""
    for task in tasks:
        await board.tasks._begin(task.ref, nothing)
    await board.restart()


async def status_after(board: Board, clock: MockClock, seconds: float, task: Task) -> TaskStatus:
    """The status once `seconds` have passed since the start and everything that is due then has happened."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.tasks.run)
        await wait_all_tasks_blocked()
        clock.jump(seconds)
        probe = await board.task()
        await board.tasks.destroy(probe.ref)
        nursery.cancel_scope.cancel()
    return board.tasks.get(task.ref).status


async def test_after_a_restart_work_that_nobody_announces_has_failed_after_ten_seconds(
    board: Board, mock_clock: MockClock
) -> None:
    given, made_by_gateway = await board.task(), await board.task(client_made=False)
    await crash(board, given, made_by_gateway)
    assert board.tasks.get(given.ref).status is TaskStatus.PENDING
    assert await status_after(board, mock_clock, 9.9, given) is TaskStatus.PENDING
    assert await status_after(board, mock_clock, 10, given) is TaskStatus.FAILURE
    for task in (given, made_by_gateway):
        assert board.tasks.get(task.ref).error_info == ("TASK_INTERRUPTED",)
        assert board.stored(task) == "failure"
    with refused("TASK_INTERRUPTED"):
        board.tasks.announce(given.ref)


async def test_after_a_restart_a_task_that_only_its_client_works_on_stays_pending(
    board: Board, mock_clock: MockClock
) -> None:
    task = await board.task()
    await board.restart()
    assert await status_after(board, mock_clock, 10, task) is TaskStatus.PENDING


async def test_a_holder_that_comes_back_in_time_goes_on(board: Board, mock_clock: MockClock) -> None:
    task = await board.task()
    await crash(board, task)
    board.tasks.announce(task.ref)
    assert await status_after(board, mock_clock, 10, task) is TaskStatus.PENDING
    async with board.tasks.operation(task, nothing):
        pass
    assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_a_holder_learns_that_its_task_was_cancelled_while_it_was_away(
    board: Board, mock_clock: MockClock
) -> None:
    cancelled, cancelling, destroyed = [await board.task() for _ in range(3)]
    await board.tasks._begin(cancelling.ref, nothing)
    await board.tasks.cancel(cancelling.ref)
    await crash(board, cancelled, destroyed)
    await board.tasks.cancel(cancelled.ref)
    await board.tasks.destroy(destroyed.ref)
    for task in (cancelled, cancelling):
        with refused("TASK_CANCELLED", task.ref):
            board.tasks.announce(task.ref)
    with refused("HANDLE_INVALID", "task", destroyed.ref):
        board.tasks.announce(destroyed.ref)
    assert await status_after(board, mock_clock, 10, cancelling) is TaskStatus.CANCELLED


async def test_finished_tasks_go_after_a_day(board: Board, mock_clock: MockClock) -> None:
    finished, pending = await board.task(), await board.task()
    await board.tasks.cancel(finished.ref)
    board.now += timedelta(hours=23)
    await board.task()
    assert board.tasks.get(finished.ref).status is TaskStatus.CANCELLED
    board.now += timedelta(hours=1, seconds=1)
    await status_after(board, mock_clock, 3600, pending)
    with refused("HANDLE_INVALID", "task", finished.ref):
        board.tasks.get(finished.ref)
    await board.restart()
    assert finished.ref not in {task.ref for task in board.tasks.all()}


async def test_beyond_the_limit_the_oldest_finished_go_and_clients_own_last(board: Board) -> None:
    board.limits = replace(Limits(), task_keep=4)
    await board.restart()
    own = await board.task()
    await board.tasks.cancel(own.ref)
    pending = await board.task()
    made: list[Task] = []
    for _ in range(4):
        board.now += timedelta(seconds=1)
        made.append(await board.task(client_made=False))
        async with board.tasks.operation(made[-1], nothing):
            pass
    assert [task.ref for task in board.tasks.all()] == [own.ref, pending.ref, made[2].ref, made[3].ref]
    for _ in range(2):
        await board.task()
    assert {task.ref for task in board.tasks.all()} >= {own.ref, pending.ref}
    await board.task()
    assert own.ref not in {task.ref for task in board.tasks.all()}
    count = len(board.tasks.all())
    await board.restart()
    assert len(board.tasks.all()) == count == 4


async def test_a_client_cannot_fill_the_memory_with_pending_tasks(board: Board) -> None:
    board.limits = replace(Limits(), task_keep=3)
    await board.restart()
    for _ in range(3):
        await board.task()
    with refused("TOO_MANY_PENDING_TASKS", "3"):
        await board.task()
    await board.task(client_made=False)


async def test_old_tasks_that_cannot_be_removed_harm_no_other(
    board: Board, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.limits = replace(Limits(), task_keep=2)
    await board.restart()

    async def fail(_table: TaskTable, _refs: list[str]) -> None:
        raise OperationalError("DELETE", None, sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(TaskTable, "remove", fail)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(board.tasks.run)
            for _ in range(4):
                task = await board.task()
                async with board.tasks.operation(task, nothing):
                    pass
                assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS
            mock_clock.jump(3600)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert len(board.tasks) == 4
    await board.task()
    assert len(board.tasks) == 2
