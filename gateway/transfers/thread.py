"""One worker thread for the whole length of a transfer, that ends at once when trio cancels it.

A transfer that hops between trio and a thread for each piece is eight times slower, so it stays in its
thread, where cancellation does not reach it: here a cancellation becomes abort(), which wakes the thread. The
trap: a thread is never abandoned, because it still writes into an image file.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import outcome
import trio

from gateway.transfers.body import TransferAborted

T = TypeVar("T")


class Abortable(Protocol):
    """A Body or a Sink."""

    def abort(self) -> None:
        """As Body.abort."""


async def run_abortable(
    work: Callable[[], T], other_side: Abortable, threads: trio.CapacityLimiter | None = None
) -> T:
    """Run `work` in a worker thread; on cancellation abort `other_side` and wait for the thread.

    Raises what `work` raises, trio.Cancelled instead of TransferAborted.
    """
    running = True

    async def abort_on_cancellation() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if running:
                other_side.abort()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(abort_on_cancellation)
        result: outcome.Outcome[T] = await trio.to_thread.run_sync(outcome.capture, work, limiter=threads)
        running = False
        nursery.cancel_scope.cancel()
    if isinstance(result, outcome.Error) and isinstance(result.error, TransferAborted):
        await trio.lowlevel.checkpoint_if_cancelled()
    return result.unwrap()
