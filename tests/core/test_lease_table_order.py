"""Who is granted which files of the table, in which order, and who is wanted or told meanwhile."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.lease_table import Grant, LeaseMode, LeaseTable, TableBusy
from tests.core.lease_requests import READ, REPLACE, WRITE, A, B, C, holder


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
