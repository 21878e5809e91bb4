"""Why somebody was refused a disk last: for those whose protocol has no words for it.

An NBD client learns only that there is no such export. So the reason is kept with the VDI, in memory, where
people look. A refusal may come from somebody without any right, so there are limits to what is kept.
"""

from collections import OrderedDict
from typing import Final

from gateway.core.clock import utc_now
from gateway.core.events import Events

_MOST: Final = 1000
"""So many VDIs; those whose refusal is the oldest are forgotten."""

_LONGEST: Final = 500
"""Characters of one reason."""


class Refusals:
    """The last refusal of each VDI, by its reference, since the gateway started."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._last: OrderedDict[str, str] = OrderedDict()

    def note(self, vdi: str, what: str, why: str) -> None:
        """Remember that `what` was refused now, and tell it as a change of the VDI."""
        text = f"{utc_now():%Y%m%dT%H:%M:%SZ} {what}: {why}"[:_LONGEST]
        # A file's name may hold what can't be shown or sent.
        self._last[vdi] = "".join(letter if letter.isprintable() else "?" for letter in text)
        self._last.move_to_end(vdi)
        if len(self._last) > _MOST:
            self._last.popitem(last=False)
        self._events.publish("VDI", "mod", vdi)

    def last(self, vdi: str) -> str:
        """When, what and why, in words; empty if nobody was refused."""
        return self._last.get(vdi, "")
