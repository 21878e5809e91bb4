"""Disks with partition tables that sfdisk or fdisk has made, and what is read of them."""

import json
import subprocess
from pathlib import Path

from fuse_mount.partitions import EDGE, Partition, read_partitions

MIB = 1 << 20
GIB = 1 << 30


def made(path: Path, size: int, script: str, *, program: str = "sfdisk") -> Path:
    """A sparse file on which sfdisk has made a table."""
    with path.open("wb") as file:
        file.truncate(size)
    arguments = ["sfdisk", "-q", "--wipe", "never", str(path)]
    if program == "fdisk":
        arguments = ["fdisk", "-b", "4096", str(path)]
    done = subprocess.run(arguments, input=script.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


def told(path: Path) -> list[tuple[int, int, int]]:
    """Number, offset and length of what sfdisk finds when it has the whole disk before it."""
    done = subprocess.run(["sfdisk", "--json", str(path)], capture_output=True, check=True)
    rows = json.loads(done.stdout)["partitiontable"]["partitions"]
    return [
        (
            int(each["node"].removeprefix(str(path)).removeprefix("p")),
            each["start"] * 512,
            each["size"] * 512,
        )
        for each in rows
    ]


def places(found: tuple[Partition, ...]) -> list[tuple[int, int, int]]:
    return [(each.number, each.offset, each.length) for each in found]


class Reads:
    """The two ends of a disk, and a count of what is read beside them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.further: list[int] = []

    def at(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def read(self, offset: int, length: int) -> bytes:
        self.further.append(offset)
        return self.at(offset, length)

    def partitions(self, *, further: bool = True) -> tuple[Partition, ...]:
        edge = min(EDGE, self.size)
        return read_partitions(
            self.at(0, edge),
            self.at(self.size - edge, edge),
            self.size,
            self.read if further else None,
        )
