"""xe's way of giving arguments, `key=value`, turned into `--key=value` before cyclopts sees it.

One translation for every command, driven by the command's own parameters; a key that it doesn't have is an
error with its name. Maps are written as in xe, `other-config:key=value`. The trap: a file may be called
`a=b`; what follows an option, what follows `--` and what has a slash before the `=` is therefore no key.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from gateway.cli.output import UsageError

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.argument import Argument

# A URL may have a = in its query, and http: is no map.
_WORD: Final = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)(?::(?!//)([^=\s]+))?=(.*)", re.DOTALL)


def translated(app: "App", arguments: Sequence[str]) -> list[str]:
    """The arguments of one command as options. UsageError names an unknown key."""
    if not any("=" in argument or argument == "-" for argument in arguments[1:]):
        return list(arguments)
    command, *rest = arguments
    parameters = [each for each in app[command].assemble_argument_collection() if each.parse]
    return [command, *_translate(rest, parameters)]


def _translate(words: Sequence[str], parameters: "Sequence[Argument]") -> Iterator[str]:
    known = {name: each for each in parameters for name in each.names if name.startswith("--")}
    filters = any(each.is_var_positional() for each in parameters)
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            yield from words[position - 1 :]
            return
        if word.startswith("-") and word != "-":
            option = known.get(word)
            if option is None or option.is_flag() or position >= len(words):
                yield word
                continue
            # cyclopts takes a "-" by itself for an option without a name.
            yield from (f"{word}=-",) if words[position] == "-" else (word, words[position])
            position += 1
            continue
        if word == "-" and "--filename" in known:
            # cyclopts takes it for an option without a name; everybody else for stdin or stdout.
            yield "--filename=-"
            continue
        found = _WORD.fullmatch(word)
        if found is None:
            yield word
            continue
        name = "--" + found[1].lower().replace("_", "-")
        option = known.get(name)
        if option is None:
            if not filters:
                raise UsageError(_unknown(found[1], known))
            yield word
        elif found[2] is not None:
            yield f"{name}={found[2]}={found[3]}"
        elif option.is_flag():
            yield from _flag(name, found[1], found[3])
        else:
            yield f"{name}={found[3]}"


def _flag(name: str, key: str, value: str) -> Iterator[str]:
    if value.lower() in ("true", "yes", "1", ""):
        yield name
    elif value.lower() not in ("false", "no", "0"):
        raise UsageError(f"{key}: {value!r} is neither true nor false")


def _unknown(key: str, known: "dict[str, Argument]") -> str:
    keys = sorted(name.removeprefix("--") for name in known)
    near = difflib.get_close_matches(key.lower(), keys, 1)
    meant = f" (did you mean {near[0]}=?)" if near else ""
    return f"there is no key {key!r}{meant}; the keys are {', '.join(keys)}; a file of that name: ./{key}=…"
