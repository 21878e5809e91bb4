"""XenAPI's query language, for get_all_records_where: `field "name__label" = "a" and not field "SR" = "b"`.

Grammar and precedence are xapi's (ocaml/database/db_filter_parse.mly): `true`, `false`, `not`, `and`, `or`,
parentheses, and equality of two values, each a field or a string. Values are compared as text, as xapi's
database holds them: booleans are `true` and `false`, integers decimal, sets `('a' 'b')`, maps `(('k' 'v'))`.
The trap: a field of several words is written with two underscores between them there (`name__label`), while
its getter has one; both are understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NoReturn

from gateway.core.errors import XenAPIError
from gateway.xenapi.types import WireValue, moment_text

_LONGEST: Final = 16 << 10
"""Characters of a query."""

_DEEPEST: Final = 100
"""Parentheses and negations inside each other."""

_TOKEN: Final = re.compile(
    r"""\s*(?:(?P<word>[A-Za-z_]+)|"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>(?:[^'\\]|\\.)*)'|(?P<sign>[=()]))""",
    re.DOTALL,
)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)

Text = Callable[[str], str]
"""Gives the text of one field of the object that is looked at."""

Condition = Callable[[Text], bool]


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # "word", "text", a sign, or "end"
    value: str


def parse_query(query: str, fields: Collection[str]) -> Condition:
    """What `query` asks of an object that has `fields`. VALUE_NOT_SUPPORTED says what cannot be
    understood."""
    if len(query) > _LONGEST:
        _refuse(query, f"it is longer than {_LONGEST} characters")
    parser = _Parser(query, fields)
    return parser.parse()


def database_text(value: WireValue) -> str:
    """The text by which a value is compared."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.16g}"
    if isinstance(value, datetime):
        return moment_text(value)
    if isinstance(value, dict):
        return f"({' '.join(f'({_quoted(key)} {_quoted(item)})' for key, item in value.items())})"
    if isinstance(value, list | tuple):
        return f"({' '.join(_quoted(item) for item in value)})"
    return "" if value is None else str(value)


def _quoted(value: WireValue) -> str:
    return f"'{database_text(value)}'"


def _refuse(query: str, reason: str) -> NoReturn:
    raise XenAPIError("VALUE_NOT_SUPPORTED", "expr", query[:100], reason)


class _Parser:
    """Recursive descent: `or` binds least, then `and`, then `not`."""

    def __init__(self, query: str, fields: Collection[str]) -> None:
        self._query = query
        self._fields = fields
        self._tokens = self._read()
        self._next = 0
        self._depth = 0

    def parse(self) -> Condition:
        condition = self._either()
        if self._look().kind != "end":
            _refuse(self._query, f"there is {self._look().value!r} after its end")
        return condition

    def _read(self) -> list[_Token]:
        tokens: list[_Token] = []
        text = self._query.rstrip()
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                _refuse(self._query, f"{text[place : place + 20].strip()!r} cannot be understood")
            place = match.end()
            kind = match.lastgroup
            value = match[kind] if kind is not None else ""
            if kind in {"double", "single"}:
                tokens.append(_Token("text", _ESCAPE.sub(r"\1", value)))
            else:
                tokens.append(_Token(value if kind == "sign" else "word", value))
        tokens.append(_Token("end", ""))
        return tokens

    def _look(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next += token.kind != "end"
        return token

    def _is(self, word: str) -> bool:
        return self._look() == _Token("word", word)

    def _either(self) -> Condition:
        conditions = [self._both()]
        while self._is("or"):
            self._take()
            conditions.append(self._both())
        return conditions[0] if len(conditions) == 1 else lambda text: any(one(text) for one in conditions)

    def _both(self) -> Condition:
        conditions = [self._one()]
        while self._is("and"):
            self._take()
            conditions.append(self._one())
        return conditions[0] if len(conditions) == 1 else lambda text: all(one(text) for one in conditions)

    def _one(self) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            _refuse(self._query, f"more than {_DEEPEST} conditions are inside each other")
        try:
            return self._condition()
        finally:
            self._depth -= 1

    def _condition(self) -> Condition:
        if self._is("not"):
            self._take()
            negated = self._one()
            return lambda text: not negated(text)
        if self._look().kind == "(":
            self._take()
            inner = self._either()
            if self._take().kind != ")":
                _refuse(self._query, "a parenthesis is not closed")
            return inner
        if self._is("true") or self._is("false"):
            answer = self._take().value == "true"
            return lambda _text: answer
        left = self._value()
        if self._take().kind != "=":
            _refuse(self._query, 'a condition is of the form: field "name" = "value"')
        right = self._value()
        return lambda text: left(text) == right(text)

    def _value(self) -> Callable[[Text], str]:
        token = self._take()
        if token.kind == "text":
            constant = token.value
            return lambda _text: constant
        if token == _Token("word", "field"):
            named = self._take()
            if named.kind not in {"text", "word"}:
                _refuse(self._query, "the name of a field is missing")
            name = self._field(named.value)
            return lambda text: text(name)
        _refuse(self._query, f"{token.value!r} is neither a field nor a text in quotation marks")

    def _field(self, name: str) -> str:
        for candidate in (name, name.replace("__", "_")):
            if candidate in self._fields:
                return candidate
        _refuse(self._query, f"there is no field {name[:64]!r}")
