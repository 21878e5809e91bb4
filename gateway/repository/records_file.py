"""A copy of an SR's records inside the SR itself, so that losing the database loses nothing.

`records.json` holds the SR and its VDIs as the API knows them. It is written whole, to a new file that is
renamed over the old one. All calls here block.

The trap: the file may be older than the database, and the database may be an old backup. `newer` decides for
one VDI; when the evidence says nothing, the database wins.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

import msgspec

from gateway.core.records import SR, VDI
from gateway.images.files import FILES, FileCalls
from gateway.repository.directory import SRDirectory, read_regular, replace_file
from gateway.repository.scan import FileStamp

RECORDS_FORMAT: Final = 1
# Where a VDI record keeps the stamp of its file as it was when the content id was given.
STAMP_KEY: Final = "file-stamp"

# So many VDIs take half a millisecond; a pause of any length lets the other threads in.
_VDIS_PER_TURN: Final = 200
_PAUSE_SECONDS: Final = 0.0005


@dataclass(frozen=True, slots=True)
class RecordsCopy:
    """The content of the file."""

    format: int
    sr: SR
    vdis: tuple[VDI, ...]


class RecordsUnreadable(Exception):  # noqa: N818 - a state of the file
    """The file is there and cannot be used."""


def encode_records(sr: SR, vdis: list[VDI]) -> bytes:
    """The bytes of the file for these records: the same records give the same bytes.

    Blocks. Each VDI is encoded by itself, and now and then the interpreter is left to others: ten thousand
    in one go would hold it for 50 ms, and every client would wait.
    """
    ordered = sorted(vdis, key=attrgetter("uuid"))
    encode = msgspec.json.Encoder().encode
    pieces: list[bytes] = []
    for number, vdi in enumerate(ordered, start=1):
        pieces.append(encode(vdi))
        if number % _VDIS_PER_TURN == 0:
            time.sleep(_PAUSE_SECONDS)
    lines = b",\n".join(pieces)
    return b'{"format": %d,\n"sr": %b,\n"vdis": [\n%b\n]}\n' % (RECORDS_FORMAT, encode(sr), lines)


def write_records(directory: SRDirectory, content: bytes, files: FileCalls = FILES) -> None:
    """Replace the file; at each moment the old or the new one is whole."""
    replace_file(directory.records, content, files)


def read_records(directory: SRDirectory, keep: FileCalls | None = None) -> RecordsCopy | None:
    """The copy, or None without one. Raises RecordsUnreadable with the reason.

    With `keep` a file that can't be used then has another name, for soon there will be a new one: a later
    version of the gateway, or somebody by hand, may get names from it that no database has.
    """
    try:
        return _read(directory)
    except RecordsUnreadable as unreadable:
        if keep is None:
            raise
        kept = f"{directory.records}.unusable"
        try:
            keep.rename(directory.records, kept)
        except OSError:
            raise unreadable from None
        raise RecordsUnreadable(f"{unreadable}; it is {os.path.basename(kept)} now") from unreadable


def _read(directory: SRDirectory) -> RecordsCopy | None:
    try:
        content = read_regular(directory.records)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RecordsUnreadable(f"{directory.records}: {error.strerror}") from error
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != RECORDS_FORMAT:
            raise RecordsUnreadable(f"{directory.records}: format {version} was made by another version")
        return msgspec.json.decode(content, type=RecordsCopy)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordsUnreadable(f"{directory.records}: {error}") from error


def newer(database: VDI, copy: VDI, stamp: FileStamp) -> VDI:
    """Which of two records of one VDI to believe, given its file as it is now.

    The copy wins only when it knows this very file and the database an older one. If what the database knows
    is later than the file seems to be, a power failure has taken the time stamp of a write back, not its
    bytes: then the copy's content id is that of others.
    """
    copy_knows = copy.sm_config.get(STAMP_KEY) == str(stamp)
    return copy if copy_knows and _modified_ns(database) < stamp.modified_ns else database


def _modified_ns(vdi: VDI) -> int:
    """When the file had been written to that a record knows; 0 if it knows none."""
    with suppress(ValueError):
        return int(vdi.sm_config.get(STAMP_KEY, "").rpartition(":")[2])
    return 0


class _Version(msgspec.Struct):
    format: int
