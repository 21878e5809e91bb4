"""The class task: every operation that takes time, and those that clients make for themselves.

Anybody may make tasks and work on their own; the tasks of others take a pool-operator, as in XenServer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gateway.core.roles import Role
from gateway.core.task import TaskStatus
from gateway.core.tasks import Tasks
from gateway.xenapi.datamodel import ApiClass, Call, Message, Parameter, computed, fixed, message, stored
from gateway.xenapi.types import (
    DATETIME,
    FLOAT,
    STRING,
    STRING_MAP,
    STRINGS,
    Choice,
    MapOf,
    Reference,
    SetOf,
    WireType,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.core.sessions import Identity
    from gateway.core.task import Task
    from gateway.xenapi.estate import Estate

STATUS: Final = Choice("task_status_type", tuple(status.value for status in TaskStatus))
OPERATIONS: Final = Choice("task_allowed_operations", ("cancel", "destroy"))


def _allowed_operations(task: Task, estate: Estate) -> tuple[str, ...]:
    return ("cancel", "destroy") if estate.tasks.can_cancel(task.ref) else ("destroy",)


FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    stored("name_label", STRING, "a human-readable name"),
    stored("name_description", STRING, "a human-readable description"),
    computed("allowed_operations", SetOf(OPERATIONS), "what may be started now", _allowed_operations),
    fixed("current_operations", MapOf(OPERATIONS, STRING), {}, "what is being done, by task"),
    stored("created", DATETIME, "when the task was made"),
    stored("finished", DATETIME, "when it ended; 1970 while it has not"),
    stored("status", STATUS, "how far it has come"),
    stored("resident_on", Reference("host"), "the host that works on it"),
    stored(
        "progress", FLOAT, "the part of the work that is done, from 0 to 1; being 1 does not mean success"
    ),
    stored("type", STRING, "type of the result"),
    stored("result", STRING, "the result as XML-RPC, once the task has succeeded"),
    stored("error_info", STRINGS, "code and parameters of the error, once the task has failed"),
    stored("other_config", STRING_MAP, "additional configuration", writer=Role.READ_ONLY),
    stored("subtask_of", Reference("task"), "the task of which it is a part"),
    computed(
        "subtasks",
        SetOf(Reference("task")),
        "the tasks that are parts of it",
        lambda task, estate: tuple(other.ref for other in estate.tasks.subtasks_of(task.ref)),
    ),
    fixed("backtrace", STRING, "()", "always empty"),
)

_SELF = Parameter("self", Reference("task"), "the task")


@message(
    "create",
    "Make a task that the client works on, or gives to an upload. Destroy it when it is not needed any more.",
    Parameter("label", STRING, "short label of the task"),
    Parameter("description", STRING, "longer description"),
    result=Reference("task"),
    asynchronous=False,
)
async def create(call: Call, label: str, description: str) -> str:
    identity = call.identity
    task = await call.estate.tasks.create(
        label,
        description,
        user=identity.user,
        session_uuid=identity.session.uuid if identity.session is not None else "",
        client_made=True,
    )
    return task.ref


@message("destroy", "Destroy the task object. What runs under it goes on.", _SELF, asynchronous=False)
async def destroy(call: Call, ref: str) -> None:
    await call.estate.tasks.destroy(ref, call.identity)


@message(
    "cancel",
    "Ask a task to stop. It may take its time, or finish all the same.",
    _SELF,
    errors=("OPERATION_NOT_ALLOWED",),
)
async def cancel(call: Call, ref: str) -> None:
    await call.estate.tasks.cancel(ref, call.identity)


def _setter(name: str, doc: str, value_type: WireType, change: Callable[..., Awaitable[None]]) -> Message:
    """A message that changes a task of the client's own making; the gateway's tasks end by themselves."""

    async def run(call: Call, ref: str, value: Any) -> None:
        await change(call.estate.tasks, ref, value, call.identity)

    return message(
        name,
        doc,
        _SELF,
        Parameter("value", value_type, "the new value"),
        asynchronous=False,
        errors=("OPERATION_NOT_ALLOWED",),
    )(run)


async def _set_status(tasks: Tasks, ref: str, value: str, actor: Identity) -> None:
    await tasks.set_status(ref, TaskStatus(value), actor)


TASK = ApiClass(
    name="task",
    doc="An operation that takes time.",
    fields=FIELDS,
    messages=(
        create,
        destroy,
        cancel,
        _setter("set_status", "End a task: success, failure or cancelled.", STATUS, _set_status),
        _setter("set_progress", "Set the progress of a task, from 0 to 1.", FLOAT, Tasks.set_progress),
        _setter("set_result", "Set the result of a task.", STRING, Tasks.set_result),
        _setter("set_error_info", "Set the error of a task.", STRINGS, Tasks.set_error_info),
    ),
    objects=lambda estate: estate.tasks,
    owned=True,
)
