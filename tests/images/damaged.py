"""A VHD whose structures tests change by hand, with checksums that are right again where there are any.

A negative offset counts from the end of the file, where the footer is.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gateway.images.vhd.check import CheckReport, ProblemKind
from gateway.images.vhd.format import DynamicHeader
from gateway.images.vhd.image import VhdFile, open_vhd

MEBIBYTE = 1 << 20
SIZE = 6 * MEBIBYTE  # three blocks
BLOCK = 2 * MEBIBYTE


def kinds(report: CheckReport) -> set[ProblemKind]:
    return {problem.kind for problem in report.problems}


class Vhd:
    """A file that is damaged by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def length(self) -> int:
        return self.path.stat().st_size

    def image(self) -> VhdFile:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            image = open_vhd(fd, str(self.path))
            if image.header is not None:
                len(image.bat)
                image.metadata  # noqa: B018 - read while the file is open
            return image
        finally:
            os.close(fd)

    def header(self) -> DynamicHeader:
        header = self.image().header
        assert header is not None
        return header

    def put(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as out:
            out.seek(offset if offset >= 0 else self.length + offset)
            out.write(data)

    def get(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as source:
            source.seek(offset if offset >= 0 else self.length + offset)
            return source.read(length)

    def truncate(self, size: int) -> None:
        os.truncate(self.path, size)

    def set_entry(self, block: int, entry: int) -> None:
        self.put(self.header().table_offset + 4 * block, struct.pack(">I", entry))

    def set_footers(self, **fields: object) -> None:
        footer = replace(self.image().footer, **fields)  # type: ignore[arg-type]
        if self.image().header is not None:
            self.put(0, footer.pack())
        self.put(-512, footer.pack())

    def set_header(self, **fields: object) -> None:
        header = replace(self.header(), **fields)  # type: ignore[arg-type]
        self.put(512, header.pack())


Damage = Callable[[Vhd], None]


def damage_footer(vhd: Vhd) -> None:
    vhd.put(-512 + 48, b"\xff")


def damage_header(vhd: Vhd) -> None:
    vhd.put(512 + 100, b"\xff")
