"""Threads that each do the same again and again until the end; what fails in one of them fails the test."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.system.site import wait_until


@dataclass
class Crew:
    """`turns` counts what each thread has done, by its name."""

    rng: random.Random
    turns: dict[str, int] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _going: threading.Event = field(default_factory=threading.Event)
    _ending: threading.Event = field(default_factory=threading.Event)
    _resting: set[str] = field(default_factory=set)

    def go(self) -> None:
        self._going.set()

    def start(self, name: str, turn: Callable[..., None], *arguments: object) -> None:
        """A thread that calls `turn` with a generator of random numbers of its own, and with `arguments`."""
        rng = random.Random(self.rng.random())
        self.turns[name] = 0

        def loop() -> None:
            try:
                while not self._ending.is_set():
                    if not self._going.is_set():
                        self._resting.add(name)
                        self._going.wait()
                        self._resting.discard(name)
                        continue
                    turn(rng, *arguments)
                    self.turns[name] += 1
            except BaseException as error:  # noqa: BLE001 - it is raised by `check`
                self.failures.append(error)

        thread = threading.Thread(target=loop, name=name)
        self._threads.append(thread)
        thread.start()

    def check(self) -> bool:
        """Raise what went wrong in a thread."""
        if self.failures:
            raise self.failures[0]
        return True

    def everybody_has_had(self, turns: int) -> None:
        """Wait until each thread has had so many turns from now on."""
        goal = {name: count + turns for name, count in self.turns.items()}
        wait_until(
            lambda: self.check() and all(self.turns[name] >= goal[name] for name in goal),
            f"{turns} turns of everybody",
            300,
        )

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Nobody does anything for the time of a block."""
        self._going.clear()
        wait_until(lambda: self.check() and len(self._resting) == len(self._threads), "all to rest", 120)
        yield
        self._going.set()
        wait_until(lambda: not self._resting, "all to go on")

    def end(self) -> None:
        self._ending.set()
        self._going.set()
        for thread in self._threads:
            thread.join()
