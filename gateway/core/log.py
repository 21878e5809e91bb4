"""The log: one line per event on stderr, JSON unless a person is watching.

No secret is ever in a line: every value passes `masked`, and values whose key names a secret are left out
wholly. The trap is the traceback: structlog's pretty ones print local variables, passwords among them, so
plain ones are used.
"""

import logging
import re
import sys
import threading
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, TextIO

import structlog

MASK: Final = "***"

_SECRETS_IN_TEXT: Final = (
    # A query, a cookie or an NBD export name: session_id=OpaqueRef:…, also percent-encoded.
    re.compile(r"((?:session_id|session_ref|pool_secret|password)(?:=|%3[dD]))[^\s&;,\"'<>]+", re.IGNORECASE),
    # A header, as it is sent or as a dict or list of pairs shows it.
    re.compile(
        r"((?:proxy-)?authorization['\"]?\s*[:=,]\s*(?:b?['\"])?(?:(?:basic|bearer|digest)\s+)?)[^\s'\",;]+",
        re.IGNORECASE,
    ),
)
# What a terminal obeys instead of showing it, and what turns the direction of the text that follows.
_COMMANDS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SECRET_KEYS: Final = frozenset(
    {"password", "authorization", "cookie", "session_id", "session_ref", "secret", "password_hash"}
)


def masked(text: str) -> str:
    """`text` with the value of every session_id and Authorization in it replaced by ***."""
    for pattern in _SECRETS_IN_TEXT:
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def _is_secret(key: Any) -> bool:
    name = key.decode("latin-1") if isinstance(key, bytes) else str(key)
    return name.lower() in _SECRET_KEYS


def _mask(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, bytes):
        return masked(value.decode("utf-8", "backslashreplace"))
    if isinstance(value, Mapping):
        return {key: MASK if _is_secret(key) else _mask(item) for key, item in value.items()}
    if isinstance(value, tuple) and len(value) == 2 and _is_secret(value[0]):
        return [_mask(value[0]), MASK]
    if isinstance(value, list | tuple | set | frozenset):
        return [_mask(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return masked(str(value))


def mask_secrets(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: the line without its secrets. Runs after tracebacks have become text."""
    for key, value in line.items():
        line[key] = MASK if _is_secret(key) else _mask(value)
    return line


def show_controls(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor for terminals: whoever may choose a name, or only a user's, must not move the
    cursor of the person who watches. JSON escapes by itself.
    """
    for key, value in line.items():
        if isinstance(value, str):
            line[key] = _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), value)
    return line


class _Lines:
    """The end of the log: writes lines, and never fails.

    When nobody reads stderr any more or the disk under it is full, lines are lost and the work goes on. The
    first line that gets through afterwards comes after one that says how many.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._lost = 0

    def write_line(self, line: str) -> None:
        with self._lock:
            try:
                if self._lost:
                    self._stream.write(f'{{"event": "log lines were lost", "lines": {self._lost}}}\n')
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: the stream is closed.
                self._lost += 1
            else:
                self._lost = 0

    # What structlog's wrapper calls, by level.
    debug = info = warning = error = critical = exception = msg = log = write_line


def configure(level: str = "info", stream: TextIO | None = None, *, form: str = "auto") -> None:
    """Send the log of the whole process to `stream` (stderr), from `level` ("debug" … "critical") upwards.

    `form` is "json", "console" (coloured lines), or "auto": the second on a terminal, the first for journald
    and pipes. May be called again, for another level. Raises ValueError for an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"there is no log level {level!r}; use debug, info, warning, error or critical")
    output = sys.stderr if stream is None else stream
    lines = _Lines(output)
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(),
        mask_secrets,
    ]
    if form == "console" or (form == "auto" and output.isatty()):
        processors.append(show_controls)
        processors.append(structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback))
    else:
        processors.append(structlog.processors.JSONRenderer())
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: lines,
        # Loggers are made at import, before this is called, and SIGHUP calls it again.
        cache_logger_on_first_use=False,
    )
