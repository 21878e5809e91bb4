"""Asking a gateway that may be about to come: it restarts, or stores what the client's last connection did.
Standard library only.

The trap: only what passes by itself is waited for. A refusal is an answer, and is handed on at once.
"""

import time
from collections.abc import Callable
from typing import Final, TypeVar

from gateway.access.client_answer import AccessRefused

FIRST_PAUSE_SECONDS: Final = 0.02
LONGEST_PAUSE_SECONDS: Final = 0.25

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
                raise ConnectionRefusedError(
                    f"the gateway doesn't answer, also after {seconds:g} s: {reason}"
                ) from None
        sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
