"""What cancelling a task does to its work, and what becomes of the task."""

from collections.abc import Callable

import pytest
import trio

from gateway.core.tasks import Operation, Task, TaskStatus
from tests.core.refusal import refused
from tests.core.task_board import Board, no_space, nothing


async def run_until_cancelled(
    board: Board, task: Task, *, started: Callable[[Operation], None] = lambda _operation: None
) -> None:
    with trio.CancelScope() as scope:
        async with board.tasks.operation(task, scope.cancel) as operation:
            started(operation)
            await trio.sleep_forever()


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


async def test_cancelling_stops_the_work_even_if_it_cannot_be_written_down(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await board.task()
    called: list[bool] = []

    with refused("TASK_CANCELLED"):
        async with board.tasks.operation(task, lambda: called.append(True)):
            monkeypatch.setattr(board.database, "run", no_space)
            with pytest.raises(OSError, match="No space"):
                await board.tasks.cancel(task.ref)
            assert called == [True]
            raise ConnectionResetError
    assert board.tasks.get(task.ref).status is TaskStatus.CANCELLED
