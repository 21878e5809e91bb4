"""What a flush answers while others write, grow the file, and hear from the kernel that data was lost."""

import builtins
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.images.files import Buffer
from gateway.images.vhd import writer
from gateway.images.vhd.create import create_dynamic
from tests.images.damaged import Vhd
from tests.images.disks import entries, libvhdi_reads, open_leaf, pattern, put, read
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


def test_what_changes_a_full_block_is_synced_by_the_next_flush(image: Path) -> None:
    put(image, (0, DATA))
    files = Watched()
    disk = open_leaf(image, writable=True, files=files)
    read(disk, 0, 512)  # now the block is known to be full
    disk.pwrite(DATA[:4096], 0)
    disk.flush()
    assert files.syncs == 1
    disk.zero(0, 4096, trim=True)
    disk.flush()
    assert files.syncs == 2
    disk.close()


@pytest.mark.parametrize("published", [True, False])
def test_metadata_that_is_written_on_the_way_follows_its_data(
    image: Path, monkeypatch: pytest.MonkeyPatch, *, published: bool
) -> None:
    monkeypatch.setattr(writer, "_UNSAVED_BLOCKS", 1)
    files = Watched()
    disk = open_leaf(image, writable=True, files=files, published=published)
    disk.pwrite(DATA[:4096], 0)
    *_, block, data, bitmap, entry = [call for call in files.calls if call[0] == "pwrite"]
    sync = [("datasync", 0, 0)] * published
    assert files.calls[files.calls.index(block) :] == [block, data, *sync, bitmap, entry, *sync]
    disk.flush()
    assert files.calls[-1] == ("datasync", 0, 0)
    disk.close()


def test_a_flush_while_the_first_data_of_a_block_is_written_forgets_no_block(image: Path) -> None:
    class Flushing(Watched):
        def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
            if data == DATA:
                disk.flush()
            super().pwrite(fd, data, offset)

    disk = open_leaf(image, writable=True, files=Flushing())
    disk.pwrite(DATA, 0)
    disk.close()
    assert libvhdi_reads([image])[: len(DATA)] == DATA


def test_a_flush_tells_of_no_sector_that_was_written_after_its_first_sync(image: Path) -> None:
    class WritingOn(Watched):
        def datasync(self, fd: int) -> None:
            super().datasync(fd)
            if self.syncs == 2:  # the first was that of the file's growth
                disk.pwrite(DATA[:512], 4096)

    disk = open_leaf(image, writable=True, files=WritingOn())
    disk.pwrite(DATA[:512], 0)
    disk.flush()
    assert Vhd(image).get(entries(image)[0] * 512, 2) == b"\x80\0"
    disk.flush()
    assert Vhd(image).get(entries(image)[0] * 512, 2) == b"\x80\x80"
    disk.close()


def test_a_flush_that_could_not_write_the_metadata_fails_for_good(image: Path) -> None:
    class Failing(Watched):
        failures = 0

        def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
            if self.syncs == 2 and not self.failures:
                self.failures += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().pwrite(fd, data, offset)

    disk = open_leaf(image, writable=True, files=Failing())
    disk.pwrite(DATA[:512], 0)
    for end in (disk.flush, disk.flush, disk.close):
        with pytest.raises(OSError, match="Input/output error"):
            end()


@pytest.mark.parametrize(("call", "code"), [("pwrite", errno.EIO), ("datasync", errno.ENOSPC)])
def test_a_close_that_cannot_cut_the_file_says_so(
    image: Path, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Watched()
    disk = open_leaf(image, writable=True, files=files)
    disk.pwrite(DATA, 0)
    disk.flush()

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, call, fail)
    with pytest.raises(OSError, match=os.strerror(code)):
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
    with pytest.raises(OSError, match=r"an earlier (write or )?sync failed"):
        disk.close()
