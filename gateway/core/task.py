"""What a task is, and the operation that works under one. `tasks.Tasks` rules over both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, Protocol

import structlog

from gateway.core.clock import EPOCH
from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF
from gateway.core.roles import Permission, Role

log: Final[structlog.typing.FilteringBoundLogger] = structlog.get_logger()


class TaskStatus(StrEnum):
    """XenAPI's task_status_type."""

    PENDING = "pending"
    SUCCESS = "success"
    FAILURE = "failure"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in {TaskStatus.SUCCESS, TaskStatus.FAILURE, TaskStatus.CANCELLED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task as it was when it was asked for. `progress` is 0 to 1; `finished` is 1970 until it has."""

    ref: str
    uuid: str
    name_label: str = ""
    name_description: str = ""
    created: datetime
    finished: datetime = EPOCH
    status: TaskStatus = TaskStatus.PENDING
    progress: float = 0.0
    type: str = "<none/>"
    result: str = ""
    error_info: tuple[str, ...] = ()
    other_config: dict[str, str] = field(default_factory=dict)
    subtask_of: str = NULL_REF
    resident_on: str = NULL_REF
    user: str = ""
    session_uuid: str = ""
    # By task.create; else the gateway made it for one of its own operations.
    client_made: bool = True
    # An operation of the gateway works under it, or soon will: nobody else ends it.
    worked_on: bool = False

    def check_open(self) -> None:
        """Raise TASK_CANCELLED, or what else it ended with, unless work may go on under this task."""
        if self.status is TaskStatus.PENDING:
            return
        if self.status in {TaskStatus.CANCELLING, TaskStatus.CANCELLED}:
            raise XenAPIError("TASK_CANCELLED", self.ref)
        if self.error_info:
            raise XenAPIError(*self.error_info)
        raise XenAPIError("OPERATION_NOT_ALLOWED", f"the task has ended already ({self.status})")

    def check_actor(self, actor: "Actor | None", permission: Permission) -> None:
        """Raises RBAC_PERMISSION_DENIED for who has neither made the task nor `permission`; None may."""
        if actor is not None and actor.user != self.user:
            permission.check(actor.role)


class Actor(Protocol):
    """Who asks: `sessions.Identity` is one."""

    @property
    def user(self) -> str: ...

    @property
    def role(self) -> Role: ...


class Operation:
    """Work that runs under a task. Set `progress` (0 to 1, or a function giving it, called on the trio
    thread) and `result`.
    """

    def __init__(self, task: str, cancel: Callable[[], None] | None) -> None:
        self.task: Final = task
        self.progress: float | Callable[[], float] = 0.0
        self.result = ""
        # What else there is to tell, as keys of the task's other_config: while it runs, and what it was.
        self.details: Callable[[], Mapping[str, str]] = dict
        # Somebody cancelled the task; the work should end soon with any exception.
        self.cancel_requested = False
        # What the task says when the work has ended otherwise than well.
        self.error: XenAPIError | None = None
        self._cancel = cancel

    @property
    def cancellable(self) -> bool:
        return self._cancel is not None

    def request_cancel(self) -> None:
        """Ask the work to stop. Raises OPERATION_NOT_ALLOWED where it cannot."""
        if self._cancel is None:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "the operation of this task cannot be cancelled")
        self.cancel_requested = True
        self._cancel()

    def current_details(self) -> Mapping[str, str]:
        """What else there is to tell now."""
        try:
            return self.details()
        except Exception:
            log.exception("a function for the details of a task failed", task=self.task)
            self.details = dict
            return {}

    def current_progress(self) -> float:
        """How far the work is, 0 to 1."""
        if not callable(self.progress):
            return _clamped(self.progress)
        try:
            return _clamped(self.progress())
        except Exception:
            log.exception("a progress function failed", task=self.task)
            self.progress = 0.0
            return 0.0


def _clamped(progress: float) -> float:
    # Written so that a NaN becomes 0.
    return min(progress, 1.0) if progress > 0.0 else 0.0
