"""File calls that are noted, for tests of what is written, in which order and with how many syncs.

What is copied from file to file, and hints to the kernel, are not among them.
"""

import errno
import os

from gateway.images.files import Buffer, FileCalls


class Watched(FileCalls):
    """`calls` are (name, offset, length), or (name, size, 0) of a truncation; override `seen` to look on."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.fail_sync = False

    @property
    def syncs(self) -> int:
        return sum(call == ("datasync", 0, 0) for call in self.calls)

    def seen(self) -> None:
        """Called after each call."""

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        super().pwrite(fd, data, offset)
        self.calls.append(("pwrite", offset, len(data)))
        self.seen()

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self.calls.append(("truncate", size, 0))
        self.seen()

    def punch(self, fd: int, offset: int, length: int) -> None:
        super().punch(fd, offset, length)
        self.calls.append(("punch", offset, length))
        self.seen()

    def datasync(self, fd: int) -> None:
        if self.fail_sync:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().datasync(fd)
        self.calls.append(("datasync", 0, 0))
        self.seen()
