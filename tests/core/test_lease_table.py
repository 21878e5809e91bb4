from collections.abc import Callable

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.lease_table import Grant, Holder, LeaseMode, LeaseTable, TableBusy
from gateway.images.files import FileIdentity

READ, REPLACE, WRITE = LeaseMode.READ, LeaseMode.REPLACE, LeaseMode.WRITE
A, B, C = (FileIdentity(1, inode) for inode in range(3))


def holder(who: str = "somebody") -> Holder:
    return Holder(who, "test", "OpaqueRef:vdi")


async def take(table: LeaseTable, who: str = "somebody", **modes: LeaseMode) -> Grant:
    files = {{"a": A, "b": B, "c": C}[name]: mode for name, mode in modes.items()}
    return await table.acquire(files, holder(who), ticket=table.ticket(), deadline=trio.current_time() + 5)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (READ, READ, True),
        (READ, REPLACE, True),
        (READ, WRITE, False),
        (REPLACE, REPLACE, False),
        (REPLACE, WRITE, False),
        (WRITE, WRITE, False),
    ],
)
def test_modes_conflict_symmetrically(first: LeaseMode, second: LeaseMode, together: bool) -> None:
    assert first.conflicts_with(second) is second.conflicts_with(first) is not together


async def test_a_refused_request_names_the_holder_after_the_wait(autojump_clock: MockClock) -> None:
    table = LeaseTable()
    await take(table, "the writer", a=WRITE)
    began = trio.current_time()
    with pytest.raises(TableBusy) as refused:
        await take(table, a=READ)
    assert refused.value.holder.who == "the writer"
    assert trio.current_time() - began == pytest.approx(5)
    assert table.waiting == 0


async def test_a_request_is_granted_all_its_files_or_none(nursery: trio.Nursery) -> None:
    table = LeaseTable()
    first = await take(table, "first", b=WRITE)
    nursery.start_soon(lambda: take(table, "second", a=WRITE, b=WRITE))
    await wait_all_tasks_blocked()
    assert table.holders_of(A) == ()
    table.release(first)
    await wait_all_tasks_blocked()
    assert [who.who for who in (*table.holders_of(A), *table.holders_of(B))] == ["second", "second"]


async def test_readers_do_not_overtake_a_waiting_writer_but_strangers_do(nursery: trio.Nursery) -> None:
    table = LeaseTable()
    reading = await take(table, "reader", a=READ)
    nursery.start_soon(lambda: take(table, "writer", a=WRITE))
    await wait_all_tasks_blocked()
    nursery.start_soon(lambda: take(table, "late reader", a=READ))
    await take(table, "stranger", b=WRITE)
    await wait_all_tasks_blocked()
    assert [who.who for who in table.holders_of(A)] == ["reader"]
    table.release(reading)
    assert [who.who for who in table.holders_of(A)] == ["writer"]


async def test_who_asks_again_for_other_files_keeps_its_place(nursery: trio.Nursery) -> None:
    table = LeaseTable()
    early = table.ticket()
    blocking = await take(table, "blocking", a=WRITE)
    nursery.start_soon(lambda: take(table, "late", a=WRITE))
    await wait_all_tasks_blocked()

    async def ask() -> None:
        await table.acquire({A: WRITE}, holder("early"), ticket=early, deadline=trio.current_time() + 5)

    nursery.start_soon(ask)
    await wait_all_tasks_blocked()
    table.release(blocking)
    assert [who.who for who in table.holders_of(A)] == ["early"]


async def test_a_cancelled_request_lets_those_behind_it_through(nursery: trio.Nursery) -> None:
    table = LeaseTable()
    await take(table, "reader", a=READ)
    scope = trio.CancelScope()

    async def write() -> None:
        with scope:
            await take(table, "writer", a=WRITE)

    nursery.start_soon(write)
    await wait_all_tasks_blocked()
    nursery.start_soon(lambda: take(table, "late reader", a=READ))
    await wait_all_tasks_blocked()
    scope.cancel()
    await wait_all_tasks_blocked()
    assert [who.who for who in table.holders_of(A)] == ["reader", "late reader"]
    assert table.waiting == 0


async def test_a_grant_that_comes_together_with_a_cancellation_is_given_back(nursery: trio.Nursery) -> None:
    table = LeaseTable()
    first = await take(table, a=WRITE)
    scope = trio.CancelScope()

    async def write() -> None:
        with scope:
            await take(table, a=WRITE)

    nursery.start_soon(write)
    await wait_all_tasks_blocked()
    scope.cancel()
    table.release(first)
    await wait_all_tasks_blocked()
    assert table.holders_of(A) == ()


async def test_an_extended_grant_holds_and_releases_the_new_file_too() -> None:
    table = LeaseTable()
    grant = await take(table, a=REPLACE)
    table.extend(grant, B, REPLACE)
    with pytest.raises(TableBusy):
        await table.acquire({B: REPLACE}, holder(), ticket=table.ticket(), deadline=trio.current_time())
    await take(table, b=READ)
    table.release(grant)
    await take(table, b=REPLACE)


requests = st.dictionaries(st.sampled_from([A, B, C]), st.sampled_from(list(LeaseMode)), min_size=1)


class Request:
    def __init__(self, table: LeaseTable, files: dict[FileIdentity, LeaseMode], wait: float) -> None:
        self.table = table
        self.files = files
        self.wait = wait
        self.ticket = table.ticket()
        self.scope = trio.CancelScope()
        self.grant: Grant | None = None
        self.outcome = "waits"

    async def run(self) -> None:
        self.deadline = trio.current_time() + self.wait
        with self.scope:
            try:
                self.grant = await self.table.acquire(
                    self.files, holder(str(self.ticket)), ticket=self.ticket, deadline=self.deadline
                )
                self.outcome = "holds"
            except TableBusy:
                self.outcome = "refused"
        if self.outcome == "waits":
            self.outcome = "cancelled"

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
        self._guest = _TrioGuest(self.clock, self._begin)

    def _begin(self) -> None:
        self.table = LeaseTable()

    def teardown(self) -> None:
        def end() -> None:
            self.clock.jump(100)

        self._guest.do(end)
        unended = [request for request in self.requests if request.outcome == "waits"]
        self._guest.close()
        assert not unended

    def _among(self, outcome: str) -> list[Request]:
        return [request for request in self.requests if request.outcome == outcome]

    @rule(files=requests, wait=st.sampled_from([0.0, 1.0, 5.0]))
    def ask(self, files: dict[FileIdentity, LeaseMode], wait: float) -> None:
        def begin() -> None:
            request = Request(self.table, files, wait)
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


class _TrioGuest:
    """A trio run whose host is the test: it goes on only inside `do`, until all its tasks are blocked."""

    def __init__(self, clock: MockClock, begin: Callable[[], None]) -> None:
        self._ready: list[Callable[[], object]] = []
        self._ended = False
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
        self._quiet = False
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
        self._quiet = True


TestLeaseTableMachine = LeaseTableMachine.TestCase
TestLeaseTableMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
