"""Fields of records: they are set and searched, maps and sets gain and lose members, also several at once."""

import trio

from .estate_for_tests import ADMIN, Site, refusal


async def test_fields_are_set_and_searched(site: Site) -> None:
    host = site.estate.records.this_host.ref
    counter = site.events.counter
    await site.call("host.set_name_label", ADMIN, host, "one")
    assert site.events.counter > counter
    assert await site.call("host.get_by_name_label", ADMIN, "one") == [host]
    assert await site.call("host.get_by_name_label", ADMIN, "two") == []
    uuid = await site.call("host.get_uuid", ADMIN, host)
    assert await site.call("host.get_by_uuid", ADMIN, uuid) == host
    assert (await refusal(site, "host.get_by_uuid", ADMIN, "x"))[0] == "UUID_INVALID"
    assert (await refusal(site, "host.set_name_label", ADMIN, host, 3)) == ["FIELD_TYPE_ERROR", "value"]
    assert (await refusal(site, "host.set_name_label", ADMIN, "x", "y"))[0] == "HANDLE_INVALID"


async def test_a_map_gains_and_loses_keys(site: Site) -> None:
    pool = site.estate.records.pool.ref
    await site.call("pool.add_to_other_config", ADMIN, pool, "k", "v")
    duplicate = ("pool.add_to_other_config", ADMIN, pool, "k", "w")
    assert await refusal(site, *duplicate) == ["MAP_DUPLICATE_KEY", "pool", "other_config", pool, "k"]
    await site.call("pool.remove_from_other_config", ADMIN, pool, "k")
    counter = site.events.counter
    await site.call("pool.remove_from_other_config", ADMIN, pool, "k")
    assert site.events.counter == counter
    await site.call("pool.set_other_config", ADMIN, pool, {"a": "b"})
    assert await site.call("pool.get_other_config", ADMIN, pool) == {"a": "b"}


async def test_keys_that_are_added_at_once_are_all_there(site: Site) -> None:
    pool = site.estate.records.pool.ref
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(site.call, "pool.add_to_other_config", ADMIN, pool, str(number), "")
    assert len(site.estate.records.pool.other_config) == 20


async def test_a_set_gains_and_loses_elements(site: Site) -> None:
    pool = site.estate.records.pool.ref
    for tag in ("a", "b", "a"):
        await site.call("pool.add_tags", ADMIN, pool, tag)
    assert await site.call("pool.get_tags", ADMIN, pool) == ("a", "b")
    for tag in ("a", "c"):
        await site.call("pool.remove_tags", ADMIN, pool, tag)
    assert await site.call("pool.get_tags", ADMIN, pool) == ("b",)
