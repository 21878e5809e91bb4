"""What the -list commands have in common: columns, xe's filters, `params` and `--minimal`.

A list is made of records, each a flat dictionary by column name. On a terminal it is a table, elsewhere lines
of columns divided by tabs, with --json a document, with --minimal the values of one column divided by commas.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cyclopts import Parameter

from gateway.cli.arguments import Flag
from gateway.cli.output import UsageError, print_json, print_table

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One field of a list. Without a `heading` it is shown only if `params` asks for it."""

    name: str
    heading: str = ""
    show: Callable[[Any], str] | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a list is printed."""

    params: str | None = None
    """Fields to print, divided by commas, as they are kept; `all` for every one."""

    minimal: Flag = False
    """Print the values of one field alone, divided by commas: the uuid, or the field in --params."""

    json: Flag = False
    """Print a JSON document."""


def print_list(columns: Sequence[Column], rows: Sequence[Row], filters: Sequence[str], shape: Shape) -> None:
    """Print the rows that every filter `FIELD=VALUE` lets through. UsageError names an unknown field."""
    named = {column.name: column for column in columns}
    tests = [_filter(each, named) for each in filters]
    found = [row for row in rows if all(_text(row[name]) == value for name, value in tests)]
    chosen = _chosen(shape.params, named)
    if shape.minimal:
        only = chosen or [columns[0]]
        if len(only) > 1:
            raise UsageError("--minimal prints one field; name one with params=FIELD")
        sys.stdout.write(",".join(_text(row[only[0].name]) for row in found) + "\n")
    elif shape.json:
        print_json([{_key(each): row[each.name] for each in chosen or columns} for row in found])
    elif chosen:
        print_table(
            [each.name for each in chosen], [[_text(row[each.name]) for each in chosen] for row in found]
        )
    else:
        shown = [column for column in columns if column.heading]
        print_table(
            [column.heading for column in shown],
            [[(column.show or _text)(row[column.name]) for column in shown] for row in found],
        )


def _filter(text: str, named: Mapping[str, Column]) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is no filter; give FIELD=VALUE, with a field of: {', '.join(named)}")
    return _column(name, named).name, value


def _chosen(params: str | None, named: Mapping[str, Column]) -> list[Column]:
    if params is None:
        return []
    if params == "all":
        return list(named.values())
    return [_column(name.strip(), named) for name in params.split(",")]


def _column(name: str, named: Mapping[str, Column]) -> Column:
    column = named.get(name.lower().replace("_", "-"))
    if column is None:
        raise UsageError(f"there is no field {name!r}; the fields are {', '.join(named)}")
    return column


def _key(column: Column) -> str:
    return column.name.replace("-", "_")


def _text(value: Any) -> str:
    """A value as xe shows it: maps as `key: value; …`, sets as `one; two`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {each}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(str(each) for each in value)
    return str(value)
