"""The thread of a transfer: how nice it is, and how many run at once."""

import os
import threading

import trio

from gateway.transfers.thread import NICENESS, run_abortable


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


class Nothing:
    """No other side that could be aborted."""

    def abort(self) -> None:
        raise AssertionError


async def test_a_transfer_is_nicer_than_the_threads_of_all_others() -> None:
    ordinary = niceness()
    assert await run_abortable(niceness, Nothing()) == min(ordinary + NICENESS, 19)
    assert niceness() == ordinary
    assert await trio.to_thread.run_sync(niceness) == ordinary


async def test_only_so_many_transfers_run_at_once_and_one_that_waits_can_be_cancelled() -> None:
    threads = trio.CapacityLimiter(1)
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_abortable, work, Nothing(), threads)
        await trio.to_thread.run_sync(begun.wait)
        with trio.move_on_after(0.05) as scope:
            await run_abortable(niceness, Nothing(), threads)
        assert scope.cancelled_caught
        go_on.set()
    assert threads.borrowed_tokens == 0
    await run_abortable(niceness, Nothing(), threads)
