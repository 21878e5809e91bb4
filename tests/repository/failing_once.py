"""File calls of which one fails, once: what was begun has to be finished or undone by whoever began it."""

import errno
import os

from gateway.images.files import Buffer, FileCalls


class FailingOnce(FileCalls):
    """The call that changes something and has this number fails, as on a full disk; all others are done."""

    def __init__(self, left: float = float("inf"), error: int = errno.ENOSPC) -> None:
        self.left = left
        self._error = error

    def fail(self) -> None:
        """What happens instead of the call. Raises OSError."""
        raise OSError(self._error, os.strerror(self._error))

    def _count(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.fail()

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        self._count()
        return super().open(path, flags, mode)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        self._count()
        super().pwrite(fd, data, offset)

    def sync(self, fd: int) -> None:
        self._count()
        super().sync(fd)

    def datasync(self, fd: int) -> None:
        self._count()
        super().datasync(fd)

    def link(self, source: str, target: str) -> None:
        self._count()
        super().link(source, target)

    def rename(self, source: str, target: str) -> None:
        self._count()
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        self._count()
        super().unlink(path)

    def sync_directory(self, path: str) -> None:
        self._count()
        super().sync_directory(path)
