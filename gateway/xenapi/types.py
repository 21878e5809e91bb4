"""The types of XenAPI: what a parameter may be, and what it becomes inside the gateway.

Both codecs hand over plain Python values (str, bool, int, float, datetime, list, dict, None). A type's
`accept` turns such a value into the one the product works with, or raises a XenAPI error that names the
field. The trap: XML-RPC carries XenAPI's 64-bit integers as strings and JSON-RPC as numbers, so integers are
taken in both forms here and nowhere else, and a Python bool must never pass for an integer.
"""

from __future__ import annotations

import math
import re
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF

if TYPE_CHECKING:
    from collections.abc import Mapping

WireValue: TypeAlias = (
    "str | bool | int | float | datetime | list[Any] | tuple[Any, ...] | dict[str, Any] | None"
)


class Int32(int):
    """A number that XenAPI sends with 32 bits. In XML it is an <i4>, where 64-bit integers are strings."""


_LARGE: Final = 5000
_LETTERS_OF_A_PART: Final = 256
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}\Z")
_REAL = re.compile(r"[+-]?[0-9]{1,19}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,3})?\Z")
_INTEGER_RANGE = range(-(2**63), 2**63)
_MOMENT = re.compile(
    r"([0-9]{4})-?([0-9]{2})-?([0-9]{2})T([0-9]{2}):?([0-9]{2}):?([0-9]{2})(?:\.[0-9]{1,9})?Z?\Z"
)

NOT_IN_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML 1.0 document can carry, not even as a character reference (XML 1.0, production
2)."""


class WireType(Protocol):
    """One type of the API: its name in XenAPI's documentation and the check of a value that arrives."""

    @property
    def name(self) -> str: ...

    def accept(self, value: WireValue, field: str) -> Any:
        """The value as the gateway uses it; FIELD_TYPE_ERROR or VALUE_NOT_SUPPORTED, naming `field`,
        otherwise."""
        ...


def _wrong_type(field: str) -> XenAPIError:
    return XenAPIError("FIELD_TYPE_ERROR", field)


@dataclass(frozen=True, slots=True)
class Text:
    """A string. Only a secret, which is never sent back, may hold characters that XML cannot carry. Where
    there is a `pattern` the whole string must match it; `form` says in words what that means."""

    secret: bool = False
    pattern: re.Pattern[str] | None = None
    form: str = ""

    @property
    def name(self) -> str:
        return "string"

    def accept(self, value: WireValue, field: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(field)
        if not self.secret and NOT_IN_XML.search(value):
            shown = ascii(value[:64])
            raise XenAPIError("VALUE_NOT_SUPPORTED", field, shown, "it has characters that XML cannot carry")
        if self.pattern is not None and not self.pattern.fullmatch(value):
            raise XenAPIError("VALUE_NOT_SUPPORTED", field, value[:64], f"it must be {self.form}")
        return value


@dataclass(frozen=True, slots=True)
class Integer:
    """A signed 64-bit integer, as a number or as decimal digits."""

    @property
    def name(self) -> str:
        return "int"

    def accept(self, value: WireValue, field: str) -> int:
        if isinstance(value, str) and _INTEGER.match(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value not in _INTEGER_RANGE:
            raise _wrong_type(field)
        return value


@dataclass(frozen=True, slots=True)
class Real:
    """A finite double, as a number or as decimal digits. An integer will do: JSON writes 1.0 as 1, and Node's
    xen-api, over XML-RPC, as the string 1."""

    @property
    def name(self) -> str:
        return "float"

    def accept(self, value: WireValue, field: str) -> float:
        if isinstance(value, str) and _REAL.match(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(field)
        if isinstance(value, int) and value not in _INTEGER_RANGE:
            raise _wrong_type(field)
        if not math.isfinite(value):
            raise XenAPIError("VALUE_NOT_SUPPORTED", field, str(value), "it must be a finite number")
        return float(value)


@dataclass(frozen=True, slots=True)
class Boolean:
    @property
    def name(self) -> str:
        return "bool"

    def accept(self, value: WireValue, field: str) -> bool:
        if not isinstance(value, bool):
            raise _wrong_type(field)
        return value


@dataclass(frozen=True, slots=True)
class Moment:
    """A date and time in UTC, with a resolution of one second."""

    @property
    def name(self) -> str:
        return "datetime"

    def accept(self, value: WireValue, field: str) -> datetime:
        if isinstance(value, str):
            value = parse_moment(value)
        if not isinstance(value, datetime):
            raise _wrong_type(field)
        return value


@dataclass(frozen=True, slots=True)
class Reference:
    """The opaque reference of an object, or the null reference, for which an empty string will do.

    Whether the object exists is asked where it is used.
    """

    class_name: str

    @property
    def name(self) -> str:
        return f"{self.class_name} ref"

    def accept(self, value: WireValue, field: str) -> str:
        return STRING.accept(value, field) or NULL_REF


@dataclass(frozen=True, slots=True)
class Choice:
    """An enumeration: one of a few known words, which xapi reads in any case. No two of them differ by case
    alone."""

    name: str
    values: tuple[str, ...]

    def accept(self, value: WireValue, field: str) -> str:
        text = STRING.accept(value, field)
        for known in self.values:
            if known.lower() == text.lower():
                return known
        reason = f"it must be one of {', '.join(self.values)}"
        raise XenAPIError("VALUE_NOT_SUPPORTED", field, text, reason)


@dataclass(frozen=True, slots=True)
class SetOf:
    """A set, sent as an array. The order is kept, duplicates are dropped."""

    item: WireType

    @property
    def name(self) -> str:
        return f"{self.item.name} set"

    def accept(self, value: WireValue, field: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _wrong_type(field)
        return tuple(dict.fromkeys(self.item.accept(item, field) for item in value))


@dataclass(frozen=True, slots=True)
class MapOf:
    """A map, sent as a struct, so that its keys are strings whatever their XenAPI type."""

    value: WireType
    key: WireType

    @property
    def name(self) -> str:
        return f"({self.key.name} -> {self.value.name}) map"

    def accept(self, value: WireValue, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong_type(field)
        return {
            self.key.accept(key, field): self.value.accept(item, f"{field}:{key}")
            for key, item in value.items()
        }


@dataclass(frozen=True, slots=True)
class Item:
    """One member of a record: its type, and the value it has where a caller leaves it out (None: it must be
    there)."""

    type: WireType
    default: Any = None


@dataclass(frozen=True, slots=True)
class Record:
    """A struct with known members. Members the gateway sets itself are skipped unread, whatever they hold:
    clients send back complete records that they got from get_record."""

    class_name: str
    members: Mapping[str, Item]

    @property
    def name(self) -> str:
        return f"{self.class_name} record"

    def accept(self, value: WireValue, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong_type(field)
        accepted: dict[str, Any] = {}
        for name, item in self.members.items():
            if name in value:
                accepted[name] = item.type.accept(value[name], name)
            elif item.default is None:
                raise _wrong_type(name)
            else:
                accepted[name] = copy(item.default)
        return accepted


@dataclass(frozen=True, slots=True)
class Records:
    """What get_all_records answers: a map from references to records. It only ever goes out."""

    class_name: str

    @property
    def name(self) -> str:
        return f"({self.class_name} ref -> {self.class_name} record) map"

    def accept(self, value: WireValue, field: str) -> Any:
        raise _wrong_type(field)


@dataclass(frozen=True, slots=True)
class Nothing:
    """The result of a message without one; it is an empty string on the wire."""

    @property
    def name(self) -> str:
        return "void"

    def accept(self, value: WireValue, field: str) -> Any:
        raise _wrong_type(field)


STRING: Final = Text()
SECRET: Final = Text(secret=True)
INT: Final = Integer()
FLOAT: Final = Real()
BOOL: Final = Boolean()
DATETIME: Final = Moment()
VOID: Final = Nothing()
STRINGS: Final = SetOf(STRING)
STRING_MAP: Final = MapOf(STRING, STRING)


def is_large(value: WireValue) -> bool:
    """Whether an answer has so many parts, at any depth, that it is written in a worker thread: some three
    milliseconds' work. A long text counts as several."""
    parts, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            parts += len(part) // _LETTERS_OF_A_PART
        elif isinstance(part, dict | list | tuple):
            parts += len(part)
            if parts <= _LARGE:
                waiting.extend(part.values() if isinstance(part, dict) else part)
        if parts > _LARGE:
            return True
    return False


def parse_moment(text: str) -> datetime | None:
    """The moment that `text` names in XenAPI's form 20261231T23:59:59Z (dashes and fractions are tolerated),
    or None."""
    match = _MOMENT.match(text)
    if match is None or not text.isascii():
        return None
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None


def moment_text(moment: datetime) -> str:
    """XenAPI's form of a date: 20261231T23:59:59Z."""
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    return (
        f"{moment.year:04d}{moment.month:02d}{moment.day:02d}"
        f"T{moment.hour:02d}:{moment.minute:02d}:{moment.second:02d}Z"
    )
