"""Who writes whole sectors, and who writes a part of one.

A write that begins or ends within a sector reads it and writes it with its own bytes put in. If others wrote
there in between, that would be undone. So who does it is alone; all others go side by side.

Nearly all writes are of whole sectors, so they take no lock: each notes itself and then looks whether
somebody is alone, who says so and then looks who is noted. One of two who come together sees the other.
The traps: who waits to be alone must not have entered himself; a thread enters once at a time; and leaving
must not need memory, or who has none keeps others waiting for ever (a Condition's own `with` needs some).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Final


class Turns:
    """Of one leaf. The lock is held for moments only; allocations may wait for a sync and have another."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._changed: Final = threading.Condition(self._lock)
        self._writing: Final[set[int]] = set()  # threads
        self._alone = False

    def enter(self) -> int:
        """Begin to write; waits while somebody is alone. To be followed by `leave` with what it returns."""
        thread = get_ident()
        self._writing.add(thread)
        while self._alone:
            self._stand_back(thread)
        return thread

    def leave(self, thread: int) -> None:
        """What was written can be seen."""
        self._writing.discard(thread)
        if self._alone:
            with self._lock:
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until all who write have left, and let nobody in meanwhile. One at a time may ask for it."""
        try:
            with self._lock:
                self._alone = True
                while self._writing:
                    self._changed.wait()
            yield
        finally:
            with self._lock:
                self._alone = False
                self._changed.notify_all()

    def _stand_back(self, thread: int) -> None:
        self._writing.discard(thread)
        with self._lock:
            self._changed.notify_all()
            while self._alone:
                self._changed.wait()
            self._writing.add(thread)
