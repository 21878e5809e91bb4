"""What an operation tells while it runs: progress and details, asked for or as events."""

from collections.abc import Callable
from functools import partial

import pytest
import trio
from sqlalchemy import Connection
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.tasks import Task, TaskStatus
from tests.core.task_board import Board, nothing, with_key


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


async def test_a_task_whose_end_is_being_written_down_is_as_far_as_it_was(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await board.task()
    write = board.database.run
    seen: list[Task] = []

    async def look_first(work: Callable[[Connection], object]) -> object:
        seen.append(board.tasks.get(task.ref))
        return await write(work)

    async with board.tasks.operation(task, nothing) as operation:
        operation.progress = 0.75
        operation.details = lambda: {"moved": "3"}
        monkeypatch.setattr(board.database, "run", look_first)
    assert [(each.status, each.progress, each.other_config) for each in seen] == [
        (TaskStatus.PENDING, 0.75, {"moved": "3"})
    ]
