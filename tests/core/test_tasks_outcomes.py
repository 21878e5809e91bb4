"""How a task ends: as its work does, durably, and only once.

The trap is an end that somebody sees before it is written down: a crash would undo it.
"""

import errno
from typing import Any

import pytest
import trio

from gateway.core.clock import EPOCH
from gateway.core.errors import XenAPIError
from gateway.core.refs import new_ref, new_uuid
from gateway.core.tasks import TaskStatus
from tests.core.refusal import refused
from tests.core.task_board import HOST, Board, no_space, nothing


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
    gone = await board.task()
    await board.tasks.destroy(gone.ref)
    for uuid in (new_uuid(), gone.uuid):
        with refused("UUID_INVALID", "task"):
            board.tasks.by_uuid(uuid)


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

    with refused("INTERNAL_ERROR"):
        async with board.tasks.operation(task, nothing):
            monkeypatch.setattr(board.database, "run", no_space)
    ended = board.tasks.get(task.ref)
    assert (ended.status, ended.error_info[0]) == (TaskStatus.FAILURE, "INTERNAL_ERROR")
    assert board.stored(task) == "pending"


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
