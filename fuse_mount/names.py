"""From the labels that people give to the names of directories: allowed, unique, and the same while they
last.

Knows nothing of disks. A label is any text; a name is 1 to 255 bytes of UTF-8 without a slash. A name that
is not its label, or that others in the directory would have too, ends in "~" and the beginning of the uuid.
The trap: a name that is given stays, because somebody has it on his command line or as his working directory;
so what comes later gets out of the way, also of a label that looks like another's name with its suffix.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

LONGEST: Final = 255
"""Bytes of a name at most: NAME_MAX of Linux."""

_SUFFIXES: Final = (8, 16, 36)
"""How many characters of the uuid follow the "~": the next if a name with the one before is taken."""


def plain_name(label: str, uuid: str) -> tuple[str, bool]:
    """The name that a label makes by itself, and whether it has to end in a part of the uuid.

    Slashes and control characters (NUL, line breaks) become "_". What can't be a name at all ("", ".", "..")
    is replaced by the uuid, which needs no suffix.
    """
    if label in ("", ".", ".."):
        return uuid, False
    # A label from a broken encoding may hold half a surrogate pair, which UTF-8 can't.
    text = label.encode("utf-8", "replace").decode()
    text = "".join("_" if char == "/" or unicodedata.category(char) == "Cc" else char for char in text)
    return text, text != label or len(text.encode()) > LONGEST


def suffixed_names(name: str, uuid: str) -> Iterator[str]:
    """What to call it instead, the best first; there is always one more."""
    for length in _SUFFIXES:
        yield _with_suffix(name, f"~{uuid[:length]}")
    number = 2
    while True:
        yield _with_suffix(name, f"~{uuid}~{number}")
        number += 1


def _with_suffix(name: str, suffix: str) -> str:
    cut = name.encode()[: LONGEST - len(suffix.encode())]
    return cut.decode("utf-8", "ignore") + suffix


class Names:
    """The names in one directory. `reserved` are those that stand there anyway."""

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self._taken = set(reserved)
        self._given: dict[str, str] = {}

    def give(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Names for those that come, labels by uuid. What is there keeps its name.

        The same set gets the same names, in whatever order it is told.
        """
        wanted = {uuid: plain_name(labels[uuid], uuid) for uuid in sorted(labels)}
        how_many = Counter(name for name, _ in wanted.values())
        given: dict[str, str] = {}
        late: list[str] = []
        for uuid, (name, changed) in wanted.items():
            if changed or how_many[name] > 1 or name in self._taken:
                late.append(uuid)
            else:
                given[uuid] = name
        self._taken.update(given.values())
        for uuid in late:
            name = next(each for each in suffixed_names(wanted[uuid][0], uuid) if each not in self._taken)
            given[uuid] = name
            self._taken.add(name)
        self._given.update(given)
        return given

    def take_back(self, uuid: str) -> None:
        """Whoever had this uuid has gone, or is called something else now; its name is free."""
        self._taken.discard(self._given.pop(uuid))
