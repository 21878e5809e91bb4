"""A VHD merged into the one it stands on, for tests: wholly, or so many blocks of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.images.files import FILES, FileCalls
from gateway.images.vhd.image import VhdFile, open_vhd
from gateway.images.vhd.merge import Merge


def never() -> bool:
    return False


def stop_after(blocks: int) -> Callable[[], bool]:
    calls = iter([False] * blocks)
    return lambda: next(calls, True)


@contextmanager
def opened(child: Path, parent: Path, files: FileCalls = FILES) -> Iterator[tuple[VhdFile, VhdFile]]:
    child_fd = os.open(child, os.O_RDONLY)
    parent_fd = files.open(str(parent), os.O_RDWR)
    try:
        yield open_vhd(child_fd, str(child)), open_vhd(parent_fd, str(parent))
    finally:
        files.close(parent_fd)
        os.close(child_fd)


def merge(child: Path, parent: Path, files: FileCalls = FILES) -> None:
    with opened(child, parent, files) as (upper, lower):
        work = Merge(upper, lower, files=files)
        assert work.copy_some(never)
        work.finish()
        assert work.done == work.total
