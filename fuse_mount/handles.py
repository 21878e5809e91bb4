"""What is behind the numbers by which the kernel calls open files and directories. Nothing is asked here.

The trap: a handle lasts longer than what is shown under its name. So a file keeps the node that it was opened
at, and a directory the entries that were in it.
"""

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuse_mount.disk_file import OpenFile
    from fuse_mount.tree import VdiNode
    from gateway.images.files import Buffer


class Document:
    """A record.json as it was when it was opened."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self.size = len(content)
        self.content = None

    async def read(self, offset: int, length: int) -> memoryview:
        """The bytes at `offset`."""
        return self._content[offset : offset + length]

    async def write(self, offset: int, data: "Buffer") -> int:
        """Never."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    async def flush(self) -> None:
        """There is nothing to do."""

    async def close(self) -> None:
        """There is nothing to do."""


@dataclass(slots=True)
class Handle:
    """An open file. `durable`: each write is answered only once it is (O_DSYNC, and O_SYNC, which has it)."""

    file: "OpenFile"
    node: "VdiNode"
    write: bool
    durable: bool


@dataclass(slots=True)
class Listing:
    """An open directory: what was in it when its reading began."""

    inode: int
    entries: list[tuple[bytes, int]]
    begun: bool = False
