"""Partition tables, as sfdisk of util-linux reads them: of a file, or of a disk's two ends in a memfd.

There is no parser of tables here; what sfdisk says is taken, in bytes. The trap: a table isn't all in the
first and the last MiB. The logical partitions of an MBR are a chain of sectors all over the disk, each known
only from the one before. Which sectors sfdisk wanted, libfdisk tells when LIBFDISK_DEBUG is set; they are put
into the memfd, and it runs again until it wants no more. A libfdisk that is silent shows what those show.

sfdisk of Debian 12 knows sectors of 512 bytes alone; a table for sectors of 4 KiB looks to it like the MBR
that protects a GPT, and is then read by partx.
"""

import errno
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from fuse_mount.programs import PARSER_MEMORY, Ended, ProgramError, run_program
from fuse_mount.questions import Questions

EDGE: Final = 1 << 20
_SECONDS: Final = 10.0
# libfdisk reads at most 60 partitions of an MBR; four are no logical ones.
_MOST_ROUNDS: Final = 60
_MOST_CACHED: Final = 4096
_WANTED: Final = re.compile(rb"DOS: reading EBR \d+: offset=(\d+)")
_NO_TABLE: Final = b"does not contain a recognized partition table"
_PROTECTIVE: Final = "ee"
_EXTENDED: Final = ("5", "f", "85")
_LARGE_SECTOR: Final = 4096
_PAIR: Final = re.compile(r'([A-Z]+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition: `offset` and `length` in bytes of the disk.

    `type` is a GUID in capitals, or hexadecimal digits. `name` and `uuid` are empty where there are none; an
    MBR has no names.
    """

    number: int
    offset: int
    length: int
    type: str
    name: str
    uuid: str


@dataclass(frozen=True, slots=True)
class Table:
    """A partition table: `label` is sfdisk's name of its kind, "" if there is none; `sector` in bytes."""

    label: str = ""
    sector: int = 512
    partitions: tuple[Partition, ...] = ()

    def is_container(self, partition: Partition) -> bool:
        """Whether a partition is there for nothing but the logical partitions of an MBR in it."""
        return self.label == "dos" and partition.type in _EXTENDED


def read_table(path: str, size: int, descriptor: int | None = None, wanted: set[int] | None = None) -> Table:
    """The partition table of a file of `size` bytes. Blocks.

    `path` names `descriptor`, if one is given. The offsets in bytes of the sectors that lead from one logical
    partition to the next are added to `wanted`. Raises ProgramError.
    """
    if size < 1024:
        return Table()
    passed = () if descriptor is None else (descriptor,)
    ended = run_program(
        ["sfdisk", "--quiet", "--json", path],
        seconds=_SECONDS,
        memory=PARSER_MEMORY,
        descriptors=passed,
        environment={"LIBFDISK_DEBUG": "label"},
    )
    if wanted is not None:
        wanted.update(512 * int(sector) for sector in _WANTED.findall(ended.messages))
    if ended.code:
        if _NO_TABLE in ended.messages:
            return Table()
        raise ProgramError(errno.EIO, f"sfdisk: {ended.complaint}")
    table = _from_sfdisk(ended, size)
    if table.label == "dos" and any(each.type == _PROTECTIVE for each in table.partitions):
        large = _large_sectors(path, size, passed)
        # What protects a table is no partition.
        kept = tuple(each for each in table.partitions if each.type != _PROTECTIVE)
        return large or (Table("dos", table.sector, kept) if kept else Table())
    return table


def _from_sfdisk(ended: Ended, size: int) -> Table:
    """What `sfdisk --json` has printed. Names in it may be no UTF-8."""
    try:
        document: dict[str, Any] = json.loads(ended.output.decode("utf-8", "replace"), strict=False)
        found: dict[str, Any] = document["partitiontable"]
        device, sector = str(found["device"]), int(found.get("sectorsize", 512))
        rows = [
            _within(
                number=_number(str(each["node"]), device),
                offset=int(each["start"]) * sector,
                length=int(each["size"]) * sector,
                size=size,
                type=str(each.get("type", "")),
                name=str(each.get("name", "")),
                uuid=str(each.get("uuid", "")),
            )
            for each in found.get("partitions", ())
        ]
        return Table(str(found["label"]), sector, tuple(each for each in rows if each is not None))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProgramError(errno.EIO, f"sfdisk's answer isn't understood: {error!r}") from error


def _number(node: str, device: str) -> int:
    """The number of a partition, the end of its name, as in /dev/sda1 or /proc/self/fd/3p1."""
    found = re.search(r"\d+$", node.removeprefix(device))
    if found is None:
        raise ValueError(node)
    return int(found[0])


def _within(*, number: int, offset: int, length: int, size: int, **words: str) -> Partition | None:
    """A partition, cut to the disk; None if nothing of it lies there."""
    length = min(length, size - offset)
    return Partition(number, offset, length, **words) if length > 0 and offset >= 0 else None


def _large_sectors(path: str, size: int, descriptors: tuple[int, ...]) -> Table | None:
    """The GPT of a disk with sectors of 4 KiB, if there is one."""
    ended = run_program(
        [
            "partx",
            "--pairs",
            "--output",
            "NR,START,SECTORS,TYPE,NAME,UUID,SCHEME",
            "--sector-size",
            str(_LARGE_SECTOR),
            path,
        ],
        seconds=_SECONDS,
        memory=PARSER_MEMORY,
        descriptors=descriptors,
    )
    rows = [
        {key: _plain(value) for key, value in _PAIR.findall(line)}
        for line in ended.output.decode("utf-8", "replace").splitlines()
    ]
    found = []
    for row in rows:
        if row.get("SCHEME") != "gpt":
            return None
        # partx counts in sectors of 512 bytes, whatever the disk's are.
        each = _within(
            number=int(row["NR"]),
            offset=int(row["START"]) * 512,
            length=int(row["SECTORS"]) * 512,
            size=size,
            type=row["TYPE"].upper(),
            name=row["NAME"],
            uuid=row["UUID"].upper(),
        )
        if each is not None:
            found.append(each)
    return Table("gpt", _LARGE_SECTOR, tuple(found)) if rows else None


def _plain(value: str) -> str:
    r"""A value of partx without its escapes, each `\xNN` a byte."""
    data = re.sub(
        rb"\\x([0-9a-fA-F]{2})", lambda found: bytes([int(found[1], 16)]), value.encode("utf-8", "replace")
    )
    return data.decode("utf-8", "replace")


def read_partitions(
    first: bytes, last: bytes, size: int, read: Callable[[int, int], bytes] | None = None
) -> tuple[Partition, ...]:
    """The partitions of a disk of `size` bytes that begins with `first` and ends with `last`. Blocks.

    `read(offset, length)` fetches the further sectors that the table lies in; without it, logical partitions
    are told as far as `first` and `last` tell them. Raises ProgramError, and what `read` raises.
    """
    descriptor = os.memfd_create("disk", os.MFD_CLOEXEC)
    try:
        os.truncate(descriptor, size)
        _write(descriptor, first[:size], 0)
        _write(descriptor, last, max(0, size - len(last)))
        known: set[int] = set()
        deadline = time.monotonic() + _SECONDS
        path = f"/proc/self/fd/{descriptor}"
        for _ in range(_MOST_ROUNDS):
            wanted: set[int] = set()
            table = read_table(path, size, descriptor, wanted)
            missing = {offset for offset in wanted if len(first) <= offset <= size - len(last) - 512} - known
            if read is None or not missing or time.monotonic() > deadline:
                return table.partitions
            for offset in missing:
                _write(descriptor, read(offset, 512), offset)
            known |= missing
        return table.partitions
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class OpenDisk(Protocol):
    """A disk that is open for reading; a memoryview that it returns is good until the next await."""

    @property
    def size(self) -> int:
        """Bytes."""

    async def read(self, offset: int, length: int) -> bytes | memoryview:
        """Bytes of the disk; short or empty at its end."""

    async def close(self) -> None:
        """End the lease."""


class Described(Protocol):
    """What is known of a VDI's content."""

    @property
    def content_id(self) -> str:
        """Another one whenever the content may be another one."""


class Descriptions(Protocol):
    """Tells which content a VDI has."""

    async def describe(self, vdi: str) -> Described:
        """May be remembered from before."""

    def forget(self, vdi: str) -> None:
        """Ask the gateway at the next question."""


class Partitions:
    """The partitions of VDIs, read under a lease that ends at once and remembered by the content's id."""

    def __init__(
        self,
        open_disk: Callable[[str], Awaitable[OpenDisk]],
        descriptions: Descriptions,
        held: Mapping[str, str],
        *,
        most_cached: int = _MOST_CACHED,
    ) -> None:
        """`open_disk` opens a VDI for reading; `held` tells which are open here, "writing" or otherwise."""
        self._open_disk = open_disk
        self._descriptions = descriptions
        self._held = held
        self._most_cached = most_cached
        self._cached: OrderedDict[str, tuple[Partition, ...]] = OrderedDict()
        self._questions: Final = Questions(self._answer)
        # Threads that wait for sfdisk; each has a memfd of two MiB at most.
        self._limiter = trio.CapacityLimiter(4)

    async def of(self, vdi: str) -> tuple[Partition, ...]:
        """The partitions of a VDI; none if it has no table.

        Raises what opening and reading the disk raises, and ProgramError, an OSError.
        """
        return await self._questions.answer(vdi)

    async def _answer(self, vdi: str) -> tuple[Partition, ...]:
        # Whoever writes the disk here may write the table, and its content has a new id only at the end.
        if self._held.get(vdi) != "writing":
            known = self._cached.get((await self._descriptions.describe(vdi)).content_id)
            if known is not None:
                return known
        disk = await self._open_disk(vdi)
        try:
            found = await self._read(disk)
            if self._held.get(vdi) != "writing":
                # Under the lease nobody writes, so what the gateway says now is what was read.
                self._descriptions.forget(vdi)
                self._remember((await self._descriptions.describe(vdi)).content_id, found)
        finally:
            with trio.CancelScope(shield=True):
                await disk.close()
        return found

    async def _read(self, disk: OpenDisk) -> tuple[Partition, ...]:
        first = await _bytes(disk, 0, min(EDGE, disk.size))
        last = await _bytes(disk, max(0, disk.size - EDGE), min(EDGE, disk.size))

        def further(offset: int, length: int) -> bytes:
            return trio.from_thread.run(_bytes, disk, offset, length)

        return await trio.to_thread.run_sync(
            read_partitions, first, last, disk.size, further, limiter=self._limiter
        )

    def _remember(self, content: str, found: tuple[Partition, ...]) -> None:
        self._cached[content] = found
        while len(self._cached) > self._most_cached:
            self._cached.popitem(last=False)


async def _bytes(disk: OpenDisk, offset: int, length: int) -> bytes:
    """That many bytes of a disk; zeroes for what it ends before."""
    data = bytearray()
    while len(data) < length:
        piece = await disk.read(offset + len(data), length - len(data))
        if not piece:
            break
        data += piece
    return bytes(data.ljust(length, b"\0"))
