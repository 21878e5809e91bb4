"""What the supervisor has to tell: to the gateway's log while there is a gateway, else as JSON to stderr.

The trap: a client names an export with the reference of its session, and nbdkit may repeat that; such
references are masked here, whoever the line goes to.
"""

import datetime
import json
import re
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_SECRET: Final = re.compile(r"(session_id(?:=|%3[dD]))[^\s&;,\"'<>]+", re.IGNORECASE)


def masked(text: str) -> str:
    """`text` without references of sessions."""
    return _SECRET.sub(r"\1***", text)


class Log:
    """`link` sends a message to the gateway; it is None, or returns False, where there is none."""

    def __init__(self) -> None:
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
        now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        try:
            sys.stderr.write(json.dumps({**told, "event": event, "level": level, "timestamp": now}) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more
