"""The log: one line per event on stderr, JSON unless a person is watching.

No secret is ever in a line: every value passes `masked`, and values whose key names a secret are left out
wholly. The trap is the traceback: structlog's pretty ones print local variables, passwords among them, so
plain ones are used.
"""

import logging
import re
import sys
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


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Send the log of the whole process to `stream` (stderr), from `level` ("debug" … "critical") upwards.

    JSON lines for journald and pipes, coloured lines on a terminal. May be called again, for another level.
    Raises ValueError for an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"there is no log level {level!r}; use debug, info, warning, error or critical")
    output = sys.stderr if stream is None else stream
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(),
        mask_secrets,
    ]
    if output.isatty():
        processors.append(structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback))
    else:
        processors.append(structlog.processors.JSONRenderer())
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(output),
        # Loggers are made at import, before this is called, and SIGHUP calls it again.
        cache_logger_on_first_use=False,
    )
