from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.errors import XenAPIError
from gateway.xenapi import implicit
from gateway.xenapi.query import database_text, parse_query

from .estate_for_tests import ADMIN, Site

OBJECT = {"name_label": "a", "uuid": "u", "shared": "true", "size": "3", "SR": "OpaqueRef:1"}


def matches(query: str) -> bool:
    return parse_query(query, OBJECT)(OBJECT.__getitem__)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("true", True),
        ("false", False),
        ("not true", False),
        ("not not true", True),
        ('field "name__label" = "a"', True),
        ('field "name_label" = "a"', True),
        ("field 'name__label'='a'", True),
        ('field "name__label"="b"', False),
        ('"a" = field "name__label"', True),
        ('field "shared" = "true" and field "size" = "3"', True),
        ('field "uuid" = "x" or field "uuid" = "u"', True),
        ("true or false and false", True),
        ("(true or false) and false", False),
        ("not false and false", False),
        ("not (false and false)", True),
        ('field "SR" = "OpaqueRef:1"', True),
        ('field "name__label" = "\\"a"', False),
        ('  (  field "uuid" = "u"  )  ', True),
    ],
)
def test_a_query_is_answered_as_xapi_does(query: str, expected: bool) -> None:
    assert matches(query) is expected


@pytest.mark.parametrize(
    "query",
    [
        *[
            "",
            "(",
            "true)",
            "true true",
            "not",
            "field",
            'field "name"',
            'field "uuid" =',
            '"a"',
            "= =",
            "and",
        ],
        *['field "unknown" = "x"', 'field "uuid" = "u', "true & false", "yes", "True", "(" * 5000 + "true"],
        *["not " * 3000 + "true", "true or " * 4000, 'field "uuid" = u'],
    ],
)
def test_what_is_no_query_is_refused_with_a_reason(query: str) -> None:
    with pytest.raises(XenAPIError) as refused:
        matches(query)
    assert refused.value.error_info[:2] == ["VALUE_NOT_SUPPORTED", "expr"]
    assert refused.value.error_info[3]


@given(
    st.lists(st.sampled_from(["true", "not", "and", "or", "(", ")", "=", "field", '"uuid"', "'", '"', "\\"]))
    .map(" ".join)
    .filter(lambda query: len(query) < 400)
    | st.text(max_size=40)
)
@example("\\")
def test_any_query_is_answered_or_refused(query: str) -> None:
    try:
        assert matches(query) in (True, False)
    except XenAPIError as error:
        assert error.code == "VALUE_NOT_SUPPORTED"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (True, "true"),
        (12, "12"),
        (0.5, "0.5"),
        ((), "()"),
        (("a", "b"), "('a' 'b')"),
        ({"k": "v"}, "(('k' 'v'))"),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "20260102T03:04:05Z"),
        (None, ""),
    ],
)
def test_values_are_compared_by_the_text_of_xapis_database(value: Any, text: str) -> None:
    assert database_text(value) == text


async def test_records_are_found_by_a_query(site: Site) -> None:
    first = await site.call("task.create", ADMIN, "first", "")
    await site.call("task.create", ADMIN, "second", "")
    found = await site.call("task.get_all_records_where", ADMIN, 'field "name__label" = "first"')
    assert found == {first: await site.call("task.get_record", ADMIN, first)}
    assert len(await site.call("task.get_all_records_where", ADMIN, "true")) == 2
    assert await site.call("VBD.get_all_records_where", ADMIN, 'field "VM" = "x"') == {}


async def test_a_query_of_hundreds_of_conditions_writes_a_field_once_for_each_object(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def counted(value: Any) -> str:
        written.append(value)
        return database_text(value)

    monkeypatch.setattr(implicit, "database_text", counted)
    tasks = [await site.call("task.create", ADMIN, "a", "") for _ in range(3)]
    query = " or ".join(['field "other_config" = "x"'] * 500)
    assert await site.call("task.get_all_records_where", ADMIN, query) == {}
    assert len(written) == len(tasks)


@pytest.mark.parametrize("method", ["get_all_records", "get_all_records_where", "event.from"])
async def test_others_have_their_turn_between_two_objects(
    site: Site, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(implicit, "_TURN_SECONDS", 0)
    for _ in range(50):
        await site.call("task.create", ADMIN, "a", "")
    turns = 0  # it may be one or two less than there are objects: trio runs tasks in any order
    async with trio.open_nursery() as nursery:

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(others)
        if method == "event.from":
            await site.call(method, ADMIN, ["task"], "", 0.0)
        else:
            await site.call(f"task.{method}", ADMIN, *(["true"] if method.endswith("where") else []))
        nursery.cancel_scope.cancel()
    assert turns >= 40
