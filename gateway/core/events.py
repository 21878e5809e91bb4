"""What changed, numbered. A publisher says class, operation and reference; a waiter sleeps until the counter
passes its own.

Only the newest change of each object is remembered, and only so many objects: what `event.from` needs, in
bounded memory. Everything here runs on the trio thread; `publish` never blocks.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import trio

Operation = Literal["add", "mod", "del"]


@dataclass(frozen=True, slots=True)
class Event:
    """`counter` rises by one with each change in the gateway; `class_name` is XenAPI's ("VDI", "task").

    `moment` is in seconds since 1970.
    """

    counter: int
    class_name: str
    operation: Operation
    ref: str
    moment: float


class Events:
    """The changes since the gateway started.

    `epoch` tells this run of the gateway from earlier ones: its start in microseconds since 1970.
    """

    def __init__(self, *, entries: int = 16384) -> None:
        self.epoch: Final = time.time_ns() // 1000
        self.counter = 0
        self._entries = entries
        self._newest: OrderedDict[tuple[str, str], _Change] = OrderedDict()
        # The highest counter that was forgotten: whoever stands before it has missed something.
        self._forgotten = 0
        self._waiting = trio.lowlevel.ParkingLot()

    def publish(self, class_name: str, operation: Operation, ref: str) -> None:
        """Count and remember one change, and wake everybody who waits.

        An object that is gone does not change any more: references are not used again.
        """
        key = (class_name, ref)
        if operation == "mod" and (last := self._newest.get(key)) is not None and last.operation == "del":
            return
        self.counter += 1
        before = self._newest.pop(key, None)
        added = self.counter if operation == "add" else before.added if before is not None else 0
        self._newest[key] = _Change(self.counter, added, operation, time.time())
        if len(self._newest) > self._entries:
            _, oldest = self._newest.popitem(last=False)
            self._forgotten = oldest.counter
        self._waiting.unpark_all()

    def since(self, counter: int) -> list[Event] | None:
        """The newest change of each object past `counter`, oldest first; None if some of them were forgotten.

        An object that was added after `counter` and changed since is told as "add": who asks has not seen it
        yet.
        """
        if counter < self._forgotten:
            return None
        changes: list[Event] = []
        for (class_name, ref), change in reversed(self._newest.items()):
            if change.counter <= counter:
                break
            operation: Operation = (
                "add" if change.operation == "mod" and change.added > counter else change.operation
            )
            changes.append(Event(change.counter, class_name, operation, ref, change.moment))
        changes.reverse()
        return changes

    async def wait_past(self, counter: int) -> int:
        """Sleep until something changed after `counter`; the counter then."""
        await trio.lowlevel.checkpoint()
        while self.counter <= counter:
            await self._waiting.park()
        return self.counter


class _Change(NamedTuple):
    counter: int
    added: int
    operation: Operation
    moment: float
