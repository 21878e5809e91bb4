"""A call that runs under a task on the gateway, followed from here to its end.

The trap: Ctrl-C may come when the work is done, so what became of it is asked for afterwards; and before the
answer to the call nobody knows yet what there is to cancel.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

from gateway.cli.connection import CallRefusedError, Connection, error_text
from gateway.cli.door import DoorClosedError
from gateway.cli.output import CommandError
from gateway.cli.progress import Display

_LOOK_SECONDS: Final = 0.1
_CANCEL_SECONDS: Final = 10.0


class Followed:
    """One asynchronous call of `method`. `noun` is what people call the work; `look` sees each record."""

    def __init__(
        self,
        connection: Connection,
        method: str,
        arguments: tuple[Any, ...],
        *,
        noun: str,
        look: Callable[[dict[str, Any]], None],
    ) -> None:
        self._connection = connection
        self._method = method
        self._arguments = arguments
        self._noun = noun
        self._look = look
        self._task = ""

    def record(self, display: Display) -> dict[str, Any]:
        """Wait for the record of the task's success. CommandError says why there is none."""
        try:
            with first_interrupt_waits():
                self._task = self._connection.call(f"Async.{self._method}", *self._arguments)
            record = self._ended()
        except KeyboardInterrupt:
            self._interrupted(display)
            raise
        except DoorClosedError as lost:
            raise CommandError(
                f"{lost}; the {self._noun} may go on: look with task-watch {self._task}"
            ) from None
        if record["status"] != "success":
            code, *details = record["error_info"] or ["TASK_CANCELLED", self._task]
            raise CommandError(error_text(self._method, code, details))
        return record

    def _ended(self, seconds: float | None = None) -> dict[str, Any]:
        """The task's record once it has ended, or after so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            record: dict[str, Any] = self._connection.call("task.get_record", self._task)
            ended = record["status"] not in ("pending", "cancelling")
            if ended or (until is not None and time.monotonic() >= until):
                return record
            self._look(record)
            time.sleep(_LOOK_SECONDS)

    def _interrupted(self, display: Display) -> None:
        """Cancel, and say what is left if it isn't nothing."""
        if not self._task:
            display.note(f"the {self._noun} may go on; look with task-list")
            return
        # The connection may be in the middle of a call.
        self._connection.restart(_CANCEL_SECONDS)
        status = "unknown"
        with suppress(CommandError):
            with suppress(CallRefusedError):  # it has ended
                self._connection.call("task.cancel", self._task)
            status = self._ended(_CANCEL_SECONDS)["status"]
        if status == "success":
            display.note(f"the {self._noun} was done already; vdi-list shows it")
        elif status not in ("cancelled", "failure"):
            display.note(f"the task {self._task} could not be cancelled; look with task-watch")


def made_by(record: dict[str, Any]) -> str:
    """The reference that a success has as its result."""
    result: str = record["result"]
    return result.removeprefix("<value>").removesuffix("</value>")


@contextmanager
def first_interrupt_waits() -> Iterator[None]:
    """Raise the first Ctrl-C at the end of the block: not before it is known what there is to cancel.

    The second is raised at once, for a gateway that doesn't answer.
    """
    came = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
