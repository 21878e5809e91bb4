"""The task under which a command sends or fetches a disk, and how the gateway's last word is read."""

import contextlib
import math
import time
from typing import Any, Final

from gateway.cli.connection import CallRefusedError, Connection, error_text, speakable
from gateway.cli.exchange import Exchange, Head
from gateway.cli.following import first_interrupt_waits
from gateway.cli.output import CommandError

CANCEL_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 0.2
_UNDECIDED: Final = ("pending", "cancelling")


class RefusedError(CommandError):
    """The gateway refused a transfer before its first byte; `code` is XenAPI's, "" where there is none."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"the gateway refused (status {status}): {said}")
        code, colon, _ = said.partition(": ")
        self.code: Final = code if colon else ""


class TransferTask:
    """A task of our own, made before the transfer, so that it can be cancelled from its first moment on."""

    def __init__(self, connection: Connection, label: str, description: str) -> None:
        self._connection = connection
        self.ref = ""
        try:
            with first_interrupt_waits():
                self.ref = connection.call("task.create", label, speakable(description))
        except KeyboardInterrupt:
            if self.ref:
                self.drop()
            raise

    def record(self) -> dict[str, Any]:
        """The task as it is now."""
        record: dict[str, Any] = self._connection.call("task.get_record", self.ref)
        return record

    def cancel(self) -> bool:
        """Have the gateway stop; waits a few seconds at most. False when it couldn't be told."""
        self._connection.restart(CANCEL_SECONDS)
        try:
            with contextlib.suppress(CallRefusedError):  # it has ended
                self._connection.call("task.cancel", self.ref)
        except CommandError:
            return False
        return True

    def goes_on(self) -> bool:
        """Whether the gateway is at work on it still; False, too, when it can't be asked."""
        try:
            return self.record()["status"] in _UNDECIDED
        except CommandError:
            return False

    def ended(self, seconds: float = math.inf) -> dict[str, Any]:
        """Wait for its end; the task as it is then, or after so many seconds. CommandError when the gateway
        can't be asked."""
        until = time.monotonic() + seconds
        while (record := self.record())["status"] in _UNDECIDED and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
        return record

    def drop(self) -> None:
        """End and remove a task under which nothing came to run; as far as that is possible."""
        with contextlib.suppress(CommandError):
            if self.record()["status"] == "pending":
                self._connection.call("task.cancel", self.ref)
                self._connection.call("task.destroy", self.ref)

    def made(self) -> str:
        """The reference that a success has as its result."""
        result: str = self.record()["result"]
        return result.removeprefix("<value>").removesuffix("</value>")

    def failure(self) -> str | None:
        """Why the task failed; None if it didn't."""
        record = self.record()
        if record["status"] in ("failure", "cancelled"):
            code, *details = record["error_info"] or ["TASK_CANCELLED", self.ref]
            return error_text(record["name_label"], code, details)
        return None


def target_of(path: str, vdi: str, task: TransferTask) -> str:
    """The request target of a transfer. uuids and references need no quoting."""
    return f"{path}?vdi={vdi}&task_id={task.ref}"


def refusal(exchange: Exchange, head: Head, vdi: str) -> CommandError:
    """What a status other than success says, in the gateway's own words."""
    if head.status in (301, 302, 307, 308):
        place = head.headers.get("location", "").partition("?")[0]
        return CommandError(f"another gateway reaches the SR of {vdi}: {place}; give that one with --url")
    text = exchange.rest(head.length if head.length is not None else 4096).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[0] if lines else "without a reason; see the gateway's log"
    return RefusedError(head.status, said)
