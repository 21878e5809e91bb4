"""Who writes whole sectors, and who writes a part of one.

A write that begins or ends within a sector reads it and writes it with its own bytes put in. If others wrote
there in between, that would be undone. So who does it is alone; all others go side by side.
The trap: who waits to be alone must not have entered himself.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Of one leaf. The lock is held for moments only; allocations may wait for a sync and have another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._writing = 0
        self._alone = False

    def enter(self) -> None:
        """Begin to write; waits while somebody is alone. To be followed by `leave`."""
        with self._lock:
            while self._alone:
                self._changed.wait()
            self._writing += 1

    def leave(self) -> None:
        """What was written can be seen."""
        with self._lock:
            self._writing -= 1
            if self._alone:
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
