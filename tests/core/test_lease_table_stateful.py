"""Random requests for files of the table, their ends and time, against what must hold after each of them."""

from collections.abc import Callable

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.lease_table import Grant, LeaseMode, LeaseTable, TableBusy
from gateway.images.files import FileIdentity
from tests.core.lease_requests import REPLACE, WRITE, A, B, C, holder

requests = st.dictionaries(st.sampled_from([A, B, C]), st.sampled_from(list(LeaseMode)), min_size=1)


class Request:
    def __init__(
        self,
        table: LeaseTable,
        files: dict[FileIdentity, LeaseMode],
        wait: float,
        first_for: float | None,
    ) -> None:
        self.table = table
        self.files = files
        self.wait = wait
        self.first_for = first_for
        self.ticket = table.ticket()
        self.scope = trio.CancelScope()
        self.grant: Grant | None = None
        self.outcome = "waits"

    async def run(self) -> None:
        now = trio.current_time()
        self.deadline = now + self.wait
        until = None if self.first_for is None else now + self.first_for
        with self.scope:
            try:
                self.grant = await self.table.acquire(
                    self.files,
                    holder(str(self.ticket)),
                    ticket=self.ticket,
                    deadline=self.deadline,
                    until=until,
                )
                self.outcome = "holds"
            except TableBusy as busy:
                self.outcome = "refused"
                self.check_refusal(busy.in_the_way)
        if self.outcome == "waits":
            self.outcome = "cancelled"

    def check_refusal(self, in_the_way: tuple[Grant, ...]) -> None:
        def conflicts(grant: Grant) -> bool:
            return any(
                mode.conflicts_with(grant.files[file])
                for file, mode in self.files.items()
                if file in grant.files
            )

        assert all(conflicts(grant) for grant in in_the_way)
        assert all(grant.granted or grant.ticket < self.ticket for grant in in_the_way)
        # Later ones may have been granted the files in the same instant, once this one had given up.
        earlier = {grant for grant in self.table.grants() if grant.ticket < self.ticket}
        assert {grant for grant in earlier if conflicts(grant)} <= set(in_the_way)
        now = trio.current_time()
        first = [grant.until is not None and now < grant.until for grant in in_the_way]
        assert first == sorted(first, reverse=True)
        assert first

    def conflicts_with(self, other: "Request") -> bool:
        return any(
            WRITE in (mode, other.files[file]) or mode is other.files[file] is REPLACE
            for file, mode in self.files.items()
            if file in other.files
        )


class LeaseTableMachine(RuleBasedStateMachine):
    """Each rule lets the trio run of the table go on until everybody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = MockClock()
        self.requests: list[Request] = []
        self.releases_seen = 0
        self._guest = _TrioGuest(self.clock, self._begin)
        self._guest.do(lambda: self._guest.nursery.start_soon(self._watch_releases))

    def _begin(self) -> None:
        self.table = LeaseTable()

    async def _watch_releases(self) -> None:
        while True:
            self.releases_seen = await self.table.some_release(self.releases_seen)

    def teardown(self) -> None:
        def end() -> None:
            self.clock.jump(100)

        self._guest.do(end)
        unended = [request for request in self.requests if request.outcome == "waits"]
        self._guest.close()
        assert not unended

    def _among(self, outcome: str) -> list[Request]:
        return [request for request in self.requests if request.outcome == outcome]

    @rule(
        files=requests,
        wait=st.sampled_from([0.0, 1.0, 5.0]),
        first_for=st.sampled_from([None, None, 2.0, 10.0]),
    )
    def ask(self, files: dict[FileIdentity, LeaseMode], wait: float, first_for: float | None) -> None:
        def begin() -> None:
            request = Request(self.table, files, wait, first_for)
            self.requests.append(request)
            self._guest.nursery.start_soon(request.run)

        self._guest.do(begin)

    @rule(data=st.data(), outcome=st.sampled_from(["holds", "waits"]))
    def end_one(self, data: st.DataObject, outcome: str) -> None:
        if among := self._among(outcome):
            request = data.draw(st.sampled_from(among))

            def end() -> None:
                if request.grant is None:
                    request.scope.cancel()
                else:
                    self.table.release(request.grant)
                    request.outcome = "released"

            self._guest.do(end)

    @rule(data=st.data())
    def release_and_cancel_in_one_instant(self, data: st.DataObject) -> None:
        if (holding := self._among("holds")) and (waiting := self._among("waits")):
            held, cancelled = data.draw(st.sampled_from(holding)), data.draw(st.sampled_from(waiting))

            def end() -> None:
                assert held.grant is not None
                cancelled.scope.cancel()
                self.table.release(held.grant)
                held.outcome = "released"

            self._guest.do(end)

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self._guest.do(lambda: self.clock.jump(seconds))

    @invariant()
    def no_two_holders_conflict(self) -> None:
        holding = self._among("holds")
        for index, one in enumerate(holding):
            assert not any(one.conflicts_with(other) for other in holding[index + 1 :])

    @invariant()
    def who_waits_has_somebody_in_front_and_time_left(self) -> None:
        before: list[Request] = []
        for request in self.requests:
            if request.outcome == "waits":
                assert any(request.conflicts_with(other) for other in (*before, *self._among("holds")))
                assert request.deadline > self.clock.current_time()
            if request.outcome in ("waits", "holds"):
                before.append(request)

    @invariant()
    def nobody_holds_what_an_earlier_one_waits_for(self) -> None:
        waiting: list[Request] = []
        for request in self.requests:
            if request.outcome == "holds":
                assert not any(
                    request.conflicts_with(other) for other in waiting if request.ticket > other.ticket
                )
            if request.outcome == "waits":
                waiting.append(request)

    @invariant()
    def the_table_knows_the_holders_and_nobody_else(self) -> None:
        for file in (A, B, C):
            expected = {str(request.ticket) for request in self._among("holds") if file in request.files}
            assert {who.who for who in self.table.holders_of(file)} == expected
        assert self.table.waiting == len(self._among("waits"))

    @invariant()
    def who_is_in_the_way_of_one_that_waits_is_wanted_and_nobody_else(self) -> None:
        waiting = self._among("waits")
        for request in self._among("holds"):
            assert request.grant is not None
            assert request.grant.wanted == any(request.conflicts_with(other) for other in waiting)

    @invariant()
    def every_end_is_announced_but_not_the_refusal_of_one_who_would_not_wait(self) -> None:
        ended = sum(
            request.outcome in ("released", "cancelled")
            or (request.outcome == "refused" and request.wait > 0)
            for request in self.requests
        )
        assert self.releases_seen == self.table.releases == ended


class _TrioGuest:
    """A trio run whose host is the test: it goes on only inside `do`, until all its tasks are blocked."""

    def __init__(self, clock: MockClock, begin: Callable[[], None]) -> None:
        self._ready: list[Callable[[], object]] = []
        self._ended = False
        self._over = False
        self._quiet = False
        self._sleeping: trio.Event | None = None
        self._work: list[Callable[[], None]] = []
        self._failure: BaseException | None = None
        trio.lowlevel.start_guest_run(
            self._main,
            begin,
            run_sync_soon_threadsafe=self._ready.append,
            done_callback=self._done,
            host_uses_signal_set_wakeup_fd=True,
            clock=clock,
            restrict_keyboard_interrupt_to_checkpoints=True,
        )
        self._turn()

    def do(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        assert self._sleeping is not None
        self._sleeping.set()
        self._turn()

    def close(self) -> None:
        def end() -> None:
            self.nursery.cancel_scope.cancel()

        self._ended = True
        self.do(end)

    def _turn(self) -> None:
        self._quiet = self._over
        while not self._quiet:
            if self._ready:
                self._ready.pop(0)()
        if self._failure is not None:
            raise self._failure

    async def _main(self, begin: Callable[[], None]) -> None:
        begin()
        async with trio.open_nursery() as self.nursery:
            while not self._ended:
                await wait_all_tasks_blocked()
                self._sleeping = trio.Event()
                self._quiet = True
                await self._sleeping.wait()
                while self._work:
                    self._work.pop(0)()

    def _done(self, outcome: object) -> None:
        self._failure = getattr(outcome, "error", None)
        self._over = self._quiet = True


TestLeaseTableMachine = LeaseTableMachine.TestCase
TestLeaseTableMachine.settings = settings(max_examples=60, stateful_step_count=40)
