"""Who is alone waits for those who write, and they for him, in each way in which two can meet."""

import threading
from collections.abc import Callable, Iterator

import pytest

from gateway.images.vhd.turns import Turns


@pytest.fixture
def started() -> Iterator[Callable[[Callable[[], None]], threading.Thread]]:
    """Runs something in a thread, which has to end by the end of the test."""
    threads: list[threading.Thread] = []

    def start(what: Callable[[], None]) -> threading.Thread:
        threads.append(threading.Thread(target=what, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


Started = Callable[[Callable[[], None]], threading.Thread]


def until(condition: Callable[[], bool]) -> None:
    gave_up = threading.Event()
    timer = threading.Timer(20, gave_up.set)
    timer.start()
    while not condition():
        assert not gave_up.wait(0.001)
    timer.cancel()


def test_who_wants_to_be_alone_waits_for_who_writes(started: Started) -> None:
    turns = Turns()
    alone = threading.Event()

    def be_alone() -> None:
        with turns.alone():
            alone.set()

    turn = turns.enter()
    started(be_alone)
    until(lambda: turns._alone)
    assert not alone.wait(0.1)
    turns.leave(turn)
    assert alone.wait(20)


def test_who_comes_while_somebody_is_alone_waits_and_is_then_counted(started: Started) -> None:
    turns = Turns()
    entered, may_leave, again = threading.Event(), threading.Event(), threading.Event()

    def write() -> None:
        turn = turns.enter()
        entered.set()
        assert may_leave.wait(20)
        turns.leave(turn)

    def be_alone_again() -> None:
        with turns.alone():
            again.set()

    with turns.alone():
        started(write)
        assert not entered.wait(0.1)
    assert entered.wait(20)
    started(be_alone_again)
    until(lambda: turns._alone)
    assert not again.wait(0.1)
    may_leave.set()
    assert again.wait(20)


def test_of_two_who_come_together_the_writer_stands_back(started: Started) -> None:
    turns = Turns()
    entered, alone, may_end = threading.Event(), threading.Event(), threading.Event()

    def be_alone() -> None:
        with turns.alone():
            alone.set()
            assert may_end.wait(20)

    def write() -> None:
        # He has noted himself, and looks only when the other one waits for him already.
        turns._writing.add(threading.get_ident())
        started(be_alone)
        until(lambda: turns._alone)
        turn = turns.enter()
        entered.set()
        turns.leave(turn)

    started(write)
    assert alone.wait(20)
    assert not entered.wait(0.1)
    may_end.set()
    assert entered.wait(20)
