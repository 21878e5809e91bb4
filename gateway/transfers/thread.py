"""One thread for the whole length of a transfer, that ends at once when trio cancels it.

A transfer that hops between trio and a thread for each piece is eight times slower, so it stays in its
thread, where cancellation does not reach it: here a cancellation becomes abort(), which wakes the thread.

The thread is the transfer's own and is never used again, because it is nicer than the others for life: who
isn't privileged can't take niceness back. Without it eight uploads keep the processors and the interpreter's
lock from the one thread that answers everybody else. The trap: a thread is never abandoned, because it still
writes into an image file; and trio.from_thread doesn't know it.
"""

import contextvars
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Final, Protocol, TypeVar

import outcome
import trio

from gateway.core.threads import start_thread
from gateway.images.heap import give_back_soon
from gateway.transfers.body import TransferAborted

T = TypeVar("T")

# Shares are proportional: where all processors are busy, such a thread gets two fifths of what an ordinary
# one gets, so a transfer becomes slower beside others (downloads by 7-10 % were measured) and never starves;
# where they aren't, it gets all it wants. More of it helps no further: a transfer that loses its processor
# while it holds the interpreter's lock keeps everybody waiting, and the nicer it is the longer.
NICENESS: Final = 4
_NICEST: Final = 19


class Abortable(Protocol):
    """A Body or a Sink."""

    def abort(self) -> None:
        """As Body.abort."""


async def run_abortable(
    work: Callable[[], T], other_side: Abortable, threads: trio.CapacityLimiter | None = None
) -> T:
    """Run `work` in a thread of its own; on cancellation abort `other_side` and wait for the thread.

    `threads` says how many may run at once. Raises what `work` raises, trio.Cancelled instead of
    TransferAborted.
    """
    running = True

    async def abort_on_cancellation() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if running:
                other_side.abort()

    async with threads or nullcontext(), trio.open_nursery() as nursery:
        nursery.start_soon(abort_on_cancellation)
        result = await _run_in_thread(work)
        running = False
        nursery.cancel_scope.cancel()
    if isinstance(result, outcome.Error) and isinstance(result.error, TransferAborted):
        await trio.lowlevel.checkpoint_if_cancelled()
    return result.unwrap()


async def _run_in_thread(work: Callable[[], T]) -> outcome.Outcome[T]:
    """How `work` ended; waits for that whatever happens."""
    ended = trio.Event()
    results: list[outcome.Outcome[T]] = []
    token = trio.lowlevel.current_trio_token()
    context = contextvars.copy_context()

    def run() -> None:
        results.append(outcome.capture(context.run, _stand_back, work))
        give_back_soon()
        token.run_sync_soon(ended.set)

    await start_thread(threading.Thread(target=run, name="transfer", daemon=True))
    with trio.CancelScope(shield=True):
        await ended.wait()
    return results[0]


def _stand_back(work: Callable[[], T]) -> T:
    """Make this thread nicer, then work. Linux keeps niceness by thread, whatever POSIX says."""
    thread = threading.get_native_id()
    with suppress(OSError):  # a filter of system calls may forbid it
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, _NICEST))
    return work()
