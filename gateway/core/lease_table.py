"""The upper layer of a lease: who in this gateway uses which files, and who waits for them.

One request names a set of files, each with a mode, and is granted all of them at once or none: nobody
holds one file while waiting for another, so there is no deadlock. Requests are served in the order in which
they first asked, except that one which disturbs nobody in front of it need not wait. So nobody starves: what
a waiting request waits for was there before it. Who would not wait at all is never in the queue: it must not
hold up others, not even for an instant.

The table knows files by device and inode and opens none. It belongs to one trio run; every method but
`acquire` and `some_release` is a plain call without checkpoints, so that what it says is true until the
caller next awaits. The trap: `Grant.wanted` and what it stands on are read from other threads.
"""

import itertools
from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from types import MappingProxyType

import trio

from gateway.core.clock import utc_now
from gateway.core.refs import new_uuid
from gateway.images.files import FileIdentity


class LeaseMode(Enum):
    """What the holder of a lease may do with a file, and whom it bears beside itself."""

    READ = "read"
    """Reads; beside other readers and beside one that prepares a replacement."""

    REPLACE = "replace"
    """The name will get another file: readers stay with the old one, no writer, no second replacer."""

    WRITE = "write"
    """Writes in place, coalesces into it or destroys it: alone."""

    def conflicts_with(self, other: "LeaseMode") -> bool:
        """Whether two holders of one file may not have these modes together."""
        if LeaseMode.WRITE in (self, other):
            return True
        return self is LeaseMode.REPLACE and other is LeaseMode.REPLACE


@dataclass(frozen=True)
class Holder:
    """Who holds a lease and what for, as it is told to those who are refused because of it.

    `vdi` and `task` are references; `operation` is one of XenAPI's VDI operations ("destroy") or a word of
    the door it came through ("import_raw_vdi").
    """

    who: str
    operation: str
    vdi: str
    task: str | None = None

    def __str__(self) -> str:
        task = f", task {self.task}" if self.task else ""
        return f"{self.operation} by {self.who}{task}"


@dataclass(eq=False)
class Grant:
    """One request in the table, waiting or granted.

    `since` (trio's clock) and `began` (the wall clock) say when it was granted, or else when it asked. Up to
    `until` (trio's clock) it goes before all others. `wanted`: somebody waits for what it holds.
    """

    ticket: int
    holder: Holder
    files: Mapping[FileIdentity, LeaseMode]
    since: float
    until: float | None = None
    began: datetime = field(default_factory=utc_now)
    uuid: str = field(default_factory=new_uuid)
    granted: bool = False
    wanted: bool = False
    arrival: trio.Event = field(default_factory=trio.Event)

    def goes_first(self, now: float) -> bool:
        """Whether it goes before all others at `now` (trio's clock)."""
        return self.until is not None and now < self.until


class TableBusy(Exception):  # noqa: N818 - a state of the table, not a fault
    """The wait is over and others, `in_the_way`, still are there; the one that decides is the first."""

    def __init__(self, in_the_way: tuple[Grant, ...]) -> None:
        super().__init__(str(in_the_way[0].holder))
        self.in_the_way = in_the_way

    @property
    def holder(self) -> Holder:
        """Who decides."""
        return self.in_the_way[0].holder


class LeaseTable:
    """All grants of one gateway. `changed` is called with a VDI's reference when its grants are others."""

    def __init__(self, changed: Callable[[str], None] | None = None) -> None:
        self._changed = changed
        self._tickets = itertools.count()
        # VDI -> what is granted for it, in the order of granting
        self._of_vdi: dict[str, dict[str, Grant]] = {}
        self._held: dict[FileIdentity, list[Grant]] = {}
        self._waiting: list[Grant] = []
        self._wanted: set[Grant] = set()
        self._releases = 0
        self._awaiting_release = trio.lowlevel.ParkingLot()

    def ticket(self) -> int:
        """A place in the queue. Who has to ask again for other files keeps the one it has."""
        return next(self._tickets)

    async def acquire(
        self,
        files: Mapping[FileIdentity, LeaseMode],
        holder: Holder,
        *,
        ticket: int,
        deadline: float,
        until: float | None = None,
    ) -> Grant:
        """Wait for all of `files` until `deadline` (trio's clock), then raise TableBusy.

        Cancelled or refused, the request leaves nothing behind. A request that can be granted at once is,
        even when its deadline has passed; if it can't be, it is not queued then, so nobody waits for it and
        no grant is wanted because of it. For `until` see Grant.
        """
        await trio.lowlevel.checkpoint()
        grant = Grant(ticket, holder, MappingProxyType(dict(files)), trio.current_time(), until)
        if deadline <= grant.since:
            if in_the_way := self._in_the_way(grant):
                raise TableBusy(in_the_way)
            self._enter(grant)
            self._mark_wanted()
            return grant
        insort(self._waiting, grant, key=lambda waiting: waiting.ticket)
        self._serve()
        try:
            if not grant.granted:
                with trio.move_on_at(deadline):
                    await grant.arrival.wait()
        except BaseException:
            # Also when the grant came in the same instant as the cancellation.
            self.release(grant)
            raise
        if grant.granted:
            return grant
        in_the_way = self._in_the_way(grant)
        self.release(grant)
        raise TableBusy(in_the_way)

    def adopt(self, files: Mapping[FileIdentity, LeaseMode], holder: Holder) -> Grant:
        """Enter what is held already, whoever stands or waits in the way.

        For a holder from before a restart, whose locks the caller has verified: then a conflicting grant here
        is only that of somebody who doesn't get the locks.
        """
        grant = Grant(self.ticket(), holder, MappingProxyType(dict(files)), trio.current_time())
        self._enter(grant)
        self._mark_wanted()
        return grant

    def release(self, grant: Grant, *, announce: bool = True) -> None:
        """End a grant, or take a waiting request back. Doing so twice changes nothing.

        Unless `announce` is False, those who wait for `some_release` are told: it may be worth trying again.
        """
        if grant.granted:
            grant.granted = False
            for file in grant.files:
                self._held[file].remove(grant)
                if not self._held[file]:
                    del self._held[file]
            of_vdi = self._of_vdi[grant.holder.vdi]
            del of_vdi[grant.uuid]
            if not of_vdi:
                del self._of_vdi[grant.holder.vdi]
            self._tell(grant)
        elif grant in self._waiting:
            self._waiting.remove(grant)
        else:
            return
        self._serve()
        if announce:
            self._releases += 1
            self._awaiting_release.unpark_all()

    @property
    def releases(self) -> int:
        """How many grants and waiting requests have ended so far and were announced."""
        return self._releases

    async def some_release(self, after: int | None = None) -> int:
        """Wait until `releases` is more than `after` (by default, than now) and return it."""
        after = self._releases if after is None else after
        await trio.lowlevel.checkpoint()
        while self._releases <= after:
            await self._awaiting_release.park()
        return self._releases

    def extend(self, grant: Grant, file: FileIdentity, mode: LeaseMode) -> None:
        """Hold one more file, which nobody else can have asked for yet: a replacement before its rename.

        Whoever seems to hold it holds a deleted file that had its number: files are closed, and so freed,
        before their grants end. That is over soon, and until then others bear with both.
        """
        if not grant.granted:
            raise ValueError("a grant that has ended cannot be extended")
        if file not in grant.files:
            self._held.setdefault(file, []).append(grant)
        grant.files = MappingProxyType({**grant.files, file: mode})

    def holders_of(self, file: FileIdentity) -> tuple[Holder, ...]:
        """Who holds `file` now, first come first."""
        return tuple(grant.holder for grant in self._held.get(file, ()))

    def grants_for(self, vdi: str) -> tuple[Grant, ...]:
        """What is granted for the VDI with this reference."""
        return tuple(self._of_vdi.get(vdi, {}).values())

    def work_under(self, grant: Grant, task: str) -> None:
        """The holder's task is known now."""
        grant.holder = replace(grant.holder, task=task)
        self._tell(grant)

    def grants(self) -> tuple[Grant, ...]:
        """All that is granted, in the order of asking."""
        grants = {grant.ticket: grant for held in self._held.values() for grant in held}
        return tuple(grants[ticket] for ticket in sorted(grants))

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def _serve(self) -> None:
        """Grant what nobody in front of it stands in the way of, in one pass over the queue.

        Granting never makes room for an earlier request, so one pass is enough.
        """
        passed_over: list[Grant] = []
        for grant in self._waiting:
            if any(self._conflicts(grant, other) for other in passed_over) or next(
                self._conflicting_holders(grant), None
            ):
                passed_over.append(grant)
                continue
            self._enter(grant)
        self._waiting = passed_over
        self._mark_wanted()

    def _mark_wanted(self) -> None:
        wanted = {holding for grant in self._waiting for holding in self._conflicting_holders(grant)}
        for grant in self._wanted - wanted:
            grant.wanted = False
        for grant in wanted:
            grant.wanted = True
        self._wanted = wanted

    def _enter(self, grant: Grant) -> None:
        grant.granted = True
        grant.since = trio.current_time()
        grant.began = utc_now()
        for file in grant.files:
            self._held.setdefault(file, []).append(grant)
        self._of_vdi.setdefault(grant.holder.vdi, {})[grant.uuid] = grant
        grant.arrival.set()
        self._tell(grant)

    def _tell(self, grant: Grant) -> None:
        if self._changed is not None:
            self._changed(grant.holder.vdi)

    def _conflicting_holders(self, grant: Grant) -> Iterator[Grant]:
        for file, mode in grant.files.items():
            for other in self._held.get(file, ()):
                if mode.conflicts_with(other.files[file]):
                    yield other

    def _in_the_way(self, grant: Grant) -> tuple[Grant, ...]:
        """Who keeps `grant` from being granted now: those who go first, who hold, who asked before it."""
        found = dict.fromkeys(self._conflicting_holders(grant))
        for other in self._waiting:
            if other.ticket < grant.ticket and self._conflicts(grant, other):
                found[other] = None
        now = trio.current_time()
        return tuple(sorted(found, key=lambda other: not other.goes_first(now)))

    @staticmethod
    def _conflicts(one: Grant, other: Grant) -> bool:
        return any(
            mode.conflicts_with(other.files[file]) for file, mode in one.files.items() if file in other.files
        )
