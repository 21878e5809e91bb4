"""Who needs a thread waits while the system has none: here what starts them refuses, in CPython's words."""

import threading
from pathlib import Path

import pytest
import structlog
import trio
import trio.testing
from trio._core import _thread_cache

from gateway.core.threads import in_thread, start_thread

GATEWAY = Path(__file__).parents[2] / "gateway"


class NoThreads:
    """The first `refusals` threads can't be started; with None, none can."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refusals: int | None) -> None:
        self.left = refusals
        self.asked = 0
        starting = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            self.asked += 1
            if self.left != 0:
                if self.left is not None:
                    self.left -= 1
                raise RuntimeError("can't start new thread")
            starting(thread)

        monkeypatch.setattr(_thread_cache.THREAD_CACHE, "_idle_workers", {})
        monkeypatch.setattr(threading.Thread, "start", start)


async def test_a_call_waits_until_there_is_a_thread_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    threads, limiter = NoThreads(monkeypatch, 3), trio.CapacityLimiter(1)
    with structlog.testing.capture_logs() as lines:
        assert await in_thread(int, "7", limiter=limiter) == 7
    assert (threads.asked, limiter.borrowed_tokens) == (4, 0)
    assert [each["event"] for each in lines] == ["waiting for a thread: the system starts none"]


async def test_who_waits_for_a_thread_can_be_cancelled_and_his_call_never_runs(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    NoThreads(monkeypatch, None)
    called: list[int] = []
    with trio.move_on_after(60) as waiting:
        await in_thread(called.append, 1)
    assert waiting.cancelled_caught
    assert not called


async def test_the_same_error_of_the_call_itself_is_its_own() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start new thread"):
        await in_thread(fail)
    assert calls == [1]


async def test_a_thread_of_ones_own_waits_too(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    ran = threading.Event()
    threads = NoThreads(monkeypatch, 2)
    await start_thread(threading.Thread(target=ran.set))
    assert ran.wait(30)
    assert threads.asked == 3


def test_nobody_else_asks_trio_for_a_thread() -> None:
    theirs = [path for path in GATEWAY.rglob("*.py") if "to_thread.run_sync" in path.read_text()]
    assert theirs == [GATEWAY / "core" / "threads.py"]
