"""XML-RPC as XenServer speaks it: request bodies in, answers out, byte for byte what xapi writes.

The writer puts nothing between tags, leaves strings bare (`<value>text</value>`), writes the empty string as
`<value/>` and integers as strings: the parser in Xen Orchestra's library breaks on anything else, and so does
every client that knows that XenAPI's integers are strings. The reader is expat with every door to entities
shut: a document type declaration ends the parse before anything in it is looked at. Whatever bytes arrive,
the answer is one of two: a XenAPI result (Status, Value or ErrorDescription) or an XML-RPC fault that says
why the request could not be read.
"""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final
from xml.parsers import expat

from gateway.core.errors import XenAPIError
from gateway.core.threads import in_thread
from gateway.xenapi.types import Int32, WireValue, is_large, moment_text, parse_moment

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.xenapi.dispatch import Api, Caller

    Ask = Callable[[Api, Caller], Awaitable[bytes]]

CONTENT_TYPE: Final = "text/xml"
"""Without a charset parameter: clients compare the header literally."""

MAX_DEPTH: Final = 100
"""Open XML elements at once. One XenAPI value inside another costs up to five; no XenAPI type nests deeper
than 4."""

MAX_ELEMENTS: Final = 100_000
"""XML elements in one request: ten times a VDI record with a thousand other_config keys, read in a quarter of
a second."""

PARSE_ERROR: Final = -32700
"""faultCode of a request that cannot be read, from the specification for fault code interoperability."""

_PIECE: Final = 16 << 10
"""Bytes that expat gets at once."""

_LONGEST_TAG: Final = 32 << 10
"""No tag or comment may have more bytes than this; XML-RPC's longest is <dateTime.iso8601>."""

_LARGE: Final = 64 << 10
"""Characters of a long text."""

_LONGEST_MEMBER: Final = 256
"""Characters of a member's name that is remembered."""

_PROLOGUE = '<?xml version="1.0"?><methodResponse><params><param>'
_EPILOGUE = "</param></params></methodResponse>"

# Of a number without the space around it: megabytes of that would be gone through once for each way to divide
# the digits between two repetitions.
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_DOUBLE = re.compile(r"[+-]?(?:[0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,4})?")
_SPACE: Final = " \t\n\r\f\v"
_TO_ESCAPE = re.compile('[&<>"\r\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]')
_NOT_CARRIED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_TO_KEEP = bytes(number for number in range(128) if not _TO_ESCAPE.match(chr(number)))
_ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\r": "&#13;"}


class MalformedRequestError(Exception):
    """A body that is no XML-RPC call; the text says in one line why."""


# Writing


def _escaped(text: str) -> str:
    if _NOT_CARRIED.search(text):
        text = _NOT_CARRIED.sub("\ufffd", text)
    # Each by itself: a function that is called for each of a million characters takes a second.
    for letter, written in _ESCAPED.items():
        text = text.replace(letter, written)
    return text


def _member(name: str) -> str:
    """The beginning of a struct's member."""
    return _known_member(name) if len(name) <= _LONGEST_MEMBER else f"<member><name>{_escaped(name)}</name>"


@lru_cache(maxsize=1024)
def _known_member(name: str) -> str:
    """The same. Ten thousand records have the same thirty names over and over."""
    return f"<member><name>{_escaped(name)}</name>"


def _text(text: str) -> str:
    if not text:
        return "<value/>"
    if _TO_ESCAPE.search(text):
        text = _escaped(text)
    return f"<value>{text}</value>"


def _write(value: WireValue, out: list[str]) -> None:
    if isinstance(value, str):
        if len(value) < _LARGE:
            out.append(_text(value))
        else:
            # The bits of a disk of 2 TiB have 5.6 MB of base64: not one copy more, and no search by pattern.
            needs_escape = not value.isascii() or value.encode().translate(None, _TO_KEEP)
            out += ("<value>", _escaped(value) if needs_escape else value, "</value>")
    elif isinstance(value, dict):
        out.append("<value><struct>")
        for name, item in value.items():
            if type(item) is str and len(item) < _LARGE:
                out.append(f"{_member(name)}{_text(item)}</member>")
            else:
                out.append(_member(name))
                _write(item, out)
                out.append("</member>")
        out.append("</struct></value>")
    elif isinstance(value, list | tuple):
        out.append("<value><array><data>")
        for item in value:
            _write(item, out)
        out.append("</data></array></value>")
    elif isinstance(value, bool):
        out.append("<value><boolean>1</boolean></value>" if value else "<value><boolean>0</boolean></value>")
    elif isinstance(value, Int32):
        out.append(f"<value><i4>{value}</i4></value>")
    elif isinstance(value, int):
        out.append(f"<value>{value}</value>")
    elif isinstance(value, float):
        out.append(f"<value><double>{value:.16g}</double></value>")
    elif isinstance(value, datetime):
        out.append(f"<value><dateTime.iso8601>{moment_text(value)}</dateTime.iso8601></value>")
    else:
        out.append("<value/>")


def dump_value(value: WireValue) -> str:
    """One `<value>` element. Characters that XML cannot carry become U+FFFD."""
    out: list[str] = []
    _write(value, out)
    return "".join(out)


def dump_success(value: WireValue) -> bytes:
    """The answer to a call that succeeded."""
    return _document({"Status": "Success", "Value": value})


def dump_failure(error_info: list[str]) -> bytes:
    """The answer to a call that failed: the error's code and its parameters."""
    return _document({"Status": "Failure", "ErrorDescription": error_info})


def dump_fault(code: int, text: str) -> bytes:
    """The answer to a body that is no call. Here an integer is an integer, as XML-RPC has it."""
    return (
        '<?xml version="1.0"?><methodResponse><fault><value><struct>'
        f"<member><name>faultCode</name><value><int>{code}</int></value></member>"
        f"<member><name>faultString</name>{dump_value(text)}</member>"
        "</struct></value></fault></methodResponse>"
    ).encode()


def _document(value: WireValue) -> bytes:
    out = [_PROLOGUE]
    _write(value, out)
    out.append(_EPILOGUE)
    return "".join(out).encode()


# Reading


def _read_integer(text: str) -> int:
    digits = text.strip(_SPACE)
    if not _INTEGER.fullmatch(digits):
        raise MalformedRequestError("an integer is not made of up to 20 decimal digits")
    return int(digits)


def _read_boolean(text: str) -> bool:
    if text.strip() not in ("0", "1"):
        raise MalformedRequestError("a boolean is neither 0 nor 1")
    return text.strip() == "1"


def _read_double(text: str) -> float:
    digits = text.strip(_SPACE)
    if not _DOUBLE.fullmatch(digits):
        raise MalformedRequestError("a double is not a decimal number")
    return float(digits)


def _read_moment(text: str) -> datetime:
    moment = parse_moment(text.strip())
    if moment is None:
        raise MalformedRequestError("a dateTime.iso8601 is not of the form 20261231T23:59:59Z")
    return moment


def _read_nil(text: str) -> None:
    if text.strip():
        raise MalformedRequestError("nil holds text")


_SCALARS: Final[dict[str, Callable[[str], WireValue]]] = {
    "string": str,
    "int": _read_integer,
    "i4": _read_integer,
    "i8": _read_integer,
    "boolean": _read_boolean,
    "double": _read_double,
    "dateTime.iso8601": _read_moment,
    "nil": _read_nil,
}

_CHILDREN: Final[dict[str, frozenset[str]]] = {
    "": frozenset({"methodCall"}),
    "methodCall": frozenset({"methodName", "params"}),
    "params": frozenset({"param"}),
    "param": frozenset({"value"}),
    "value": frozenset({*_SCALARS, "struct", "array"}),
    "struct": frozenset({"member"}),
    "member": frozenset({"name", "value"}),
    "array": frozenset({"data"}),
    "data": frozenset({"value"}),
}
"""Which elements an element may hold. What is not here holds text alone."""

_WITH_TEXT = frozenset({"value", "methodName", "name", *_SCALARS})


class _Element:
    __slots__ = ("children", "name", "text")

    def __init__(self, name: str) -> None:
        self.name = name
        self.text: list[str] = []
        self.children: list[tuple[str, Any]] = []


class _Reader:
    """The state of one parse: the open elements, and what the closed ones came to."""

    def __init__(self) -> None:
        self._open = [_Element("")]
        self._elements = 0

    def read(self, body: bytes) -> tuple[str, list[Any]]:
        # Not an attribute: a circle would keep each call until the collector comes, megabytes of it.
        parser = expat.ParserCreate("UTF-8")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._data
        try:
            # In pieces: expat keeps the interpreter to itself while it looks at one, and the time for a tag's
            # attributes grows with their number. What it cannot finish it keeps, so a tag that goes on and on
            # shows as a lag.
            for start in range(0, len(body), _PIECE):
                parser.Parse(body[start : start + _PIECE], False)
                if start - parser.CurrentByteIndex > _LONGEST_TAG:
                    raise MalformedRequestError(f"it has a tag or comment of more than {_LONGEST_TAG} bytes")
            parser.Parse(b"", True)
        except expat.ExpatError as error:
            raise MalformedRequestError(f"it is not well-formed XML: {error}") from None
        ((_, call),) = self._open[0].children
        method, params = call
        return method, params

    def _refuse_doctype(self, *_: object) -> None:
        raise MalformedRequestError("it has a document type declaration, which XML-RPC has no use for")

    def _start(self, name: str, _attributes: dict[str, str]) -> None:
        parent = self._open[-1]
        self._elements += 1
        if name not in _CHILDREN.get(parent.name, ()):
            raise MalformedRequestError(f"<{name[:40]}> must not stand in <{parent.name}>")
        if len(self._open) > MAX_DEPTH:
            raise MalformedRequestError(f"it nests more than {MAX_DEPTH} elements")
        if self._elements > MAX_ELEMENTS:
            raise MalformedRequestError(f"it has more than {MAX_ELEMENTS} elements")
        self._open.append(_Element(name))

    def _data(self, text: str) -> None:
        element = self._open[-1]
        if element.name in _WITH_TEXT:
            element.text.append(text)
        elif not text.isspace():
            raise MalformedRequestError(f"<{element.name}> holds text")

    def _end(self, name: str) -> None:
        element = self._open.pop()
        self._open[-1].children.append((name, _close(element)))


def _close(element: _Element) -> Any:
    """What a closed element comes to. Its children are of the kinds that _CHILDREN allows, so counting is
    enough."""
    name, children = element.name, element.children
    text = "".join(element.text)
    if name == "value":
        if not children:
            return text
        if text.strip():
            raise MalformedRequestError("a value holds both text and a typed value")
        return _only(element)
    if name in _SCALARS:
        return _SCALARS[name](text)
    if name in ("methodName", "name"):
        return text
    if name in ("data", "params"):
        return [child for _, child in children]
    if name == "struct":
        struct = dict(child for _, child in children)
        if len(struct) != len(children):
            raise MalformedRequestError("a struct has two members of the same name")
        return struct
    if name == "member":
        if [kind for kind, _ in children] != ["name", "value"]:
            raise MalformedRequestError("a member is not one name followed by one value")
        return children[0][1], children[1][1]
    if name == "methodCall":
        if [kind for kind, _ in children] not in (["methodName", "params"], ["methodName"]):
            raise MalformedRequestError("a methodCall is not one methodName followed by params")
        return children[0][1].strip(), children[1][1] if len(children) == 2 else []
    return _only(element)


def _only(element: _Element) -> Any:
    if len(element.children) != 1:
        raise MalformedRequestError(f"<{element.name}> does not hold exactly one value")
    return element.children[0][1]


def parse_call(body: bytes) -> tuple[str, list[Any]]:
    """The method name and the parameters of a methodCall; MalformedRequestError for any other body. Documents
    are UTF-8."""
    return _Reader().read(body)


def read_xmlrpc(body: bytes) -> Ask:
    """What asks the API for the body of the answer (HTTP status 200, content type text/xml) to the body of a
    request. Never raises.
    """
    try:
        method, params = parse_call(body)
    except MalformedRequestError as error:
        return partial(_tell, dump_fault(PARSE_ERROR, f"The request cannot be read as XML-RPC: {error}."))
    return partial(_answer, method, params)


async def _tell(fault: bytes, _api: Api, _caller: Caller) -> bytes:
    return fault


async def _answer(method: str, params: list[Any], api: Api, caller: Caller) -> bytes:
    """Like xapi, system.listMethods answers a bare array, as XML-RPC introspection has it, without Status and
    Value.
    """
    try:
        value = await api.call(method, params, caller)
    except XenAPIError as error:
        return dump_failure(error.error_info)
    write = _document if method == "system.listMethods" else dump_success
    if is_large(value):
        return await in_thread(write, value)
    return write(value)
