"""Asking a gateway that isn't there, with a clock of the test's own."""

from collections.abc import Callable

import pytest

from gateway.access.client import AccessRefused
from gateway.access.client_patience import SharedPatience, patiently
from gateway.access.protocol import Refused

BUSY = AccessRefused(Refused("TOO_MANY_TRANSFERS", (), "later"))


class Clock:
    def __init__(self) -> None:
        self.time = 100.0
        self.pauses: list[float] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds


def failing(*errors: Exception) -> Callable[[], str]:
    """Fails so often, and then answers."""
    left = list(errors)

    def ask() -> str:
        if left:
            raise left.pop(0)
        return "answer"

    return ask


def asked(ask: Callable[[], str], clock: Clock, seconds: float = 5) -> str:
    return patiently(ask, seconds, now=clock.now, sleep=clock.sleep)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "refused"),
        FileNotFoundError(2, "none"),
        ConnectionError("went away"),
        BUSY,
    ],
)
def test_what_passes_is_waited_for_in_pauses_that_grow(error: Exception) -> None:
    clock = Clock()
    assert asked(failing(*[error] * 7), clock) == "answer"
    assert clock.pauses == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.25, 0.25, 0.25])


def test_a_gateway_that_never_comes_is_given_up_in_time_with_a_reason() -> None:
    clock = Clock()
    with pytest.raises(ConnectionRefusedError, match="doesn't answer, also after 5 s: Connection refused"):
        asked(failing(*[ConnectionRefusedError(111, "Connection refused")] * 1000), clock)
    assert 105 <= clock.time <= 105.25


def test_one_that_has_too_many_transfers_for_too_long_says_so_itself() -> None:
    clock = Clock()
    with pytest.raises(AccessRefused, match="later"):
        asked(failing(*[BUSY] * 1000), clock)
    assert 105 <= clock.time <= 105.25


@pytest.mark.parametrize(
    "error",
    [
        AccessRefused(Refused("UUID_INVALID", (), "no such VDI")),
        PermissionError(13, "no"),
        TimeoutError("mute"),
    ],
)
def test_what_stays_is_told_at_once(error: Exception) -> None:
    clock = Clock()
    with pytest.raises(type(error)):
        asked(failing(error), clock)
    assert clock.pauses == []


def test_while_somebody_has_just_waited_in_vain_no_other_waits() -> None:
    clock = Clock()
    patience = SharedPatience(5, now=clock.now, sleep=clock.sleep)

    def away() -> str:
        raise FileNotFoundError(2, "none")

    waited = []
    for pause in (0.0, 0.9, 0.9, 1.1, 0.0):
        clock.time += pause
        begun = clock.time
        with pytest.raises(ConnectionRefusedError):
            patience(away)
        waited.append(clock.time - begun >= 5)
    assert waited == [True, False, False, True, False]
    assert patience(failing()) == "answer"
    assert patience(failing(FileNotFoundError(2, "none"))) == "answer"  # it was there: waited for again
