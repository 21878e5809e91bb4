"""Asking a gateway that may be about to come: it restarts, or stores what the client's last connection did.
Standard library only.

The trap: only what passes by itself is waited for. A refusal is an answer, and is handed on at once.
"""

import math
import time
from collections.abc import Callable
from typing import Final, TypeVar

from gateway.access.client_answer import AccessRefused

FIRST_PAUSE_SECONDS: Final = 0.02
LONGEST_PAUSE_SECONDS: Final = 0.25
AGAIN_SECONDS: Final = 1.0

T = TypeVar("T")


def patiently(
    ask: Callable[[], T],
    seconds: float,
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `ask` returns. For up to `seconds` it is asked again while there is no gateway, or this one has
    too many transfers.

    Raises what `ask` raises; ConnectionRefusedError if there was no gateway to the last.
    """
    deadline = now() + seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return ask()
        except AccessRefused as refused:
            if refused.code != "TOO_MANY_TRANSFERS" or now() >= deadline:
                raise
        except (ConnectionError, FileNotFoundError) as error:
            if now() >= deadline:
                reason = error.strerror or str(error)
                late = f", also after {seconds:g} s" if seconds else ""
                raise ConnectionRefusedError(f"the gateway doesn't answer{late}: {reason}") from None
        sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


class SharedPatience:
    """The patience of many who ask one gateway: while one of them has just waited in vain, no other waits.

    So who looks at a thousand disks while it is away waits once. Any thread may call it.
    """

    def __init__(
        self,
        seconds: float,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds: Final = seconds
        self._now: Final = now
        self._sleep: Final = sleep
        self._in_vain_until = -math.inf

    def __call__(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, as `patiently`; who comes within a second of a failure asks once."""
        seconds = 0.0 if self._now() < self._in_vain_until else self._seconds
        try:
            answer = patiently(ask, seconds, now=self._now, sleep=self._sleep)
        except ConnectionRefusedError:
            self._in_vain_until = self._now() + AGAIN_SECONDS
            raise
        self._in_vain_until = -math.inf
        return answer
