"""What tests of mounts do with their files: list them, and hold one open."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@contextmanager
def reading(file: Path) -> Iterator[int]:
    """A descriptor, closed also when its mount has died."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.pread(fd, 1, 0)
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)
