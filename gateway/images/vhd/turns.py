"""Who writes sectors that are new to their block, and who fills such a sector up from what the parents have.

A write that begins or ends within a sector which the leaf doesn't have yet puts the parents' bytes beside its
own. In between nobody else may write there, or what he has written would be undone. So whoever fills a sector
up is alone; all others go side by side.
The trap: who waits to be alone must not have entered himself.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Of one leaf. `lock` guards what changes here, too; it is not to be held by who calls."""

    def __init__(self, lock: threading.Lock) -> None:
        self._changed = threading.Condition(lock)
        self._writing = 0
        self._filling = False

    def enter(self) -> None:
        """Begin to write; waits while a sector is filled up. To be followed by `leave`."""
        with self._changed:
            while self._filling:
                self._changed.wait()
            self._writing += 1

    def leave(self) -> None:
        """What was written can be seen."""
        with self._changed:
            self._writing -= 1
            if self._filling:
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until all who write have left, and let nobody in meanwhile. One at a time may ask for it."""
        try:
            with self._changed:
                self._filling = True
                while self._writing:
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                self._filling = False
                self._changed.notify_all()
