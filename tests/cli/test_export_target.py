"""Two exports to one file: the second must not touch what the first has finished; and syncs that fail."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.cli.export_target import FileTarget
from gateway.cli.output import CommandError


def begun(path: Path) -> FileTarget:
    target = FileTarget(str(path), "vdi")
    target.begin("vdi", '"tag"', 4)
    return target


def test_an_export_that_ends_while_another_begins_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.raw"
    first = begun(path)
    lock = fcntl.flock

    def after_the_first(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.write(bytearray(b"data"), 4)
        first.finish()
        first.close()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", after_the_first)
    with pytest.raises(CommandError, match="has ended at this moment"):
        begun(path)
    assert path.read_bytes() == b"data"
    assert os.listdir(tmp_path) == ["disk.raw"]


def test_an_export_that_is_given_up_while_another_begins_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.raw"
    first = begun(path)
    lock = fcntl.flock

    def after_the_first(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.close()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", after_the_first)
    with pytest.raises(CommandError):
        begun(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ends", [FileTarget.finish, FileTarget.keep])
def test_after_a_sync_that_failed_nothing_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: Callable[[FileTarget], object]
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    target = begun(tmp_path / "disk.raw")
    target.write(bytearray(b"da"), 2)
    target.keep()
    target.write(bytearray(b"ta"), 2)
    with monkeypatch.context() as kernel:
        kernel.setattr(os, "fsync", fail)
        kernel.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            ends(target)
    # The kernel has told it, and would say now that all is there.
    assert target.keep() == ""
    target.close()
    assert os.listdir(tmp_path) == []
