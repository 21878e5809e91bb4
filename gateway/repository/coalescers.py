"""The coalescers of all attached writable SRs, and who tells them that there may be something to do.

The trap: an SR is detached only after its coalescer has ended, for that has leases on its files and writes
to them; and one that could not be detached after all gets a new one.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.leases import Leases
from gateway.core.limits import Limits
from gateway.core.records import Records
from gateway.core.tasks import Tasks
from gateway.repository.coalescer import Coalescer
from gateway.repository.repository import Repository

_NOT_HERE: Final = "the SR is not attached writable here"


class Coalescers:
    """By reference of their SRs. `run` must be running.

    `refresh_sizes` brings an SR's record up to date, `reconcile` those of its VDIs. `drop_emptied` removes
    what is left of snapshots' images and isn't needed any more.
    """

    def __init__(
        self,
        records: Records,
        leases: Leases,
        events: Events,
        *,
        tasks: Tasks,
        limits: Limits,
        refresh_sizes: Callable[[str], Awaitable[None]],
        reconcile: Callable[[str], Awaitable[object]],
        drop_emptied: Callable[[str], Awaitable[None]],
    ) -> None:
        self._records = records
        self._leases = leases
        self._events = events
        self._tasks = tasks
        self._limits = limits
        self._refresh_sizes = refresh_sizes
        self._reconcile = reconcile
        self._drop_emptied = drop_emptied
        self._coalescers: dict[str, Coalescer] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Coalesce until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for coalescer in self._coalescers.values():
                    nursery.start_soon(coalescer.run)
                await self._watch()
            finally:
                self._nursery = None

    def begin(self, sr: str, repository: Repository) -> None:
        """Coalesce an SR that has just been attached, if it is writable."""
        if not repository.writable:
            return
        coalescer = self._coalescers[sr] = Coalescer(
            sr,
            repository,
            records=self._records,
            leases=self._leases,
            tasks=self._tasks,
            limits=self._limits,
            refresh_sizes=self._refresh_sizes,
            reconcile=self._reconcile,
            drop_emptied=self._drop_emptied,
        )
        if self._nursery is not None:
            self._nursery.start_soon(coalescer.run)

    async def end(self, sr: str) -> None:
        """Let go of an SR that is about to be detached: what was copied is durable on return."""
        coalescer = self._coalescers.pop(sr, None)
        if coalescer is not None:
            await coalescer.stop(XenAPIError("SR_NOT_ATTACHED", sr))

    def trigger(self, sr: str) -> None:
        """There may be something to do in an SR; nothing if it is not coalesced here."""
        coalescer = self._coalescers.get(sr)
        if coalescer is not None:
            coalescer.trigger()

    def of(self, sr: str) -> Coalescer:
        """The coalescer of an SR. Raises OPERATION_NOT_ALLOWED."""
        coalescer = self._coalescers.get(sr)
        if coalescer is None:
            raise XenAPIError("OPERATION_NOT_ALLOWED", _NOT_HERE)
        return coalescer

    def state(self, sr: str) -> dict[str, str]:
        """See Coalescer.state; empty for an SR that isn't coalesced here."""
        coalescer = self._coalescers.get(sr)
        return {} if coalescer is None else coalescer.state()

    async def _watch(self) -> None:
        """SR.other_config has switches, which count at once."""
        counter = self._events.counter
        while True:
            await self._events.wait_past(counter)
            changes = self._events.since(counter)
            counter = self._events.counter
            for sr, coalescer in list(self._coalescers.items()):
                if changes is None or any(change.ref == sr for change in changes):
                    coalescer.switches_may_have_changed()
