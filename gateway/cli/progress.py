"""How far a transfer is: a bar on a terminal, a line of JSON each second elsewhere, or nothing.

All of it goes to stderr; stdout may be the disk. Logical bytes are those of the disk, physical bytes those
that were read or written as data, since holes cost nothing. A thread of its own looks at the counters, so
that a transfer that hangs is seen to hang. The trap: rich takes 0.1 s to load, so only a bar loads it.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

from gateway.cli.output import json_for, size_text

if TYPE_CHECKING:
    from rich.progress import TaskID

INTERVAL_SECONDS: Final = 1.0
_RATE_SECONDS: Final = 10.0


class ProgressForm(StrEnum):
    """What --progress takes."""

    AUTO = "auto"
    BAR = "bar"
    JSON = "json"
    NONE = "none"


class Transfer:
    """The counters of one transfer, in bytes; its thread writes them, whoever shows them reads.

    `first` is where it began, if it goes on with an earlier one.
    """

    def __init__(self, operation: str, vdi: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.operation: Final = operation
        self.vdi: Final = vdi
        self.total = 0
        self.logical = 0
        self.physical = 0
        self.first = 0
        self._clock: Final = clock
        self._began: Final = clock()
        self._seen: deque[tuple[float, int]] = deque([(self._began, 0)])

    def begin(self, first: int, total: int) -> None:
        """The transfer starts, or starts again, at this byte of so many."""
        self.first = self.logical = first
        self.total = total
        self._seen = deque([(self._clock(), first)])

    @property
    def elapsed(self) -> float:
        """Seconds since the command began with it."""
        return self._clock() - self._began

    def rate(self) -> float:
        """Bytes a second over the last ten seconds."""
        now, logical = self._clock(), self.logical
        while len(self._seen) > 1 and now - self._seen[0][0] > _RATE_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        if now - self._seen[-1][0] >= INTERVAL_SECONDS / 2:
            self._seen.append((now, logical))
        return max(0.0, (logical - before) / (now - since)) if now > since else 0.0

    def document(self, state: str) -> dict[str, Any]:
        """One line of JSON; `state` is running, done, failed or interrupted."""
        rate = self.rate() if state == "running" else (self.logical - self.first) / max(self.elapsed, 1e-9)
        left = self.total - self.logical
        return {
            "operation": self.operation,
            "vdi": self.vdi,
            "state": state,
            "bytes": self.logical,
            "total": self.total,
            "physical_bytes": self.physical,
            "bytes_per_second": int(rate),
            "eta_seconds": round(left / rate, 1) if rate and state == "running" else None,
            "elapsed_seconds": round(self.elapsed, 3),
        }


class Display:
    """Shows a Transfer while a block runs."""

    def __init__(
        self,
        transfer: Transfer,
        form: ProgressForm,
        stream: TextIO | None = None,
        *,
        figures: Callable[[Transfer], str] | None = None,
    ) -> None:
        self._transfer = transfer
        self._figures = figures or figures_text
        self._stream = stream or sys.stderr
        if form is ProgressForm.AUTO:
            form = ProgressForm.BAR if self._stream.isatty() else ProgressForm.JSON
        self._form = form
        self._bar: _Bar | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._form is ProgressForm.BAR:
            self._bar = _Bar(self._transfer, self._stream, self._figures)
            try:
                self._bar.start()
            except BaseException:
                # Ctrl-C at this very moment must not leave the terminal without a cursor.
                self._bar.stop()
                raise
        if self._form in (ProgressForm.BAR, ProgressForm.JSON):
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()
        if self._form is ProgressForm.JSON:
            state = "done" if error is None else "failed"
            self._line("interrupted" if isinstance(error, KeyboardInterrupt) else state)

    def note(self, text: str) -> None:
        """A remark on the way; above the bar, a JSON document of its own, or a line."""
        if self._bar is not None:
            self._bar.note(text)
        elif self._form is ProgressForm.JSON:
            self._write({"operation": self._transfer.operation, "vdi": self._transfer.vdi, "note": text})
        else:
            self._say(text)

    def _run(self) -> None:
        # A bar moves ten times a second; lines are for logs.
        while not self._ended.wait(0.1 if self._bar is not None else INTERVAL_SECONDS):
            if self._bar is not None:
                self._bar.move()
            else:
                self._line("running")

    def _line(self, state: str) -> None:
        self._write(self._transfer.document(state))

    def _write(self, document: dict[str, Any]) -> None:
        self._say(json_for(self._stream, document))

    def _say(self, line: str) -> None:
        # Whether somebody reads on decides nothing about the transfer.
        with suppress(OSError):
            self._stream.write(line + "\n")
            self._stream.flush()


class _Bar:
    """rich's progress bar; it is moved by Display's thread alone."""

    def __init__(self, transfer: Transfer, stream: TextIO, figures: Callable[[Transfer], str]) -> None:
        from rich.console import Console  # noqa: PLC0415  only a terminal pays for loading it
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

        self._transfer = transfer
        self._figures = figures
        self._progress: Progress = Progress(
            TextColumn("{task.percentage:>3.0f}%"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=stream, markup=False, highlight=False),
            auto_refresh=False,
            expand=True,
        )
        self._task: TaskID | None = None

    def start(self) -> None:
        self._progress.start()
        self._task = self._progress.add_task(self._transfer.operation, figures="", total=None)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def move(self) -> None:
        transfer = self._transfer
        if self._task is not None and transfer.total:
            self._progress.update(
                self._task, completed=transfer.logical, total=transfer.total, figures=self._figures(transfer)
            )
            self._progress.refresh()

    def stop(self) -> None:
        self.move()
        self._progress.stop()


def figures_text(transfer: Transfer, *, physical: bool = True) -> str:
    """What stands beside a bar: logical of total, physical (where that is known), rate, time left."""
    done = transfer.logical >= transfer.total
    rate = transfer.rate()
    if done and transfer.elapsed > 0:
        rate = (transfer.logical - transfer.first) / transfer.elapsed
    left = clock_text(transfer.elapsed) if done else "-:--"
    if not done and rate:
        left = clock_text((transfer.total - transfer.logical) / rate)
    data = f" data {size_text(transfer.physical)}," if physical else ""
    return (
        f"{size_text(transfer.logical)} of {size_text(transfer.total)},"
        f"{data} {size_text(int(rate))}/s {'in' if done else 'ETA'} {left}"
    )


def clock_text(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
