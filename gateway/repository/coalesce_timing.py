"""When a candidate of coalescing is tried: later, because it failed or was copied in vain, or before people.

All times are trio's clock, in seconds. The trap: somebody who asks wants what failed to be tried again at
once, but not the copy of a disk that is being written to.
"""

import math
from dataclasses import dataclass
from typing import Final

import trio

from gateway.core.limits import Limits
from gateway.repository.coalesce_plan import Candidate

Key = tuple[str, str, str]
"""A candidate: its kind, the child's uuid, the parent's."""

_LONGEST_BACK_OFF_SECONDS: Final = 24 * 3600.0
_FIRST_REST_SECONDS: Final = 1.0
_MOST_DOUBLINGS: Final = 20
# From here on a coalesce may go before people for once: levels of a chain.
_TALL: Final = 25


def key_of(candidate: Candidate) -> Key:
    """What stays the same of a candidate from plan to plan."""
    return candidate.kind.value, candidate.child, candidate.parent


def _doubled(seconds: float, times: int) -> float:
    return math.ldexp(seconds, min(times, _MOST_DOUBLINGS))


@dataclass(slots=True)
class _Postponed:
    again: float
    times: int
    reason: str


class Postponed:
    """Candidates that aren't tried now."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._failed: dict[Key, _Postponed] = {}
        self._resting: dict[Key, _Postponed] = {}

    def failed(self, key: Key, why: str) -> float:
        """It is tried again after a time that grows, which is returned, or when somebody asks."""
        times = self._failed[key].times + 1 if key in self._failed else 1
        pause = min(_doubled(self._limits.coalesce_interval, times), _LONGEST_BACK_OFF_SECONDS)
        reason = f"it failed, and is tried again later: {why}"
        self._failed[key] = _Postponed(trio.current_time() + pause, times, reason)
        return pause

    def cancelled(self, key: Key) -> str:
        """It is tried again when somebody asks; the reason in words."""
        self._failed[key] = _Postponed(math.inf, 0, "its task was cancelled")
        return self._failed[key].reason

    def copied_in_vain(self, key: Key) -> float:
        """It was written to before it could be relinked, and rests for so long before it is copied again."""
        times = self._resting[key].times + 1 if key in self._resting else 0
        pause = min(_doubled(_FIRST_REST_SECONDS, times), float(self._limits.coalesce_interval))
        reason = "was written to meanwhile and is copied again"
        self._resting[key] = _Postponed(trio.current_time() + pause, times, reason)
        return pause

    def asked(self) -> None:
        """Somebody asks for all that failed."""
        self._failed.clear()

    def done(self, key: Key) -> None:
        """It is merged."""
        self._failed.pop(key, None)
        self._resting.pop(key, None)

    def failures(self) -> dict[str, str]:
        """The children that are not to be tried, by uuid, and why."""
        now = trio.current_time()
        return {key[1]: postponed.reason for key, postponed in self._failed.items() if postponed.again > now}

    def rest(self, candidate: Candidate) -> float:
        """How long it rests still; zero if it doesn't."""
        resting = self._resting.get(key_of(candidate))
        return 0.0 if resting is None else max(0.0, resting.again - trio.current_time())

    def why_it_rests(self, candidate: Candidate) -> str:
        """In words, for one that does."""
        return self._resting[key_of(candidate)].reason


class GoesFirst:
    """For some time a coalesce goes before those who come later, then for a longer time people go first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._until = -math.inf
        self._again = -math.inf

    def until(self, candidate: Candidate, *, full: bool) -> float | None:
        """Until when this one goes first, if it does; `full` says that the SR is nearly full."""
        if not full and candidate.tree_height < _TALL:
            return None
        now = trio.current_time()
        if now < self._until:
            return self._until
        if now < self._again:
            return None
        self._until = now + self._limits.coalesce_first_seconds
        self._again = self._until + self._limits.coalesce_first_pause_seconds
        return self._until
