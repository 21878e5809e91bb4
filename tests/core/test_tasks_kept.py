"""How long tasks are kept: over a restart, until their holder is back, and for a day once finished."""

import sqlite3
from dataclasses import replace
from datetime import timedelta

import pytest
import trio
from sqlalchemy.exc import OperationalError
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.limits import Limits
from gateway.core.task_table import TaskTable
from gateway.core.tasks import Task, TaskStatus
from tests.core.refusal import refused
from tests.core.task_board import Board, nothing


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
    assert [task.ref for task in board.tasks.all()] == [
        own.ref,
        pending.ref,
        *(task.ref for task in made[1:]),
    ]
    for _ in range(3):
        await board.tasks.cancel((await board.task()).ref)
    assert {task.ref for task in board.tasks.all()} >= {own.ref, pending.ref}
    await board.tasks.cancel((await board.task()).ref)
    assert own.ref not in {task.ref for task in board.tasks.all()}
    count = len(board.tasks.all())
    await board.restart()
    assert len(board.tasks.all()) == count == 5


async def test_tasks_that_clients_leave_pending_push_no_end_of_an_operation_out(board: Board) -> None:
    board.limits = replace(Limits(), task_keep=3)
    await board.restart()
    for _ in range(3):
        await board.task()
    task = await board.task(client_made=False)
    async with board.tasks.operation(task, nothing):
        pass
    assert board.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_a_client_cannot_fill_the_memory_with_pending_tasks(board: Board) -> None:
    board.limits = replace(Limits(), task_keep=3)
    await board.restart()
    for _ in range(3):
        await board.task()
    with refused("TOO_MANY_PENDING_TASKS", "3"):
        await board.task()
    await board.task(client_made=False)


async def test_a_user_fills_the_list_for_nobody_else(board: Board) -> None:
    board.limits = replace(Limits(), task_keep=3)
    await board.restart()
    theirs = await board.tasks.create("import", user="bob", client_made=False)
    async with board.tasks.operation(theirs, nothing):
        pass
    for _ in range(4):
        await board.tasks.cancel((await board.task()).ref)
    for _ in range(3):
        await board.task()
    assert board.tasks.get(theirs.ref).status is TaskStatus.SUCCESS
    await board.tasks.create("import", user="bob", client_made=True)


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
    assert len(board.tasks) == 2 + 1
