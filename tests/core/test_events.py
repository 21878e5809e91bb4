import trio
import trio.testing

from gateway.core.events import Events


async def test_a_waiter_wakes_when_something_changes_after_its_counter() -> None:
    events = Events()
    seen: list[int] = []

    async def wait() -> None:
        seen.append(await events.wait_past(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        events.publish("VDI", "add", "a")
    assert seen == [1]
    assert await events.wait_past(0) == 1


def test_only_the_newest_change_of_each_object_is_told() -> None:
    events = Events()
    events.publish("VDI", "add", "a")
    events.publish("task", "add", "a")
    events.publish("VDI", "mod", "a")
    changes = events.since(0)
    assert changes is not None
    assert [(change.class_name, change.operation) for change in changes] == [("task", "add"), ("VDI", "add")]
    later = events.since(2)
    assert later is not None
    assert [(change.counter, change.operation) for change in later] == [(3, "mod")]
    events.publish("VDI", "del", "a")
    gone = events.since(0)
    assert gone is not None
    assert gone[-1].operation == "del"


def test_who_missed_a_forgotten_change_is_told_so() -> None:
    events = Events(entries=2)
    for ref in ("a", "b", "c"):
        events.publish("VDI", "add", ref)
    assert events.since(0) is None
    changes = events.since(1)
    assert changes is not None
    assert [change.ref for change in changes] == ["b", "c"]


def test_an_event_knows_its_moment_and_a_run_of_the_gateway_its_epoch() -> None:
    events = Events()
    events.publish("VDI", "add", "a")
    told = events.since(0)
    assert told is not None
    assert told[0].moment >= events.epoch / 1e6 - 1
