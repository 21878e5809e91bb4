import xmlrpc.client
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.errors import XenAPIError
from gateway.xenapi.types import NOT_IN_XML
from gateway.xenapi.xmlrpc import (
    MAX_DEPTH,
    MAX_ELEMENTS,
    PARSE_ERROR,
    MalformedRequestError,
    dump_failure,
    dump_fault,
    dump_success,
    dump_value,
    parse_call,
    read_xmlrpc,
)

from .stub_api import CALLER, stub


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", "<value/>"),
        (None, "<value/>"),
        ("a", "<value>a</value>"),
        (' a"b<c>&\t\n', "<value> a&quot;b&lt;c&gt;&amp;\t\n</value>"),
        ("\r\n", "<value>&#13;\n</value>"),
        ("\x00\ud800\uffff", "<value>\ufffd\ufffd\ufffd</value>"),
        ("é\U0001f600", "<value>é\U0001f600</value>"),
        (2**40, "<value>1099511627776</value>"),
        (-1, "<value>-1</value>"),
        (True, "<value><boolean>1</boolean></value>"),
        (False, "<value><boolean>0</boolean></value>"),
        (0.5, "<value><double>0.5</double></value>"),
        (1.0, "<value><double>1</double></value>"),
        (
            datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            "<value><dateTime.iso8601>20260102T03:04:05Z</dateTime.iso8601></value>",
        ),
        ([], "<value><array><data></data></array></value>"),
        (("a", 1), "<value><array><data><value>a</value><value>1</value></data></array></value>"),
        ({}, "<value><struct></struct></value>"),
        (
            {"a<": "", "b": {}},
            (
                "<value><struct><member><name>a&lt;</name><value/></member>"
                "<member><name>b</name><value><struct></struct></value></member></struct></value>"
            ),
        ),
    ],
)
def test_values_are_written_as_xapi_writes_them(value: Any, text: str) -> None:
    assert dump_value(value) == text


@pytest.mark.parametrize("end", ["", "&", '<>"\r', "\x00\x7f\t\n", "é", "\ud800\uffff", "\U0001f600&"])
@pytest.mark.parametrize("begin", ["", "é"])
def test_long_text_is_written_as_short_text_is(begin: str, end: str) -> None:
    filling = "ab+/=" * 20_000
    short, long = f"{begin}@{end}", f"{begin}{filling}{end}"
    assert dump_value(long) == dump_value(short).replace("@", filling)
    assert dump_value({"bits": long}) == dump_value({"bits": short}).replace("@", filling)
    assert dump_value([long, short]) == dump_value([short, short]).replace("@", filling, 1)


def test_a_success_is_written_as_xapi_writes_it() -> None:
    assert dump_success("OpaqueRef:1") == (
        b'<?xml version="1.0"?><methodResponse><params><param><value><struct>'
        b"<member><name>Status</name><value>Success</value></member>"
        b"<member><name>Value</name><value>OpaqueRef:1</value></member>"
        b"</struct></value></param></params></methodResponse>"
    )


def test_a_failure_is_written_as_xapi_writes_it() -> None:
    assert dump_failure(["HANDLE_INVALID", "VDI", ""]) == (
        b'<?xml version="1.0"?><methodResponse><params><param><value><struct>'
        b"<member><name>Status</name><value>Failure</value></member>"
        b"<member><name>ErrorDescription</name><value><array><data>"
        b"<value>HANDLE_INVALID</value><value>VDI</value><value/></data></array></value></member>"
        b"</struct></value></param></params></methodResponse>"
    )


def test_a_fault_is_one_that_clients_raise() -> None:
    with pytest.raises(xmlrpc.client.Fault) as raised:
        xmlrpc.client.loads(dump_fault(-32700, "why"))
    assert (raised.value.faultCode, raised.value.faultString) == (-32700, "why")


VALUES = st.recursive(
    st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.datetimes(min_value=datetime(1000, 1, 1)).map(lambda at: at.replace(microsecond=0)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _as_pythons_client_reads_it(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.16g}")
    if isinstance(value, str):
        return NOT_IN_XML.sub("\ufffd", value)
    if isinstance(value, list):
        return [_as_pythons_client_reads_it(item) for item in value]
    if isinstance(value, dict):
        return {
            _as_pythons_client_reads_it(name): _as_pythons_client_reads_it(item)
            for name, item in value.items()
        }
    return value


@given(value=VALUES)
def test_pythons_client_reads_what_is_written(value: Any) -> None:
    (answer,), _ = xmlrpc.client.loads(dump_success(value), use_builtin_types=False)
    assert isinstance(answer, dict)
    assert set(answer) == {"Status", "Value"}
    read = _with_dates(answer["Value"])
    assert read == _as_pythons_client_reads_it(value)


def _with_dates(value: Any) -> Any:
    if isinstance(value, xmlrpc.client.DateTime):
        return datetime.strptime(value.value, "%Y%m%dT%H:%M:%SZ")
    if isinstance(value, list):
        return [_with_dates(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_dates(item) for name, item in value.items()}
    return value


CLIENT_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**31), 2**31 - 1)
    | st.text().filter(lambda text: not NOT_IN_XML.search(text) and "\r" not in text)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet="abc<&>"), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(params=st.lists(CLIENT_VALUES, max_size=4))
@example(params=[" ", "", "\n"])
def test_what_pythons_client_sends_is_read(params: list[Any]) -> None:
    body = xmlrpc.client.dumps(tuple(params), "VDI.create", allow_none=True).encode()
    assert parse_call(body) == ("VDI.create", params)


def _call(params: str) -> bytes:
    return f"<methodCall><methodName>m</methodName>{params}</methodCall>".encode()


def _value(value: str) -> bytes:
    return _call(f"<params><param>{value}</param></params>")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("<value>bare</value>", "bare"),
        ("<value/>", ""),
        ("<value> </value>", " "),
        ("<value><string/></value>", ""),
        ("<value>\n  <i8>9223372036854775807</i8>\n</value>", 2**63 - 1),
        ("<value><i4>-3</i4></value>", -3),
        ("<value><boolean>1</boolean></value>", True),
        ("<value><double>1e3</double></value>", 1000.0),
        ("<value><nil/></value>", None),
        (
            "<value><dateTime.iso8601>20260102T03:04:05Z</dateTime.iso8601></value>",
            datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        ),
        ("<value><array><data/></array></value>", []),
        ("<value><struct/></value>", {}),
        ("<value>a<!-- b --><![CDATA[<c>]]>&#100;</value>", "a<c>d"),
    ],
)
def test_every_form_of_a_value_is_read(value: str, read: Any) -> None:
    assert parse_call(_value(value)) == ("m", [read])


def test_a_call_without_params_is_read() -> None:
    assert parse_call(_call("")) == ("m", [])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not well-formed"),
        (b"\xff", "not well-formed"),
        (b"<methodCall>", "not well-formed"),
        (b"<methodResponse/>", "must not stand"),
        (b"<methodCall/>", "not one methodName"),
        (_call("<params/><params/>"), "not one methodName"),
        (_call("text"), "holds text"),
        (_call("<params><param/></params>"), "exactly one value"),
        (_value("<value>a<int>1</int></value>"), "both text and a typed value"),
        (_value("<value><int>1</int><int>1</int></value>"), "exactly one value"),
        (_value("<value><int>0x1</int></value>"), "integer"),
        (_value("<value><int/></value>"), "integer"),
        (_value(f"<value><int>{'9' * 21}</int></value>"), "integer"),
        (_value("<value><boolean>yes</boolean></value>"), "boolean"),
        (_value("<value><double>nan</double></value>"), "double"),
        (_value("<value><dateTime.iso8601>now</dateTime.iso8601></value>"), "dateTime"),
        (_value("<value><nil>x</nil></value>"), "nil"),
        (_value("<value><base64>AAAA</base64></value>"), "must not stand"),
        (_value("<value><array/></value>"), "exactly one value"),
        (_value("<value><struct><member><name>a</name></member></struct></value>"), "member"),
        (_value("<value><struct><member><value/><name>a</name></member></struct></value>"), "member"),
        (
            _value("<value><struct>" + 2 * "<member><name>a</name><value/></member>" + "</struct></value>"),
            "same name",
        ),
        (_value("<value>&unknown;</value>"), "not well-formed"),
    ],
)
def test_what_is_no_call_is_refused_with_the_reason(body: bytes, why: str) -> None:
    with pytest.raises(MalformedRequestError, match=why):
        parse_call(body)


BOMB = b"""<?xml version="1.0"?><!DOCTYPE bomb [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;">]>
<methodCall><methodName>&b;</methodName></methodCall>"""
FILE = b"""<?xml version="1.0"?><!DOCTYPE f [<!ENTITY f SYSTEM "file:///etc/passwd">]>
<methodCall><methodName>&f;</methodName></methodCall>"""


@pytest.mark.parametrize("body", [BOMB, FILE, b"<!DOCTYPE methodCall><methodCall/>"])
def test_document_type_declarations_are_refused_before_they_are_looked_at(body: bytes) -> None:
    with pytest.raises(MalformedRequestError, match="document type declaration"):
        parse_call(body)


def test_another_encoding_that_the_document_claims_is_not_looked_up() -> None:
    body = b'<?xml version="1.0" encoding="zlib"?>' + _call("")
    assert parse_call(body) == ("m", [])


def test_nesting_is_capped() -> None:
    opening, closing = "<value><array><data>", "</data></array></value>"
    fits = (MAX_DEPTH - 4) // 3
    assert parse_call(_value(opening * fits + "<value/>" + closing * fits))
    with pytest.raises(MalformedRequestError, match="nests"):
        parse_call(_value(opening * 100_000))


def test_the_number_of_elements_is_capped() -> None:
    with pytest.raises(MalformedRequestError, match="more than"):
        parse_call(_value("<value><array><data>" + "<value/>" * MAX_ELEMENTS))


@pytest.mark.parametrize(
    "beginning",
    [
        b"<methodCall " + b" ".join(b"a%d='1'" % number for number in range(30_000)) + b">",
        b"<methodCall><!--" + b"a" * 200_000,
        b"<" + b"a" * 200_000,
    ],
)
def test_a_tag_without_an_end_is_refused_long_before_the_end_of_the_body(beginning: bytes) -> None:
    with pytest.raises(MalformedRequestError, match="tag or comment of more than"):
        parse_call(beginning)


def test_long_text_is_no_long_tag() -> None:
    text = "é<&" * 100_000
    body = xmlrpc.client.dumps((text,), "m").encode()
    assert parse_call(body) == ("m", [text])
    cdata = b"<methodCall><methodName><![CDATA[" + b"a" * 200_000 + b"]]></methodName></methodCall>"
    assert parse_call(cdata) == ("a" * 200_000, [])


async def test_a_call_is_answered_with_its_value() -> None:
    api, as_api = stub({"size": 2**40})
    body = xmlrpc.client.dumps(("OpaqueRef:session",), "VDI.get_record").encode()
    assert await read_xmlrpc(body)(as_api, CALLER) == dump_success({"size": 2**40})
    assert api.calls == [("VDI.get_record", ["OpaqueRef:session"])]


async def test_a_failed_call_is_answered_with_its_error() -> None:
    _, api = stub(XenAPIError("HANDLE_INVALID", "VDI", "x"))
    assert await read_xmlrpc(_call(""))(api, CALLER) == dump_failure(["HANDLE_INVALID", "VDI", "x"])


async def test_the_list_of_methods_is_a_bare_array_as_introspection_has_it() -> None:
    _, api = stub(["VDI.create"])
    body = xmlrpc.client.dumps((), "system.listMethods").encode()
    (methods,), _ = xmlrpc.client.loads(await read_xmlrpc(body)(api, CALLER))
    assert methods == ["VDI.create"]


async def test_large_bodies_and_answers_are_the_same_as_small_ones() -> None:
    value = {f"key {number}": "value" for number in range(2000)}
    api, as_api = stub(value)
    body = xmlrpc.client.dumps(("x" * 100_000,), "m").encode()
    assert await read_xmlrpc(body)(as_api, CALLER) == dump_success(value)
    assert api.calls == [("m", ["x" * 100_000])]


async def _one_known_answer(body: bytes) -> None:
    _, api = stub("fine")
    answer = await read_xmlrpc(body)(api, CALLER)
    try:
        (result,), _ = xmlrpc.client.loads(answer)
    except xmlrpc.client.Fault as fault:
        assert fault.faultCode == PARSE_ERROR
    else:
        assert result in ({"Status": "Success", "Value": "fine"}, "fine")


@given(body=st.binary(max_size=300))
@example(body=BOMB)
async def test_any_bytes_get_one_known_answer(body: bytes) -> None:
    await _one_known_answer(body)


VALID = xmlrpc.client.dumps(
    ("OpaqueRef:1", {"name_label": "é", "size": 3, "tags": ["a"], "shared": True}), "VDI.create"
).encode()


@given(data=st.data())
async def test_any_change_of_a_valid_call_gets_one_known_answer(data: st.DataObject) -> None:
    body = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        length = data.draw(st.integers(0, 20))
        body[start : start + length] = data.draw(
            st.binary(max_size=6)
            | st.sampled_from(
                [b"<value>", b"</value>", b"<", b"&amp;", b"&#0;", b"<![CDATA[", b"]]>", b"<!--"]
            )
        )
    await _one_known_answer(bytes(body))


@given(start=st.integers(0, len(VALID)), stop=st.integers(0, len(VALID)))
async def test_any_part_of_a_valid_call_gets_one_known_answer(start: int, stop: int) -> None:
    await _one_known_answer(VALID[start:stop])
