"""Lines that come again and again: the first is told at once, the others are counted and told once a minute.

Whoever can connect can have nbdkit write a line for each connection. The trap: some of them hold numbers that
the client chooses, so the kinds that are known at a time are bounded as well; what is beyond is one kind. So
it is for each level: no stranger has errors written, and none is to hide one.
"""

import re
from dataclasses import dataclass
from typing import Final

PERIOD_SECONDS: Final = 60.0
MOST_KINDS: Final = 100
OTHERS: Final = "lines of further kinds"

# nbdkit numbers its connections and their threads: `nbdkit: python[12]: error: ...`, `nbdkit: python.3: ...`
_CONNECTION: Final = re.compile(r"(?:\[\d+\]|\.\d+(?=: ))")


@dataclass(slots=True)
class _Period:
    """What was told at its beginning, how severe that is, and how often it has come since."""

    line: str
    level: str
    until: float
    again: int = 0


class Repeats:
    """`now` is any clock's seconds."""

    def __init__(self) -> None:
        self._periods: dict[tuple[str, str], _Period] = {}  # by level and kind

    @property
    def due(self) -> float | None:
        """When `counted` has something to do."""
        return min((period.until for period in self._periods.values()), default=None)

    def is_first(self, line: str, level: str, now: float) -> bool:
        """Whether this line is to be told; else it is counted."""
        kind = (level, _CONNECTION.sub("", line, count=1))
        if kind not in self._periods and self._kinds(level) >= MOST_KINDS:
            kind, line = (level, OTHERS), OTHERS
        period = self._periods.get(kind)
        if period is not None:
            period.again += 1
            return False
        self._periods[kind] = _Period(line, level, now + PERIOD_SECONDS)
        return True

    def _kinds(self, level: str) -> int:
        return sum(each.level == level for each in self._periods.values())

    def counted(self, now: float) -> list[tuple[str, str, int]]:
        """Of each period that is over: its line, its level, and how often it came again if it did."""
        told = []
        for kind, period in list(self._periods.items()):
            if period.until > now:
                continue
            if period.again:
                told.append((period.line, period.level, period.again))
                self._periods[kind] = _Period(period.line, period.level, now + PERIOD_SECONDS)
            else:
                del self._periods[kind]
        return told
