"""Requests that begin or end within a sector, beside others that write or trim the whole of it: what only the
others cover is theirs, whoever is first.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.images.disk import Disk
from gateway.images.files import Buffer
from gateway.images.vhd.format import SECTOR
from tests.images.disks import make_child, open_leaf, put, read
from tests.images.watched_calls import Watched

MIB = 1 << 20
OLD, NEW, EDGE = b"o" * SECTOR, b"n" * SECTOR, b"e" * 100

Beside = Callable[[Disk], None]


def write_all(disk: Disk) -> None:
    disk.pwrite(NEW, 0)


def trim_all(disk: Disk) -> None:
    disk.zero(0, SECTOR, trim=True)


class Meeting(Watched):
    """Just before the edge is written, another thread begins; here is waited until it has ended or waits."""

    def __init__(self, beside: Beside) -> None:
        super().__init__()
        self.come = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self._beside = beside
        self._edge = threading.current_thread()
        self.disk: Disk | None = None

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        in_edge = EDGE in bytes(data) and threading.current_thread() is self._edge
        if in_edge and self.thread.ident is None:
            self.thread.start()
            assert self.come.wait(30)
        super().pwrite(fd, data, offset)

    def _run(self) -> None:
        assert self.disk is not None
        try:
            self._beside(self.disk)
        finally:
            self.come.set()


@pytest.mark.parametrize("stored", [True, False], ids=["the leaf has it", "a parent has it"])
@pytest.mark.parametrize("beside", [write_all, trim_all])
def test_an_edge_does_not_undo_what_others_have_written_to_its_sector(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: Beside, stored: bool
) -> None:
    put(image, (0, OLD))
    child = tmp_path / "child.vhd"
    make_child(child, image)
    files = Meeting(beside)
    disk = open_leaf(image if stored else child, writable=True, files=files)
    files.disk = disk
    _tell_who_waits(monkeypatch, disk, files)
    disk.pwrite(EDGE, 200)
    files.thread.join()
    rest = NEW if beside is write_all else bytes(SECTOR)
    found = read(disk, 0, SECTOR)
    assert found[:200] + found[300:] == rest[:200] + rest[300:]
    assert found[200:300] in (EDGE, rest[200:300])
    disk.close()


def test_of_two_edges_in_one_sector_none_undoes_the_other(image: Path) -> None:
    class Meeting(Watched):
        def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
            if beside.ident is None:
                beside.start()
                beside.join(timeout=0.3)  # who does not wait is done by then
            super().pwrite(fd, data, offset)

    put(image, (0, OLD))
    disk = open_leaf(image, writable=True, files=Meeting())
    beside = threading.Thread(target=disk.pwrite, args=(EDGE, 0))
    disk.pwrite(EDGE, 200)
    beside.join()
    assert read(disk, 0, SECTOR) == EDGE + OLD[:100] + EDGE + OLD[:212]
    disk.close()


def _tell_who_waits(monkeypatch: pytest.MonkeyPatch, disk: Any, files: Meeting) -> None:
    turns = disk._turns
    enter: Callable[[], int] = turns.enter

    def told() -> int:
        # Who waits here goes on when the edge is written; others have nothing to wait for.
        if threading.current_thread() is files.thread and turns._alone:
            files.come.set()
        return enter()

    monkeypatch.setattr(turns, "enter", told)
