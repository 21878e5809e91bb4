"""What the supervisor has to tell: to the gateway's log while there is a gateway, else as JSON to stderr.

The trap: a client names an export with the reference of its session, and nbdkit may repeat that; such
references are masked here, whoever the line goes to.
"""

import datetime
import json
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS: Final = ("debug", "info", "warning", "error")

_SECRET: Final = re.compile(r"(session_id(?:=|%3[dD]))[^\s&;,\"'<>]+", re.IGNORECASE)
_TRACEBACK: Final = "Traceback (most recent call last):"
_LONGEST_TRACEBACK: Final = 200
# What people do, not what is broken. A lease that was taken away is ESHUTDOWN, which is a BrokenPipeError.
_EXPECTED: Final = ("ExportNameError", "AccessRefused", "ConnectionRefusedError", "BrokenPipeError")
# What storage does, with the VDI and what to do about it.
_EXPLAINED: Final = "RequestFailed"


def masked(text: str) -> str:
    """`text` without references of sessions."""
    return _SECRET.sub(r"\1***", text)


@dataclass(frozen=True, slots=True)
class Told:
    """What to tell in one line, how severe it is, and the traceback if it is that of a fault."""

    line: str
    level: str = "info"
    traceback: str | None = None


class Tracebacks:
    """Finds Python's tracebacks among the lines of a worker, and makes one line of each.

    Whom nbdkit's plugin refuses gets a traceback, too, in nbdkit's log; of those the reason is enough, and so
    it is of what storage fails.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []

    def feed(self, line: str) -> Told | None:
        """The next line: what to tell, once that is known."""
        if not self._lines and not line.endswith(_TRACEBACK):
            return Told(line)
        self._lines.append(line)
        inside = len(self._lines) == 1 or line.startswith("  ")
        if inside and len(self._lines) < _LONGEST_TRACEBACK:
            return None
        lines, self._lines = self._lines, []
        told = lines[0].removesuffix(_TRACEBACK) + lines[-1].strip()
        if any(f"{name}:" in lines[-1] for name in _EXPECTED):
            return Told(told)
        if f"{_EXPLAINED}:" in lines[-1]:
            return Told(told, "error")
        return Told(told, "error", "\n".join(lines))


class Log:
    """`link` sends a message to the gateway; it is None, or returns False, where there is none.

    What is below `least` isn't written then; a gateway has a level of its own.
    """

    def __init__(self, least: str = LEVELS[0]) -> None:
        self._silent: Final = LEVELS[: LEVELS.index(least)]
        self.link: Callable[[dict[str, Any]], bool] | None = None

    def info(self, event: str, **about: object) -> None:
        self._write("info", event, about)

    def warning(self, event: str, **about: object) -> None:
        self._write("warning", event, about)

    def error(self, event: str, **about: object) -> None:
        self._write("error", event, about)

    def _write(self, level: str, event: str, about: dict[str, object]) -> None:
        told = {key: masked(value) if isinstance(value, str) else value for key, value in about.items()}
        if self.link is not None and self.link({"log": {"level": level, "event": event, "about": told}}):
            return
        if level in self._silent:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        try:
            sys.stderr.write(json.dumps({**told, "event": event, "level": level, "timestamp": now}) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more
