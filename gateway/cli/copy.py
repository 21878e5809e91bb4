"""`vdi-gateway vdi-copy`: a disk with all its bytes, in another SR or over another disk.

The gateway copies under a task; the command follows it. The trap: Ctrl-C may come when the copy is done, so
what became of it is asked for afterwards.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Annotated, Any, Final

from cyclopts import Parameter

from gateway.cli.arguments import Flag
from gateway.cli.connection import CallRefusedError, Connection, GatewayChoice, error_text
from gateway.cli.door import DoorClosedError
from gateway.cli.output import CommandError, UsageError
from gateway.cli.progress import Display, Transfer, figures_text
from gateway.cli.sr import find_sr
from gateway.cli.transfers import Progress, form_of
from gateway.cli.vdi import NULL_REF, Disk, find_vdi, print_made

_LOOK_SECONDS: Final = 0.1
_CANCEL_SECONDS: Final = 10.0


def vdi_copy(
    disk: Disk,
    sr: Annotated[str | None, Parameter(name=["--sr-uuid", "--sr"])] = None,
    *,
    into: Annotated[str | None, Parameter(name=["--into-vdi-uuid", "--into"])] = None,
    name: Annotated[str | None, Parameter(name=["--name-label", "--new-name-label", "--name"])] = None,
    json: Flag = False,
    progress: Progress = "auto",
    quiet: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Copy a virtual disk or snapshot with all its bytes, and print the copy's uuid: all of it, or nothing.

    The copy shares nothing with the disk. Others may read the disk meanwhile, nobody may write to it. Ctrl-C
    cancels the task on the gateway.

    Parameters
    ----------
    disk
        Uuid or name of the disk or snapshot.
    sr
        Uuid or name of the SR for the copy; may be left out when there is only one.
    into
        Uuid or name of a disk whose content is to be replaced, instead of making a new one. It must not be
        smaller; what it has more reads as zeroes afterwards.
    name
        Name of the copy; else it is called like the disk.
    json
        Print a JSON document.
    progress
        What to show on stderr: a bar, a line of JSON each second, or nothing. auto is a bar on a terminal,
        else JSON.
    quiet
        Show nothing but errors.
    """
    if into is not None and name is not None:
        raise UsageError("--name-label: a disk that is copied into keeps its name; leave one of the two out")
    with (gateway or GatewayChoice()).connect() as connection:
        reference, record = find_vdi(connection, disk)
        target = NULL_REF if into is None else find_vdi(connection, into)[0]
        place = NULL_REF if sr is None and into is not None else find_sr(connection, sr)
        transfer = Transfer("copy", record["uuid"])
        transfer.begin(0, int(record["virtual_size"]))
        figures = partial(figures_text, physical=False)
        with Display(transfer, form_of(progress, quiet=quiet), figures=figures) as display:
            copy = _Copy(connection, (reference, place, NULL_REF, target), transfer)
            made = copy.reference(display)
        return print_made(connection, made, name, json=json)


class _Copy:
    """One copy under a task, from the call with these arguments to the task's end."""

    def __init__(self, connection: Connection, arguments: tuple[str, ...], transfer: Transfer) -> None:
        self._connection = connection
        self._arguments = arguments
        self._task = ""
        self._transfer = transfer

    def reference(self, display: Display) -> str:
        """Wait for the copy's reference. CommandError says why there is none."""
        try:
            with _first_interrupt_waits():
                self._task = self._connection.call("Async.VDI.copy", *self._arguments)
            record = self._ended()
        except KeyboardInterrupt:
            self._interrupted(display)
            raise
        except DoorClosedError as lost:
            raise CommandError(f"{lost}; the copy may go on: look with task-watch {self._task}") from None
        if record["status"] != "success":
            code, *details = record["error_info"] or ["TASK_CANCELLED", self._task]
            raise CommandError(error_text("VDI.copy", code, details))
        made: str = record["result"].removeprefix("<value>").removesuffix("</value>")
        self._transfer.logical = self._transfer.total
        self._transfer.physical = int(self._connection.call("VDI.get_physical_utilisation", made))
        return made

    def _ended(self, seconds: float | None = None) -> dict[str, Any]:
        """The task's record once it has ended, or after so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            record: dict[str, Any] = self._connection.call("task.get_record", self._task)
            ended = record["status"] not in ("pending", "cancelling")
            if ended or (until is not None and time.monotonic() >= until):
                return record
            self._transfer.logical = int(float(record["progress"]) * self._transfer.total)
            time.sleep(_LOOK_SECONDS)

    def _interrupted(self, display: Display) -> None:
        """Cancel, and say what is left if it isn't nothing."""
        if not self._task:
            display.note("the copy may go on; look with task-list")
            return
        # The connection may be in the middle of a call.
        self._connection.restart(_CANCEL_SECONDS)
        status = "unknown"
        with suppress(CommandError):
            with suppress(CallRefusedError):  # it has ended
                self._connection.call("task.cancel", self._task)
            status = self._ended(_CANCEL_SECONDS)["status"]
        if status == "success":
            display.note("the copy was done already; vdi-list shows it")
        elif status not in ("cancelled", "failure"):
            display.note(f"the task {self._task} could not be cancelled; look with task-watch")


@contextmanager
def _first_interrupt_waits() -> Iterator[None]:
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
