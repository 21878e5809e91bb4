"""What clients may do with tasks: with their own ones, with those of others and of the gateway."""

import pytest
import trio

from gateway.core.tasks import TaskStatus
from tests.core.refusal import refused
from tests.core.task_board import OPERATOR, OWNER, STRANGER, Board, nothing, with_key


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
