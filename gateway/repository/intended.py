"""The records of images that are about to get a name in an SR, kept there until the database has them.

A file comes before its record. Who is killed in between leaves an image that the next scan finds and that has
lost its name; so what is made of other VDIs says first, in `made-<uuid>.json` beside the marker, what it will
be called. When the SR is attached again, the inventory takes from there what neither the database nor the
copy of the SR's records knows; only then it goes.

The trap: such a file may come back after a power failure that took its removal. It tells nothing then that
the database or the copy doesn't know better, so they are believed first. All calls here block.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec

from gateway.core.records import VDI
from gateway.images.files import FileCalls
from gateway.repository.directory import (
    DirectoryUnavailable,
    SRDirectory,
    is_there,
    read_regular,
    replace_file,
)

INTENDED_FORMAT: Final = 1
_NAME: Final = re.compile(r"made-[0-9a-f-]{36}\.json")
_HALF_WRITTEN: Final = re.compile(r"(?:fork|made)-[0-9a-f-]{36}\.json\.new")


@dataclass(frozen=True, slots=True)
class _Intended:
    records: tuple[VDI, ...]
    format: int = INTENDED_FORMAT


def intended_path(directory: SRDirectory, uuid: str) -> str:
    """Where the records are kept that come with the image of this uuid."""
    return os.path.join(directory.service, f"made-{uuid}.json")


def write_intended(directory: SRDirectory, uuid: str, records: Sequence[VDI], files: FileCalls) -> None:
    """Keep them, durably, from before the image has its name. Raises OSError."""
    path = intended_path(directory, uuid)
    try:
        replace_file(path, msgspec.json.encode(_Intended(tuple(records))) + b"\n", files)
    except BaseException:
        for left in (path, f"{path}.new"):
            with suppress(OSError):
                files.unlink(left)
        raise


def forget_intended(directory: SRDirectory, uuid: str, files: FileCalls) -> None:
    """The database has the records, or there is no image: they need not be kept, but it does no harm."""
    with suppress(OSError):
        files.unlink(intended_path(directory, uuid))


def read_intended(directory: SRDirectory, files: FileCalls) -> tuple[VDI, ...]:
    """The records that are kept, of images that are there; what is kept of others goes.

    For the time when nothing gets a name in the SR. Raises DirectoryUnavailable, OSError.
    """
    found: list[VDI] = []
    useless: list[str] = []
    for name in sorted(os.listdir(directory.service)):
        path = os.path.join(directory.service, name)
        if _NAME.fullmatch(name):
            there = [vdi for vdi in _read(path) if is_there(directory.image(vdi.uuid, vdi.image_format))]
            if there:
                found += there
            else:
                useless.append(path)
        elif _HALF_WRITTEN.fullmatch(name):
            useless.append(path)
    _remove(directory, useless, files)
    return tuple(found)


def forget_all_intended(directory: SRDirectory, files: FileCalls) -> None:
    """The database has all that `read_intended` has told. Raises OSError."""
    names = [name for name in os.listdir(directory.service) if _NAME.fullmatch(name)]
    _remove(directory, [os.path.join(directory.service, name) for name in names], files)


def _remove(directory: SRDirectory, paths: Sequence[str], files: FileCalls) -> None:
    for path in paths:
        files.unlink(path)
    if paths:
        files.sync_directory(directory.service)


def _read(path: str) -> Sequence[VDI]:
    try:
        intended = msgspec.json.decode(read_regular(path), type=_Intended)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DirectoryUnavailable(path, "not what an interrupted snapshot or copy leaves") from error
    if intended.format != INTENDED_FORMAT:
        raise DirectoryUnavailable(path, "it was made by another version of the gateway")
    return intended.records
