import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.errors import XenAPIError
from gateway.xenapi.jsonrpc import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE_ERROR,
    MalformedRequestError,
    dump_success,
    parse_request,
    read_jsonrpc,
)

from .stub_api import CALLER, stub

V1 = {"method": "VDI.get_record", "params": ["OpaqueRef:s", "OpaqueRef:v"], "id": 1}
V2 = {"jsonrpc": "2.0", **V1}


async def answer(api_answer: Any, body: Any) -> Any:
    _, api = stub(api_answer)
    return json.loads(await read_jsonrpc(json.dumps(body).encode())(api, CALLER))


async def test_version_2_is_answered_in_version_2() -> None:
    assert await answer("fine", V2) == {"jsonrpc": "2.0", "result": "fine", "id": 1}


async def test_version_1_is_answered_in_version_1() -> None:
    assert await answer("fine", V1) == {"result": "fine", "error": None, "id": 1}


async def test_a_failure_in_version_2_has_code_message_and_data() -> None:
    assert await answer(XenAPIError("HANDLE_INVALID", "VDI", "x"), V2) == {
        "jsonrpc": "2.0",
        "error": {"code": 1, "message": "HANDLE_INVALID", "data": ["VDI", "x"]},
        "id": 1,
    }


async def test_a_failure_in_version_1_is_an_array() -> None:
    error = XenAPIError("HANDLE_INVALID", "VDI", "x")
    assert await answer(error, V1) == {"result": None, "error": ["HANDLE_INVALID", "VDI", "x"], "id": 1}


async def test_the_answer_carries_the_id_as_it_came() -> None:
    for call_id in ("a", "", 0, -1, 1.5):
        assert (await answer("", {**V2, "id": call_id}))["id"] == call_id


async def test_integers_are_numbers_and_dates_are_xenapis_text() -> None:
    value = {"size": 2**40, "at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "tags": ("a",), "void": None}
    assert (await answer(value, V2))["result"] == {
        "size": 2**40,
        "at": "20260102T03:04:05Z",
        "tags": ["a"],
        "void": "",
    }


async def test_the_params_arrive_as_they_were_sent() -> None:
    api, as_api = stub("")
    await read_jsonrpc(json.dumps(V2).encode())(as_api, CALLER)
    assert api.calls == [("VDI.get_record", ["OpaqueRef:s", "OpaqueRef:v"])]


async def test_missing_params_are_none() -> None:
    api, as_api = stub("")
    await read_jsonrpc(b'{"jsonrpc": "2.0", "method": "system.listMethods", "id": 1}')(as_api, CALLER)
    assert api.calls == [("system.listMethods", [])]


@pytest.mark.parametrize(
    ("body", "code", "why"),
    [
        (b"", PARSE_ERROR, "not JSON"),
        (b"\xff", PARSE_ERROR, "not JSON"),
        (b'{"method": "\xff", "id": 1}', PARSE_ERROR, "not"),
        (b"[" * 100_000, PARSE_ERROR, "nests too deeply"),
        (b"[" + b"[]," * 50_000 + b"1]", PARSE_ERROR, "brackets and commas"),
        (b"[]", INVALID_REQUEST, "batches"),
        (json.dumps([V2, V2]).encode(), INVALID_REQUEST, "batches"),
        (b"3", INVALID_REQUEST, "not an object"),
        (json.dumps({**V2, "id": None}).encode(), INVALID_REQUEST, "id must be"),
        (json.dumps({**V2, "id": True}).encode(), INVALID_REQUEST, "id must be"),
        (json.dumps({**V2, "id": {}}).encode(), INVALID_REQUEST, "id must be"),
        (b'{"method": "m", "params": []}', INVALID_REQUEST, "id must be"),
        (json.dumps({**V2, "jsonrpc": "3.0"}).encode(), INVALID_REQUEST, "jsonrpc must be"),
        (json.dumps({**V2, "method": 3}).encode(), INVALID_REQUEST, "method must be"),
        (json.dumps({**V2, "params": {}}).encode(), INVALID_PARAMS, "params must be"),
    ],
)
async def test_what_is_no_call_gets_a_reserved_code_and_the_reason(body: bytes, code: int, why: str) -> None:
    _, api = stub("fine")
    error = json.loads(await read_jsonrpc(body)(api, CALLER))["error"]
    assert error["code"] == code
    assert why in error["message"]


async def test_large_bodies_and_answers_are_the_same_as_small_ones() -> None:
    value = {f"key {number}": "value" for number in range(2000)}
    assert (await answer(value, {**V2, "params": ["x" * 100_000]}))["result"] == value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(params=st.lists(JSON, max_size=4), call_id=st.integers(-(2**53), 2**53) | st.text())
def test_what_pythons_json_writes_is_read(params: list[Any], call_id: int | str) -> None:
    for ascii_only in (True, False):
        text = json.dumps({**V2, "params": params, "id": call_id}, ensure_ascii=ascii_only)
        request = parse_request(text.encode())
        assert (request.params, request.call_id) == (params, call_id)


@given(value=JSON)
def test_pythons_json_reads_what_is_written(value: Any) -> None:
    answered = json.loads(dump_success(parse_request(json.dumps(V2).encode()), value))["result"]
    assert answered == _without_none(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items()}
    return "" if value is None else value


async def _one_known_answer(body: bytes) -> None:
    _, api = stub("fine")
    answered = json.loads(await read_jsonrpc(body)(api, CALLER))
    if answered.get("error") is None:
        assert answered["result"] == "fine"
    else:
        assert answered["error"]["code"] in (PARSE_ERROR, INVALID_REQUEST, INVALID_PARAMS)


@given(body=st.binary(max_size=200))
@example(body=b'{"jsonrpc": "2.0", "method": "\\ud800", "id": "\\ud800"}')
@example(body=b'{"method": "m", "id": 1e999}')
@example(body=b'{"method": "m", "id": ' + b"9" * 5000 + b"}")
@example(body=b'{"method": "m", "id": -0.0, "params": [' + b"9" * 5000 + b"]}")
async def test_any_bytes_get_one_known_answer(body: bytes) -> None:
    await _one_known_answer(body)


VALID = json.dumps({**V2, "params": ["é", {"size": 3.5, "tags": ["a\n"]}, True, None]}).encode()


@given(data=st.data())
async def test_any_change_of_a_valid_call_gets_one_known_answer(data: st.DataObject) -> None:
    body = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        length = data.draw(st.integers(0, 20))
        body[start : start + length] = data.draw(
            st.binary(max_size=6)
            | st.sampled_from([b"{", b"}", b"[", b"null", b'"', b"\\ud800", b"1e400", b","])
        )
    await _one_known_answer(bytes(body))


@given(body=st.binary(max_size=40))
def test_a_refusal_never_needs_more_than_its_own_kind_of_error(body: bytes) -> None:
    try:
        parse_request(body)
    except MalformedRequestError as error:
        assert error.version in (1, 2)
