"""What a flush answers while others write, grow the file, and hear from the kernel that data was lost."""

import builtins
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.images.vhd import writer
from gateway.images.vhd.create import create_dynamic
from tests.images.disks import open_leaf, pattern
from tests.images.watched_calls import Watched

MIB = 1 << 20
DATA = pattern(2 * MIB)


def test_what_is_written_while_a_flush_has_nothing_to_do_is_synced_by_the_next(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Watched()
    disk = open_leaf(image, writable=True, files=files)
    disk.pwrite(DATA, 0)
    disk.flush()
    written: list[bool] = []

    def while_it_looks(*arguments: Any) -> set[Any]:
        """In place of `set`: Python may let another thread run at any call."""
        if not written:
            written.append(True)
            beside = threading.Thread(target=disk.pwrite, args=(DATA[:4096], 0))
            beside.start()
            beside.join()
        return builtins.set(*arguments)

    monkeypatch.setattr(writer, "set", while_it_looks, raising=False)
    disk.flush()
    assert written
    before = files.syncs
    disk.flush()
    assert files.syncs == before + 1
    disk.close()


def test_a_flush_fails_when_the_kernel_tells_a_growth_of_lost_data(tmp_path: Path) -> None:
    image = tmp_path / "large.vhd"  # it grows more than once
    create_dynamic(str(image), 256 * MIB)
    syncing, grown = threading.Event(), threading.Event()

    class ToldOnce(Watched):
        """The kernel tells of a page that it could not write once, to whoever syncs first."""

        def datasync(self, fd: int) -> None:
            if threading.current_thread() is flusher:
                if not syncing.is_set():
                    syncing.set()
                    assert grown.wait(30)
            elif syncing.is_set() and not grown.is_set():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().datasync(fd)

    answers: list[object] = []

    def flush() -> None:
        try:
            disk.flush()
        except OSError as error:
            answers.append(error.errno)
        else:
            answers.append("durable")

    flusher = threading.Thread(target=flush)
    files = ToldOnce()
    disk = open_leaf(image, writable=True, files=files)
    disk.pwrite(DATA[:4096], 0)
    end = image.stat().st_size
    flusher.start()
    assert syncing.wait(30)
    with pytest.raises(OSError, match="Input/output error"):
        for offset in range(0, disk.size, 2 * MIB):
            disk.pwrite(DATA[:512], offset)
    assert image.stat().st_size > end
    files.calls.clear()
    grown.set()
    flusher.join()
    assert answers == [errno.EIO]
    assert not files.calls[1:]  # nothing says that the data is there
    with pytest.raises(OSError, match="an earlier sync failed"):
        disk.close()
