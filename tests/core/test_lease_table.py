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


async def take(
    table: LeaseTable,
    who: str = "somebody",
    *,
    wait: float = 5,
    until: float | None = None,
    **modes: LeaseMode,
) -> Grant:
    files = {{"a": A, "b": B, "c": C}[name]: mode for name, mode in modes.items()}
    deadline = trio.current_time() + wait
    return await table.acquire(files, holder(who), ticket=table.ticket(), deadline=deadline, until=until)


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


async def test_a_new_file_with_the_number_of_one_that_was_deleted_and_is_being_let_go_of_is_held() -> None:
    table = LeaseTable()
    replacing, ending = await take(table, a=REPLACE), await take(table, b=REPLACE)
    table.extend(replacing, B, REPLACE)
    table.release(ending)
    with pytest.raises(TableBusy) as refused:
        await table.acquire({B: REPLACE}, holder(), ticket=table.ticket(), deadline=trio.current_time())
    assert refused.value.in_the_way == (replacing,)
    table.release(replacing)
    await take(table, b=WRITE)


async def test_who_would_not_wait_holds_up_nobody_and_is_wanted_by_nobody_even_for_an_instant(
    nursery: trio.Nursery,
) -> None:
    class Watch(trio.abc.Instrument):
        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            seen.append((table.waiting, reading.wanted))

    table = LeaseTable()
    reading = await take(table, "reader", a=READ)
    seen: list[tuple[int, bool]] = []
    watch = Watch()
    trio.lowlevel.add_instrument(watch)
    nursery.start_soon(lambda: take(table, "late reader", a=READ, wait=0))
    with pytest.raises(TableBusy) as refused:
        await take(table, "writer", a=WRITE, b=WRITE, wait=0)
    await take(table, "stranger", b=WRITE, wait=0)
    trio.lowlevel.remove_instrument(watch)
    assert refused.value.in_the_way[0] is reading
    assert set(seen) == {(0, False)}
    assert table.releases == 0, "a refusal is no reason to try again"


async def test_a_grant_is_wanted_from_the_request_on_until_that_is_given_up(nursery: trio.Nursery) -> None:
    table = LeaseTable()
    reading, stranger = await take(table, a=READ), await take(table, b=READ)
    scope = trio.CancelScope()

    async def write() -> None:
        with scope:
            await take(table, a=WRITE)

    nursery.start_soon(write)
    nursery.start_soon(lambda: take(table, b=READ))
    await wait_all_tasks_blocked()
    assert (reading.wanted, stranger.wanted) == (True, False)
    scope.cancel()
    await wait_all_tasks_blocked()
    assert (reading.wanted, stranger.wanted) == (False, False)


async def test_who_goes_first_is_named_first_as_long_as_it_does(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    table = LeaseTable()
    reading = await take(table, "reader", a=READ)
    until = trio.current_time() + 10
    nursery.start_soon(lambda: take(table, "coalescer", a=WRITE, b=WRITE, wait=30, until=until))
    await wait_all_tasks_blocked()
    for wait, names in ((0, ["coalescer", "reader"]), (11, ["reader", "coalescer"])):
        with pytest.raises(TableBusy) as refused:
            await take(table, a=WRITE, wait=wait)
        assert [grant.holder.who for grant in refused.value.in_the_way] == names
    table.release(reading)
    assert [who.who for who in table.holders_of(B)] == ["coalescer"]


async def test_who_waits_for_some_release_misses_none_that_came_before_the_wait(
    nursery: trio.Nursery,
) -> None:
    table = LeaseTable()
    first, second = await take(table, a=WRITE), await take(table, b=WRITE)
    before = table.releases
    table.release(first, announce=False)
    assert table.releases == before
    table.release(second)
    table.release(second)
    assert await table.some_release(before) == table.releases == before + 1
    woken: list[int] = []

    async def wait() -> None:
        woken.append(await table.some_release())

    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert woken == []
    table.release(await take(table, c=READ))
    await wait_all_tasks_blocked()
    assert woken == [before + 2]


async def test_who_kept_an_early_place_and_waits_no_more_is_wanted_by_those_behind_it(
    nursery: trio.Nursery,
) -> None:
    table = LeaseTable()
    early = table.ticket()
    await take(table, a=READ)
    nursery.start_soon(lambda: take(table, a=WRITE))
    await wait_all_tasks_blocked()
    grant = await table.acquire({A: READ}, holder(), ticket=early, deadline=trio.current_time())
    assert grant.wanted


async def test_who_is_adopted_is_wanted_by_those_who_wait_already(nursery: trio.Nursery) -> None:
    table = LeaseTable()
    await take(table, a=READ)
    nursery.start_soon(lambda: take(table, a=WRITE))
    await wait_all_tasks_blocked()
    assert table.adopt({A: READ}, holder()).wanted


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
TestLeaseTableMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
