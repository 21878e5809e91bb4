from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import XenAPIError
from gateway.xenapi.types import (
    BOOL,
    DATETIME,
    FLOAT,
    INT,
    SECRET,
    STRING,
    STRING_MAP,
    STRINGS,
    VOID,
    Choice,
    Item,
    Record,
    Records,
    Reference,
    WireType,
    is_large,
    moment_text,
    parse_moment,
)

COLOUR = Choice("colour", ("red", "green"))
ALL_TYPES: list[WireType] = [
    STRING,
    SECRET,
    INT,
    FLOAT,
    BOOL,
    DATETIME,
    VOID,
    STRINGS,
    STRING_MAP,
    COLOUR,
    Reference("VDI"),
    Records("VDI"),
    Record("VDI", {"virtual_size": Item(INT)}),
]


@pytest.mark.parametrize(
    ("wire_type", "value", "accepted"),
    [
        (STRING, "a", "a"),
        (SECRET, "\x00", "\x00"),
        (INT, "9223372036854775807", 2**63 - 1),
        (INT, "-9223372036854775808", -(2**63)),
        (INT, 7, 7),
        (FLOAT, 1, 1.0),
        (FLOAT, 0.5, 0.5),
        (FLOAT, "1", 1.0),
        (FLOAT, "2.5e-1", 0.25),
        (BOOL, True, True),
        (DATETIME, "20261231T23:59:58Z", datetime(2026, 12, 31, 23, 59, 58, tzinfo=UTC)),
        (DATETIME, "2026-12-31T23:59:58.123Z", datetime(2026, 12, 31, 23, 59, 58, tzinfo=UTC)),
        (STRINGS, ["a", "b", "a"], ("a", "b")),
        (STRING_MAP, {"k": "v"}, {"k": "v"}),
        (COLOUR, "red", "red"),
    ],
)
def test_a_value_of_its_type_is_accepted(wire_type: WireType, value: Any, accepted: Any) -> None:
    result = wire_type.accept(value, "f")
    assert result == accepted
    assert type(result) is type(accepted)


@pytest.mark.parametrize(
    ("wire_type", "value"),
    [
        (STRING, 1),
        (STRING, None),
        (STRING, "\x00"),
        (STRING, "\ud800"),
        (INT, True),
        (INT, "1.0"),
        (INT, "1_0"),
        (INT, "9223372036854775808"),
        (INT, "٣"),
        (INT, 1.0),
        (FLOAT, True),
        (FLOAT, float("nan")),
        (FLOAT, float("inf")),
        (FLOAT, 10**400),
        (FLOAT, "1e400"),
        (FLOAT, "nan"),
        (FLOAT, "1_0"),
        (FLOAT, ""),
        (BOOL, 1),
        (BOOL, "true"),
        (DATETIME, "20261331T00:00:00Z"),
        (DATETIME, "yesterday"),
        (STRINGS, "abc"),
        (STRINGS, [1]),
        (STRING_MAP, []),
        (STRING_MAP, {"k": 1}),
        (COLOUR, "blue"),
        (VOID, ""),
    ],
)
def test_a_value_of_another_type_is_refused_by_the_name_of_the_field(wire_type: WireType, value: Any) -> None:
    with pytest.raises(XenAPIError) as refused:
        wire_type.accept(value, "the_field")
    assert refused.value.code in ("FIELD_TYPE_ERROR", "VALUE_NOT_SUPPORTED")
    assert refused.value.params[0].startswith("the_field")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(value=JSON)
def test_any_value_is_accepted_or_refused_with_a_xenapi_error(value: Any) -> None:
    for wire_type in ALL_TYPES:
        try:
            wire_type.accept(value, "f")
        except XenAPIError as error:
            assert error.code in ("FIELD_TYPE_ERROR", "VALUE_NOT_SUPPORTED")


def test_a_record_skips_members_that_are_not_the_callers_to_choose() -> None:
    record = Record("VDI", {"virtual_size": Item(INT), "name_label": Item(STRING, "")})
    assert record.accept({"virtual_size": "512", "uuid": 3.5, "VBDs": None}, "args") == {
        "virtual_size": 512,
        "name_label": "",
    }


def test_a_record_without_a_member_that_must_be_there_is_refused() -> None:
    with pytest.raises(XenAPIError) as refused:
        Record("VDI", {"virtual_size": Item(INT)}).accept({}, "args")
    assert refused.value.error_info == ["FIELD_TYPE_ERROR", "virtual_size"]


def test_default_values_are_never_shared_between_records() -> None:
    record = Record("VDI", {"other_config": Item(STRING_MAP, {})})
    record.accept({}, "args")["other_config"]["left"] = "behind"
    assert record.accept({}, "args") == {"other_config": {}}


@given(moment=st.datetimes())
def test_dates_survive_their_text_to_the_second(moment: datetime) -> None:
    moment = moment.replace(microsecond=0, tzinfo=UTC)
    assert parse_moment(moment_text(moment)) == moment


def test_an_enumeration_is_read_in_any_case_and_kept_in_its_own() -> None:
    assert COLOUR.accept("Red", "f") == "red"
    assert Choice("mode", ("RO", "RW")).accept("ro", "f") == "RO"


@pytest.mark.parametrize(
    ("value", "large"),
    [
        ("x" * 1000, False),
        ("x" * 4_000_000, True),
        ({f"key {number}": "value" for number in range(4000)}, False),
        ({f"key {number}": "value" for number in range(6000)}, True),
        ({"ref": {"other_config": {f"key {number}": "value" for number in range(6000)}}}, True),
        ([{"snapshot": {"name_description": "x" * 4_000_000}}], True),
        ([{"members": ("a",) * 50} for _ in range(200)], True),
        ([{"members": ("a",) * 50} for _ in range(50)], False),
        (3, False),
    ],
)
def test_what_takes_long_to_write_is_known_before(value: Any, large: bool) -> None:
    assert is_large(value) == large
