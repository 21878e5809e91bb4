"""Calls that may block, in worker threads, also where the system has no thread to give.

A limit on processes (`ulimit -u`, systemd's TasksMax) or on memory that others have used up ends no request,
no lease and no task of the gateway's own: who needs a thread waits for it as for a place in a limiter, until
one can be had or he is cancelled. The trap: a thread that can't be started is a RuntimeError with CPython's
words and nothing else to know it by, and the call may raise one, too; so that counts only before it began.
"""

import threading
from collections.abc import Callable
from typing import Final, TypeVar

import structlog
import trio

T = TypeVar("T")

log = structlog.get_logger("gateway.threads")

_REFUSED: Final = "can't start new thread"
_PAUSE_SECONDS: Final = 0.1


async def in_thread(
    call: Callable[..., T],
    *arguments: object,
    limiter: trio.CapacityLimiter | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """As trio.to_thread.run_sync, which it waits with until there is a thread."""
    began = False

    def begin() -> T:
        nonlocal began
        began = True
        return call(*arguments)

    told = False
    while True:
        try:
            return await trio.to_thread.run_sync(begin, limiter=limiter, abandon_on_cancel=abandon_on_cancel)
        except RuntimeError as error:
            if began or str(error) != _REFUSED:
                raise
        told = _tell(told)
        await trio.sleep(_PAUSE_SECONDS)


async def start_thread(thread: threading.Thread) -> None:
    """Start a thread of one's own as soon as there is one to be had."""
    told = False
    while True:
        try:
            return thread.start()
        except RuntimeError as error:
            if str(error) != _REFUSED:
                raise
        told = _tell(told)
        await trio.sleep(_PAUSE_SECONDS)


def _tell(told: bool) -> bool:
    if not told:
        log.warning(
            "waiting for a thread: the system starts none",
            remedy="raise the limit of processes (ulimit -u, TasksMax) or of memory",
        )
    return True
