"""What is on a disk whose files are mounted: partitions and filesystems, as programs of util-linux tell.

Each look is a process of its own with a time limit, since whoever touches those files may hang; nothing is
parsed here but what the programs print. The traps: blkid says nothing at all where two kinds of filesystem
could be meant, and only wipefs names both; and to blkid, what can't be read is what has no filesystem.
"""

import errno
import json
import os
import re
from dataclasses import dataclass
from typing import Any, Final

from fuse_mount.partitions import read_table
from fuse_mount.programs import PARSER_MEMORY, Ended, ProgramError, run_program

_SECONDS: Final = 60.0
_NOTHING_FOUND: Final = 2
_AMBIGUOUS: Final = 8
_ESCAPED: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")


@dataclass(frozen=True, slots=True)
class Filesystem:
    """What blkid finds: a filesystem, or swap, a LUKS container, an LVM or RAID member. `size` is in bytes.

    `size` is None where blkid is older than 2.39 or doesn't know it. `type` has commas where several fit.
    """

    type: str
    usage: str
    label: str
    uuid: str
    size: int | None

    @property
    def mountable(self) -> bool:
        """Whether it is one filesystem."""
        return self.usage == "filesystem"


@dataclass(frozen=True, slots=True)
class Volume:
    """A partition, or a whole disk without a table, `number` None. `file` lies in the VDI's directory."""

    number: int | None
    start: int
    size: int
    type: str
    type_name: str
    name: str
    uuid: str
    file: str
    filesystem: Filesystem | None


@dataclass(frozen=True, slots=True)
class Volumes:
    """What a disk is divided into: `label` as in `Table`, `remarks` on what could not be told."""

    label: str
    sector: int
    found: tuple[Volume, ...]
    remarks: tuple[str, ...]


def read_volumes(directory: str, size: int) -> Volumes:
    """Look at the VDI of `size` bytes whose files are in `directory`. Blocks. Raises ProgramError."""
    disk = os.path.join(directory, "disk.raw")
    _check_readable(disk)
    table = read_table(disk, size)
    remarks: list[str] = []
    if not table.label:
        found = _filesystem(disk, remarks, "the disk")
        whole = Volume(None, 0, size, "", "", "", "", "disk.raw", found)
        return Volumes("", table.sector, (whole,), tuple(remarks))
    names = _type_names(table.label)
    volumes = []
    for each in table.partitions:
        file = f"partitions/{each.number}.raw"
        filesystem = None
        if not table.is_container(each):
            filesystem = _filesystem(os.path.join(directory, file), remarks, f"partition {each.number}")
        volumes.append(
            Volume(
                each.number,
                each.offset,
                each.length,
                each.type,
                names.get(each.type, each.type),
                each.name,
                each.uuid,
                file,
                filesystem,
            )
        )
    return Volumes(table.label, table.sector, tuple(volumes), tuple(remarks))


def _type_names(label: str) -> dict[str, str]:
    """What sfdisk calls the types of partitions in words, by GUID or number."""
    ended = run_program(["sfdisk", "--list-types", "--label", label], seconds=_SECONDS)
    rows = [line.split(None, 1) for line in ended.output.decode("utf-8", "replace").splitlines()]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def _filesystem(file: str, remarks: list[str], what: str) -> Filesystem | None:
    try:
        _check_readable(file)
        ended = run_program(
            ["blkid", "--probe", "--no-part-details", "--output", "udev", file],
            seconds=_SECONDS,
            memory=PARSER_MEMORY,
        )
        # blkid of util-linux 2.41 doesn't tell several from nothing.
        if ended.code == _AMBIGUOUS or (ended.code == _NOTHING_FOUND and not ended.messages):
            return _several(file)
    except ProgramError as error:
        if error.errno == errno.ETIMEDOUT:
            raise  # The others would hang as well.
        remarks.append(f"{what}: {error.strerror}")
        return None
    if ended.code:
        remarks.append(f"{what}: {ended.complaint}")
        return None
    said = _said(ended)
    if "ID_FS_TYPE" not in said:
        return None
    size = said.get("ID_FS_SIZE", "")
    return Filesystem(
        said["ID_FS_TYPE"],
        said.get("ID_FS_USAGE", ""),
        said.get("ID_FS_LABEL_ENC", ""),
        said.get("ID_FS_UUID_ENC", ""),
        int(size) if size.isdigit() else None,
    )


def _check_readable(file: str) -> None:
    """ProgramError where blkid would only say that it finds nothing."""
    ended = run_program(
        ["dd", "status=none", f"if={file}", "of=/dev/null", "bs=64K", "count=1"], seconds=_SECONDS
    )
    if ended.code:
        words = ended.complaint.rpartition(": ")[2]
        raise ProgramError(errno.EBUSY if words == os.strerror(errno.EBUSY) else errno.EIO, words)


def _said(ended: Ended) -> dict[str, str]:
    r"""Lines NAME=VALUE; in what could be anything blkid writes `\xNN` for a byte."""
    found = {}
    for line in ended.output.splitlines():
        name, _, value = line.partition(b"=")
        plain = _ESCAPED.sub(lambda byte: bytes([int(byte[1], 16)]), value)
        found[name.decode("ascii", "replace")] = plain.decode("utf-8", "replace")
    return found


def _several(file: str) -> Filesystem | None:
    """All that it could be, if more than one; wipefs also names a single one that blkid takes for damaged."""
    ended = run_program(
        ["wipefs", "--json", "--noheadings", "--output", "TYPE,USAGE", file],
        seconds=_SECONDS,
        memory=PARSER_MEMORY,
    )
    document: dict[str, Any] = json.loads(ended.output.decode("utf-8", "replace") or "{}", strict=False)
    found = [each for each in document.get("signatures", ()) if each["usage"] != "partition-table"]
    kinds = sorted({str(each["type"]) for each in found})
    return Filesystem(", ".join(kinds), "several", "", "", None) if len(kinds) > 1 else None
