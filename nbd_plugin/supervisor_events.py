"""The one place where the supervisor waits: descriptors that have something to say, and signals.

The trap: what one event does may close the descriptor of another that has come at the same time. So each is
looked up again before its turn, and one that nobody watches any more is left out.
"""

import contextlib
import os
import selectors
import signal
from collections.abc import Callable, Iterable


class Events:
    """What to do when a descriptor can be read or has ended."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def watch(self, fd: int, act: Callable[[], None]) -> None:
        """Call `act` whenever `fd` has something, in place of what was called for it before."""
        self.forget(fd)
        self._selector.register(fd, selectors.EVENT_READ, act)

    def forget(self, fd: int) -> None:
        """Watch `fd` no longer; to be called before it is closed. One that isn't watched is fine."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def watch_signals(self, numbers: Iterable[int], act: Callable[[int], None]) -> None:
        """Call `act` with the number of each of these signals that comes. On the main thread."""
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)

        def come() -> None:
            for number in os.read(reading, 64):
                act(number)

        self.watch(reading, come)

    def wait(self, seconds: float) -> None:
        """Wait for up to `seconds`, and do what is to be done for what has come."""
        for key, _ in self._selector.select(seconds):
            if self._selector.get_map().get(key.fd) is key:
                key.data()
