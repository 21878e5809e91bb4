"""The records of images that are about to get a name in an SR, kept there until the database has them.

A file comes before its record. Who is killed in between leaves an image that the next scan finds and that has
lost its name; so what is made of other VDIs says first, in `made-<uuid>.json` beside the marker, what it will
be called. When the SR is attached again, records whose images are there go into the copy of the SR's records,
from where the inventory takes what the database doesn't know.

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
from gateway.repository.directory import DirectoryUnavailable, SRDirectory, replace_file
from gateway.repository.records_file import (
    RecordsUnreadable,
    encode_records,
    read_records,
    write_records,
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


def remember_intended(directory: SRDirectory, files: FileCalls) -> None:
    """Put the records whose images are there into the copy of the SR's records.

    For the time when nobody else writes that copy. Raises DirectoryUnavailable, OSError.
    """
    for name in sorted(os.listdir(directory.service)):
        path = os.path.join(directory.service, name)
        if _NAME.fullmatch(name):
            _remember(directory, _read(path), files)
        elif not _HALF_WRITTEN.fullmatch(name):
            continue
        files.unlink(path)
        files.sync_directory(directory.service)


def _remember(directory: SRDirectory, records: Sequence[VDI], files: FileCalls) -> None:
    there = [vdi for vdi in records if os.path.lexists(directory.image(vdi.uuid, vdi.image_format))]
    with suppress(RecordsUnreadable):
        copy = read_records(directory)
        if copy is not None and there:
            vdis = {vdi.uuid: vdi for vdi in (*there, *copy.vdis)}
            write_records(directory, encode_records(copy.sr, list(vdis.values())), files)


def _read(path: str) -> Sequence[VDI]:
    with open(path, "rb") as file:
        text = file.read()
    try:
        intended = msgspec.json.decode(text, type=_Intended)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DirectoryUnavailable(path, "not what an interrupted snapshot or copy leaves") from error
    if intended.format != INTENDED_FORMAT:
        raise DirectoryUnavailable(path, "it was made by another version of the gateway")
    return intended.records
