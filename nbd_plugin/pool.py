"""The workers on one set of sockets: as many as wanted, started again when they crash, replaced in order.

It acts when it is told what has happened and what time it is; waiting is the supervisor's. The trap: while a
worker that failed is waited for, clients queue up in the sockets, which is why they are the supervisor's.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from nbd_plugin.worker import Worker, WorkerOptions, start_worker

FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 30.0
SOUND_SECONDS: Final = 60.0  # a worker that has lived for so long was not doomed from its start

Start = Callable[[WorkerOptions, Sequence[socket.socket]], Worker]


class Pool:
    """`wanted` workers. With `on_demand` the first starts when somebody connects."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        options: WorkerOptions,
        wanted: int,
        *,
        on_demand: bool = False,
        start: Start = start_worker,
    ) -> None:
        self.sockets: Final = tuple(sockets)
        self.options = options
        self.present: set[Worker] = set()
        self.leaving: set[Worker] = set()
        self.again_at: float | None = None
        """When the next try to start is due; None: there is nothing to wait for."""
        self._wanted = wanted
        self._on_demand: Final = on_demand
        self._failures = 0
        self._options_coming = options
        self._coming: set[Worker] = set()  # take the place of the present ones once all are ready
        self._start: Final = start

    @property
    def workers(self) -> set[Worker]:
        return self.present | self._coming | self.leaving

    @property
    def is_ready(self) -> bool:
        """Whether all that should run have said so."""
        return len(self.present) == self._wanted and all(each.ready for each in self.present)

    @property
    def waits_for_demand(self) -> bool:
        """Whether the sockets have to be watched for a client."""
        return self._on_demand and not self.present and self.again_at is None and self._wanted > 0

    @property
    def is_being_replaced(self) -> bool:
        return bool(self._coming)

    def fill(self, now: float) -> list[Worker]:
        """Start what is missing and due. Raises OSError; then it is tried again later."""
        if self.again_at is not None and now < self.again_at:
            return []
        self.again_at = None
        started = []
        while len(self.present) < self._wanted:
            try:
                worker = self._start(self.options, self.sockets)
            except OSError:
                self.put_off(now)
                raise
            self.present.add(worker)
            started.append(worker)
        return started

    def replace_by(self, options: WorkerOptions) -> list[Worker]:
        """Start a new generation; the present one leaves when all of it are ready. Raises OSError."""
        self.abandon_replacement()
        if not self.present:
            self.options = options
            return []
        coming = set()
        try:
            for _ in range(self._wanted):
                coming.add(self._start(options, self.sockets))
        finally:
            self._coming = coming
        self._options_coming = options
        return list(coming)

    def abandon_replacement(self) -> None:
        """Go on with the present generation."""
        for each in self._coming:
            each.tell("stop")
        self.leaving |= self._coming
        self._coming = set()

    def look(self) -> bool:
        """Whether a new generation has taken over now."""
        if not self._coming or not all(each.ready for each in self._coming):
            return False
        for each in self.present:
            each.tell("drain")
        self.leaving |= self.present
        self.present, self._coming = self._coming, set()
        self.options = self._options_coming
        self._failures = 0
        self.again_at = None
        return True

    def ended(self, worker: Worker, now: float) -> bool:
        """A worker has ended. Whether that was a failure; then it is started again after a pause."""
        if worker in self.leaving:
            self.leaving.discard(worker)
            return False
        if worker in self._coming:
            self._coming.discard(worker)
            self.abandon_replacement()
            return True
        self.present.discard(worker)
        if now - worker.started >= SOUND_SECONDS:
            self._failures = 0
        self.put_off(now)
        return True

    def put_off(self, now: float) -> None:
        """Wait twice as long as the last time."""
        self.again_at = now + min(FIRST_PAUSE_SECONDS * 2**self._failures, LONGEST_PAUSE_SECONDS)
        self._failures = min(self._failures + 1, 20)

    def stop(self, order: str) -> None:
        """Accept nobody any more: `drain` serves those who are there, `stop` what they have asked already."""
        self._wanted = 0
        self.again_at = None
        for listening in self.sockets:
            listening.close()
        for each in self.workers:
            each.tell(order)
        self.leaving |= self.present | self._coming
        self.present, self._coming = set(), set()

    def with_tls(self, directory: str | None) -> WorkerOptions:
        """The options with other certificates."""
        return replace(self.options, tls=directory)
