"""The journals of a coalesce, in SM's names and places, so that SM and a gateway finish each other's work.

They lie beside the images, as SM writes them (cleanup.py, fjournaler.py): `coalesce_<C>` from before the
first write to C's parent until that is durable, `relink_<C>` while C's children are made children of C's
parent, `leaf_<L>` (its content is the parent's uuid) while the parent takes L's name. A leaf that is moved
aside is called `OLD_<L>.vhd`. All calls here block.

The trap: SM takes a journal's name for a promise, whatever is in the file. So a journal gets its name only
when its content is durable, and one without its content is nobody's word about anything.
"""

import os
import re
from contextlib import suppress
from enum import Enum
from typing import Final

from gateway.core.refs import is_uuid
from gateway.images.files import FileCalls
from gateway.repository.directory import SRDirectory
from gateway.repository.scan import JOURNAL_NAME, UUID_PATTERN
from gateway.repository.staging import staging_path

_NAME: Final = re.compile(rf"(coalesce|relink|leaf)_({UUID_PATTERN})")
_ANY_UUID: Final = re.compile(UUID_PATTERN)
_SIMPLE_CONTENT: Final = "1"
_MOST_CONTENT: Final = 256


class JournalKind(Enum):
    """The steps of a coalesce that have a journal. The value is what its name begins with."""

    COALESCE = "coalesce"
    RELINK = "relink"
    LEAF = "leaf"


def journal_name(kind: JournalKind, uuid: str) -> str:
    """The name of a journal in the SR's directory; `uuid` is that of the child that is merged."""
    return f"{kind.value}_{uuid}"


def parse_journal(name: str) -> tuple[JournalKind, str] | None:
    """The kind and the child's uuid of a journal's name, or None for other names."""
    match = _NAME.fullmatch(name)
    return (JournalKind(match[1]), match[2]) if match is not None else None


def child_of(name: str) -> str | None:
    """The uuid in the name of a journal, or of a leaf that was moved aside."""
    match = _ANY_UUID.search(name)
    return match[0] if match is not None else None


def journal_path(directory: SRDirectory, kind: JournalKind, uuid: str) -> str:
    """Where a journal lies."""
    return os.path.join(directory.root, journal_name(kind, uuid))


def old_leaf_path(directory: SRDirectory, leaf: str) -> str:
    """Where a leaf lies whose name its parent has taken."""
    return os.path.join(directory.root, f"OLD_{leaf}.vhd")


def create_journal(
    directory: SRDirectory, kind: JournalKind, uuid: str, *, parent: str | None = None, files: FileCalls
) -> None:
    """Write a journal, durably; it is there whole or not at all. `parent` is the content of a leaf's.

    Raises OSError; then it may be there all the same, and says nothing wrong.
    """
    assert (kind is JournalKind.LEAF) is (parent is not None), "a leaf's journal names the parent"
    staged = staging_path(directory, uuid)
    fd = files.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
    try:
        try:
            files.pwrite(fd, (parent or _SIMPLE_CONTENT).encode(), 0)
            files.sync(fd)
        finally:
            files.close(fd)
        files.rename(staged, journal_path(directory, kind, uuid))
    except BaseException:
        with suppress(OSError):
            files.unlink(staged)
        raise
    files.sync_directory(directory.root)


def remove_journal(directory: SRDirectory, kind: JournalKind, uuid: str, *, files: FileCalls) -> None:
    """Remove a journal, if it is there. A power failure may bring it back until the directory is synced."""
    with suppress(FileNotFoundError):
        files.unlink(journal_path(directory, kind, uuid))


def read_leaf_journal(directory: SRDirectory, leaf: str) -> str | None:
    """The parent's uuid in the journal of a leaf; None if there is none in it. Raises OSError."""
    fd = os.open(
        journal_path(directory, JournalKind.LEAF, leaf),
        os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
    )
    try:
        text = os.pread(fd, _MOST_CONTENT, 0).decode(errors="replace").strip()
    finally:
        os.close(fd)
    return text if is_uuid(text) else None


def names_at_work(uuid: str) -> tuple[str, ...]:
    """All names by which SM, or a gateway, would say that it is at work on one image."""
    kinds = (journal_name(kind, uuid) for kind in JournalKind)
    return (*kinds, f"clone_{uuid}", f"OLD_{uuid}.vhd", f"{uuid}.vhd.new", f".journal-{uuid}")


def unfinished_journals(directory: SRDirectory) -> tuple[str, ...]:
    """The names in the directory by which SM, or a gateway, says that it is at work. Raises OSError."""
    return tuple(sorted(name for name in os.listdir(directory.root) if JOURNAL_NAME.fullmatch(name)))
