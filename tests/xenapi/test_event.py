import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.leases import Holder, LeaseMode
from gateway.core.roles import Role
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.dispatch import Api, Caller
from gateway.xenapi.event import MOST_WORDS, token_of
from gateway.xenapi.jsonrpc import read_jsonrpc
from gateway.xenapi.xmlrpc import dump_value

from .estate_for_tests import ADMIN, CALLER, Site, open_site, refusal, sr_of

LONG = 1000.0


def brief(batch: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(event["class"], event["operation"], event["ref"]) for event in batch["events"]]


async def current(site: Site) -> str:
    """A token that knows everything until now."""
    return token_of(site.events, site.events.counter)


async def task_of(site: Site) -> str:
    ref: str = await site.call("task.create", ADMIN, "label", "")
    return ref


async def test_an_empty_token_tells_everything_that_is_there(site: Site) -> None:
    task = await task_of(site)
    batch = await site.call("event.from", ADMIN, ["task", "pool", "vdi"], "", 0.0)
    pool = site.estate.records.pool.ref
    assert brief(batch) == [("task", "add", task), ("pool", "add", pool)]
    assert batch["events"][0]["snapshot"] == await site.call("task.get_record", ADMIN, task)
    assert batch["valid_ref_counts"] == {"task": 1, "pool": 1, "vdi": 0}
    assert len(batch["token"]) == 41


async def test_both_names_and_the_star(site: Site) -> None:
    batch = await site.call("event_from", ADMIN, ["*"], "", 0.0)
    assert {event["class"] for event in batch["events"]} == {"pool", "host", "network", "pif"}
    assert set(batch["valid_ref_counts"]) == {
        *["task", "pool", "host", "network", "pif", "sr", "pbd", "vdi", "vbd", "user"]
    }


async def test_it_sleeps_until_something_that_is_wanted_happens(site: Site) -> None:
    token = await current(site)
    batches: list[dict[str, Any]] = []

    async def listen() -> None:
        batches.append(await site.call("event.from", ADMIN, ["Task"], token, LONG))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        site.events.publish("pool", "mod", site.estate.records.pool.ref)
        await trio.testing.wait_all_tasks_blocked()
        assert batches == []
        task = await task_of(site)
    assert brief(batches[0]) == [("task", "add", task)]


async def test_many_changes_of_one_object_are_one_event_with_the_record_as_it_is(site: Site) -> None:
    task = await task_of(site)
    token = await current(site)
    for number in range(5):
        await site.call("task.add_to_other_config", ADMIN, task, str(number), "")
    batch = await site.call("event.from", ADMIN, ["task"], token, LONG)
    assert brief(batch) == [("task", "mod", task)]
    assert len(batch["events"][0]["snapshot"]["other_config"]) == 5
    after = await site.call("event.from", ADMIN, ["task"], batch["token"], 0.0)
    assert after["events"] == []
    assert after["token"] == batch["token"]


async def test_what_came_and_changed_since_is_told_as_new_and_what_went_as_gone(site: Site) -> None:
    gone = await task_of(site)
    token = await current(site)
    task = await task_of(site)
    await site.call("task.add_to_other_config", ADMIN, task, "k", "v")
    await site.call("task.destroy", ADMIN, gone)
    batch = await site.call("event.from", ADMIN, ["task"], token, LONG)
    assert brief(batch) == [("task", "add", task), ("task", "del", gone)]
    assert "snapshot" not in batch["events"][1]
    assert batch["valid_ref_counts"] == {"task": 1}


async def test_one_object_can_be_listened_to(site: Site) -> None:
    first, second = await task_of(site), await task_of(site)
    batch = await site.call("event.from", ADMIN, [f"task/{second}", "task/OpaqueRef:none"], "", 0.0)
    assert brief(batch) == [("task", "add", second)]
    await site.call("task.add_to_other_config", ADMIN, first, "k", "v")
    assert (await site.call("event.from", ADMIN, [f"task/{second}"], batch["token"], 0.0))["events"] == []
    await site.call("task.destroy", ADMIN, second)
    batch = await site.call("event.from", ADMIN, [f"TASK/{second}"], batch["token"], LONG)
    assert brief(batch) == [("task", "del", second)]
    assert batch["valid_ref_counts"] == {"task": 1}


async def test_nothing_to_tell_is_an_empty_answer_when_the_time_is_over(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    token = await current(site)
    start = trio.current_time()
    batch = await site.call("event.from", ADMIN, ["task"], token, 60.1)
    assert trio.current_time() - start == pytest.approx(60.1)
    assert (batch["events"], batch["token"]) == ([], token)
    batch = await site.call("event.from", ADMIN, ["VDI"], "", 10)
    assert batch["events"] == []
    await site.call("event.from", ADMIN, ["VM", "nothing"], "", 1e300)
    assert (await site.call("event.from", ADMIN, [], "", -5))["valid_ref_counts"] == {}


@pytest.mark.parametrize("token", ["x", "1", "1,2,3", "-1,2", "1;2", "0" * 21 + ",1", "\u0661,1"])
async def test_what_is_no_token_is_refused(site: Site, token: str) -> None:
    assert await refusal(site, "event.from", ADMIN, ["task"], token, 0.0) == [
        "EVENT_FROM_TOKEN_PARSE_FAILURE",
        token,
    ]


@pytest.mark.parametrize("word", ["", "/x", "task/"])
async def test_what_is_no_subscription_is_refused(site: Site, word: str) -> None:
    for method in ("event.register", "event.unregister"):
        if method == "event.register":
            assert (await refusal(site, method, ADMIN, [word]))[0] == "EVENT_SUBSCRIPTION_PARSE_FAILURE"
    assert await refusal(site, "event.from", ADMIN, [word], "", 0.0) == [
        "EVENT_SUBSCRIPTION_PARSE_FAILURE",
        word,
    ]


async def test_a_token_of_an_earlier_run_or_of_the_future_gets_everything(site: Site) -> None:
    task = await task_of(site)
    events = site.events
    for token in (
        f"{events.epoch - 1:020d},{events.counter:020d}",
        f"{events.epoch:020d},{events.counter + 1:020d}",
        "00000000000000000000,00000000000000000000",
    ):
        batch = await site.call("event.from", ADMIN, ["task"], token, LONG)
        assert brief(batch) == [("task", "add", task)]
    batch = await site.call("event.from", ADMIN, ["VDI"], token, LONG)
    assert (batch["events"], batch["valid_ref_counts"]) == ([], {"vdi": 0})


async def test_a_token_older_than_what_is_remembered_gets_everything(tmp_path: Path) -> None:
    async with open_site(tmp_path, events=Events(entries=4)) as site:
        token = await current(site)
        tasks = [await task_of(site) for _ in range(6)]
        batch = await site.call("event.from", ADMIN, ["task"], token, LONG)
        assert brief(batch) == [("task", "add", task) for task in tasks]
        again = await site.call("event.from", ADMIN, ["task"], batch["token"], 0.0)
        assert again["events"] == []


async def test_a_client_that_is_overrun_while_it_sleeps_gets_everything(tmp_path: Path) -> None:
    async with open_site(tmp_path, events=Events(entries=4)) as site:
        task = await task_of(site)
        token = await current(site)
        batches: list[dict[str, Any]] = []

        async def listen() -> None:
            batches.append(await site.call("event.from", ADMIN, ["task"], token, LONG))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await trio.testing.wait_all_tasks_blocked()
            for number in range(10):
                site.events.publish("VDI", "del", f"OpaqueRef:{number}")
        assert brief(batches[0]) == [("task", "add", task)]


async def test_an_injected_event_is_a_barrier(site: Site) -> None:
    pool = site.estate.records.pool.ref
    old = await current(site)
    await task_of(site)
    token = await site.call("event.inject", ADMIN, "Pool", pool)
    batch = await site.call("event.from", ADMIN, ["task", "pool"], old, LONG)
    assert [event["class"] for event in batch["events"]] == ["task", "pool"]
    assert batch["token"] >= token > old
    assert brief(await site.call("event.from", ADMIN, ["pool", "task"], token, LONG)) == [
        ("pool", "mod", pool)
    ]
    assert await refusal(site, "event.inject", ADMIN, "pool", "x") == ["HANDLE_INVALID", "pool", "x"]
    assert await refusal(site, "event.inject", ADMIN, "VM", "x") == ["HANDLE_INVALID", "VM", "x"]


async def test_a_change_of_the_pools_other_config_is_an_event(site: Site) -> None:
    pool = site.estate.records.pool.ref
    token = await current(site)
    await site.call("pool.add_to_other_config", ADMIN, pool, "xo:barrier", "")
    batch = await site.call("event.from", ADMIN, ["pool"], token, LONG)
    assert "xo:barrier" in batch["events"][0]["snapshot"]["other_config"]
    await site.call("pool.remove_from_other_config", ADMIN, pool, "xo:barrier")
    batch = await site.call("event.from", ADMIN, ["pool"], batch["token"], LONG)
    assert "xo:barrier" not in batch["events"][0]["snapshot"]["other_config"]


async def test_users_are_told_to_administrators_alone(site: Site) -> None:
    record = {"short_name": "anna", "password": "secret", "role": "vm-admin"}
    ref = await site.call("user.create", ADMIN, record)
    low = Role.POOL_OPERATOR.wire_name
    for words in (["*"], ["user"], [f"user/{ref}"]):
        batch = await site.call("event.from", low, words, "", 0.0)
        assert "user" not in {event["class"] for event in batch["events"]}
        assert "user" not in batch["valid_ref_counts"]
        batch = await site.call("event.from", ADMIN, words, "", 0.0)
        assert ("user", "add", ref) in brief(batch)
    assert (await refusal(site, "event.inject", low, "user", ref))[0] == "HANDLE_INVALID"


async def test_a_client_that_goes_away_or_a_gateway_that_stops_ends_the_wait(site: Site) -> None:
    ending = trio.Event()
    answers: list[Any] = []

    async def listen(method: str, *params: Any) -> None:
        caller = Caller("192.0.2.1", "https", ending.wait)
        answers.append(await site.api.call(method, [ADMIN, *params], caller))

    await site.call("event.register", ADMIN, ["task"])
    token = await current(site)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen, "event.from", ["task"], token, LONG)
        nursery.start_soon(listen, "event.next")
        await trio.testing.wait_all_tasks_blocked()
        assert answers == []
        ending.set()
    assert {"token": token, "events": [], "valid_ref_counts": {"task": 0}} in answers
    assert [] in answers


async def test_event_next_tells_what_was_registered_once(site: Site) -> None:
    assert (await refusal(site, "event.next", ADMIN))[0] == "SESSION_NOT_REGISTERED"
    await site.call("event.unregister", ADMIN, ["task"])
    await site.call("event.register", ADMIN, ["task", "VDI"])
    task = await task_of(site)
    (event,) = await site.call("event.next", ADMIN)
    assert (event["class"], event["operation"], event["ref"]) == ("task", "add", task)
    assert int(event["id"]) <= await site.call("event.get_current_id", ADMIN)
    await site.call("event.unregister", ADMIN, ["task"])
    await site.call("task.destroy", ADMIN, task)
    await site.call("event.register", ADMIN, ["pool"])
    pool = site.estate.records.pool.ref
    site.events.publish("pool", "mod", pool)
    (event,) = await site.call("event.next", ADMIN)
    assert event["ref"] == pool


async def test_what_one_client_listens_to_is_bounded(site: Site) -> None:
    tasks = [f"task/{number}" for number in range(MOST_WORDS)]
    await site.call("event.register", ADMIN, tasks)
    await site.call("event.register", ADMIN, tasks[:10])
    for refused in (
        ("event.register", ["VDI"]),
        ("event.from", ["VDI", *tasks], "", 0.0),
    ):
        assert (await refusal(site, refused[0], ADMIN, *refused[1:]))[:2] == [
            "VALUE_NOT_SUPPORTED",
            "classes",
        ]
    await site.call("event.unregister", ADMIN, tasks)
    await site.call("event.register", ADMIN, ["VDI"])
    long = await refusal(site, "event.register", ADMIN, ["task/" + "x" * 1000])
    assert long[0] == "EVENT_SUBSCRIPTION_PARSE_FAILURE"


async def test_event_next_says_when_events_are_lost(tmp_path: Path) -> None:
    async with open_site(tmp_path, events=Events(entries=2)) as site:
        await site.call("event.register", ADMIN, ["task"])
        for _ in range(4):
            await task_of(site)
        assert await refusal(site, "event.next", ADMIN) == ["EVENTS_LOST"]


async def test_operations_on_a_vdi_are_events_of_it_and_changes_of_vdis_events_of_the_sr(
    live: Site, tmp_path: Path
) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    token = await current(live)
    vdi = await live.call("VDI.create", ADMIN, {"SR": sr, "virtual_size": 1})
    batch = await live.call("event.from", ADMIN, ["vdi", "sr"], token, LONG)
    assert ("vdi", "add", vdi) in brief(batch)
    told = {event["ref"]: event.get("snapshot") for event in batch["events"]}
    assert told[sr]["VDIs"] == (vdi,)
    inventory = live.api._estate.inventory
    lease = await inventory.lease(vdi, LeaseMode.REPLACE, Holder("root", "import", vdi, "OpaqueRef:t"))
    batch = await live.call("event.from", ADMIN, ["vdi"], batch["token"], LONG)
    assert batch["events"][0]["snapshot"]["current_operations"] == {"OpaqueRef:t": "import"}
    lease.release()
    await lease.released()
    batch = await live.call("event.from", ADMIN, ["vdi"], batch["token"], LONG)
    assert batch["events"][0]["snapshot"]["current_operations"] == {}
    await live.call("VDI.destroy", ADMIN, vdi)
    batch = await live.call("event.from", ADMIN, ["vdi", "sr"], batch["token"], LONG)
    assert brief(batch).count(("vdi", "del", vdi)) == 1
    assert {event["ref"] for event in batch["events"]} == {vdi, sr}


async def test_operations_on_an_sr_are_events_of_it(site: Site) -> None:
    host = site.estate.records.this_host.ref
    sr = await add_sr(site)
    seen: list[dict[str, Any]] = []

    async def look() -> None:
        seen.append(await site.call("SR.get_current_operations", ADMIN, sr))

    site.inventory.before = look
    token = await current(site)
    await site.call("SR.scan", ADMIN, sr)
    task = await site.call("Async.SR.scan", ADMIN, sr)
    batch = await site.call("event.from", ADMIN, ["sr"], token, LONG)
    while not site.estate.tasks.get(task).status.is_final:
        await site.events.wait_past(site.events.counter)
    assert host
    assert brief(batch) == [("sr", "mod", sr)]
    assert [list(operations.values()) for operations in seen] == [["scan"], ["scan"]]
    assert next(iter(seen[0])).startswith("DummyRef:|")
    assert next(iter(seen[1])) == task
    assert await site.call("SR.get_current_operations", ADMIN, sr) == {}


async def add_sr(site: Site) -> str:
    from gateway.core.records import SR
    from gateway.core.refs import new_ref, new_uuid

    return (await site.estate.records.srs.add(SR(ref=new_ref(), uuid=new_uuid()))).ref


async def test_progress_of_a_task_is_an_event_at_most_once_a_second(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    task = await task_of(site)
    batch = await site.call("event.from", ADMIN, ["task"], "", 0.0)
    steps = 0
    start = trio.current_time()

    async def advance() -> None:
        for number in range(1, 51):
            await trio.sleep(0.1)
            await site.call("task.set_progress", ADMIN, task, number / 100)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(site.estate.tasks.run)
        nursery.start_soon(advance)
        while batch["events"][0]["snapshot"]["progress"] < 0.4:
            batch = await site.call("event.from", ADMIN, ["task"], batch["token"], LONG)
            steps += 1
        nursery.cancel_scope.cancel()
    assert steps <= math.ceil(trio.current_time() - start)


async def test_counts_are_32_bit_integers_in_xml_and_a_batch_is_carried_by_both_codecs(site: Site) -> None:
    await task_of(site)
    batch = await site.call("event.from", ADMIN, ["task"], "", 0.0)
    assert "<name>task</name><value><i4>1</i4></value>" in dump_value(batch)
    body = f'{{"method":"event.from","params":["{ADMIN}",["task"],"",1],"id":1}}'.encode()
    assert b'"valid_ref_counts":{"task":1}' in await read_jsonrpc(body)(site.api, CALLER)


async def test_who_is_logged_out_meanwhile_is_told_nothing(site: Site) -> None:
    session = cast("Any", object())

    class Ended:
        async def authorize(self, *_: Any) -> Any:
            from gateway.core.sessions import Identity

            return Identity("root", Role.POOL_ADMIN, session)

        def in_use(self, used: Any) -> Any:
            assert used is session
            return trio.CancelScope()

        def get(self, ref: str) -> Any:
            raise XenAPIError("SESSION_INVALID", ref)

    api = Api(replace(site.estate, sessions=cast("Any", Ended())), cast("Any", None), CLASSES)
    token = await current(site)
    await task_of(site)
    with pytest.raises(XenAPIError) as refused:
        await api.call("event.from", ["x", ["task"], token, 1.0], CALLER)
    assert refused.value.code == "SESSION_INVALID"
