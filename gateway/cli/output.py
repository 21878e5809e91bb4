"""What commands say: tables, JSON, sizes, and the two kinds of expected failure."""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

# Names are other people's choice: a cell is one line, and gives the terminal no commands.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LONGEST_NUMBER = 40  # digits; Python reads no number of thousands
_TOO_MANY_BYTES = 1 << 63
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class CommandError(Exception):
    """The command can't be done: one line that says what is wrong and what to do. Exit code 1."""


class UsageError(CommandError):
    """An argument is wrong: one line that names it and says what to give. Exit code 2."""


def parse_size(text: str, argument: str) -> int:
    """Bytes from `10GiB`, `512 MiB` or a plain number. UsageError names `argument`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or (unit == 1 and "." in found[1]):
        raise UsageError(
            f"{argument}: {text!r} is no size; give bytes or a number with KiB, MiB, GiB or TiB, as in 10GiB"
        )
    size = -1
    if len(found[1]) <= _LONGEST_NUMBER:
        size = int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit
    if not 0 <= size < _TOO_MANY_BYTES:
        raise UsageError(f"{argument}: {text[:_LONGEST_NUMBER]} is more than a disk can have; give less")
    return size


def size_text(size: int) -> str:
    """A size for people: the largest unit that keeps it above one, exact where it is whole."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}" if size % unit == 0 else f"{size / unit:.1f} {name}"
    return f"{size} B"


def one_line(text: str) -> str:
    """Text that may hold names, and labels of filesystems, as one line without commands for the terminal."""
    return _CONTROLS.sub(" ", text)


def print_json(value: Any, indent: int | None = 2) -> None:
    """One JSON document on stdout; without `indent` on one line."""
    sys.stdout.write(json_for(sys.stdout, value, indent) + "\n")


def json_for(stream: TextIO, value: Any, indent: int | None = None) -> str:
    """A JSON document; where the stream's encoding doesn't have every character, it is ASCII."""
    narrow = not (stream.encoding or "utf-8").lower().startswith("utf")
    return json.dumps(value, indent=indent, ensure_ascii=narrow)


def print_note(text: str) -> None:
    """A remark beside the result: on stderr, so that a script that reads stdout gets the result alone.

    That nobody reads it is no failure.
    """
    with suppress(OSError):
        sys.stderr.write(one_line(text) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere columns divided by tabs, below one heading line."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            sys.stdout.write("\t".join(row) + "\n")
        return
    from rich.console import Console  # noqa: PLC0415  only a terminal pays for loading it
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
