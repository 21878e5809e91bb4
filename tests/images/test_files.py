import ctypes
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.images import files as files_module
from gateway.images.files import FILES, Buffer, FileCalls, identity_of, length_of, next_data, next_hole

MIB = 1 << 20


def stored(path: Path) -> int:
    return path.stat().st_blocks * 512


def opened(path: Path) -> int:
    return FILES.open(str(path), os.O_RDWR | os.O_CREAT)


def test_pwrite_writes_everything_even_if_the_kernel_takes_it_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:7], offset))
    fd = opened(tmp_path / "a")
    FILES.pwrite(fd, b"0123456789abcdefghij", 3)
    FILES.close(fd)
    assert (tmp_path / "a").read_bytes() == bytes(3) + b"0123456789abcdefghij"


def test_descriptors_are_not_inherited_and_files_are_private(tmp_path: Path) -> None:
    fd = opened(tmp_path / "a")
    assert not os.get_inheritable(fd)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert identity_of(fd) == ((tmp_path / "a").stat().st_dev, (tmp_path / "a").stat().st_ino)
    FILES.close(fd)


def test_punch_gives_space_back_and_keeps_the_length(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * MIB)
    fd = opened(path)
    FILES.punch(fd, 4096, 2 * MIB)
    FILES.punch(fd, 0, 0)
    FILES.close(fd)
    assert path.read_bytes() == b"x" * 4096 + bytes(MIB - 4096)
    assert stored(path) <= 8192


def test_punch_writes_zeroes_where_the_file_system_knows_no_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(files_module, "_fallocate", refuse)
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10000)
    fd = opened(path)
    FILES.punch(fd, 100, MIB)
    FILES.close(fd)
    assert path.read_bytes() == b"x" * 100 + bytes(9900)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 1 MiB full of data."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    file = tmp_path / "device"
    file.write_bytes(b"x" * MIB)
    command = ["losetup", "--find", "--show", "--nooverlap", str(file)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this machine makes no loop device: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.parametrize("offered", [True, False])
def test_punch_makes_zeroes_on_a_block_device(
    device: Path, monkeypatch: pytest.MonkeyPatch, offered: bool
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    if not offered:
        monkeypatch.setattr(files_module, "_fallocate", refuse)
    fd = os.open(device, os.O_RDWR)
    FILES.punch(fd, 8192, 4096)
    FILES.punch(fd, 65536 + 100, 1000)  # not made of sectors
    FILES.punch(fd, MIB - 4096, MIB)  # beyond the end
    FILES.copy_range(fd, 4096, fd, 16384, 8192)
    assert length_of(fd) == MIB
    os.fsync(fd)
    os.close(fd)
    expected = bytearray(b"x" * MIB)
    expected[8192:12288] = expected[20480:24576] = expected[-4096:] = bytes(4096)
    expected[65536 + 100 : 65536 + 1100] = bytes(1000)
    assert device.read_bytes() == expected


def test_other_failures_of_punch_are_raised(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        FILES.punch(fd, 0, 512)
    os.close(fd)


class Copying(FileCalls):
    def __init__(self) -> None:
        self.written = 0

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        self.written += len(data)
        super().pwrite(fd, data, offset)


@pytest.mark.parametrize("kernel", ["copies", "refuses", "says that it copied nothing"])
def test_copy_range_keeps_holes_and_makes_them_where_data_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    def copy_nothing(*_: object) -> int:
        if kernel == "refuses":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return 0

    if kernel != "copies":
        monkeypatch.setattr(os, "copy_file_range", copy_nothing)
    source, target = tmp_path / "s", tmp_path / "t"
    with source.open("wb") as file:
        file.seek(MIB)
        file.write(b"d" * MIB)
        file.truncate(4 * MIB)
    target.write_bytes(b"o" * 3 * MIB)
    source_fd, fd = opened(source), opened(target)
    calls = Copying()
    calls.copy_range(source_fd, 0, fd, 4096, 4 * MIB)
    assert target.read_bytes() == b"o" * 4096 + bytes(MIB) + b"d" * MIB + bytes(2 * MIB)
    assert stored(target) <= MIB + 16384
    assert calls.written == (0 if kernel == "copies" else MIB)
    os.close(source_fd)
    os.close(fd)


def test_copying_beyond_the_end_of_the_source_gives_zeroes(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"d" * 1000)
    source_fd, fd = opened(tmp_path / "s"), opened(tmp_path / "t")
    FILES.copy_range(source_fd, 500, fd, 0, 2000)
    assert (tmp_path / "t").read_bytes() == b"d" * 500 + bytes(1500)
    os.close(source_fd)
    os.close(fd)


def test_clone_shares_or_says_that_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"d" * 8192)
    source_fd, fd = opened(tmp_path / "s"), opened(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == (b"d" * 8192 if FILES.clone(source_fd, fd) else b"")
    os.close(source_fd)
    os.close(fd)


def test_holes_and_data_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.seek(MIB)
        file.write(b"d" * 4096)
        file.truncate(2 * MIB)
    fd = opened(path)
    assert next_data(fd, 0, 2 * MIB) == MIB
    assert next_data(fd, 0, 1000) == 1000
    assert next_hole(fd, MIB, 2 * MIB) == MIB + 4096
    assert next_data(fd, MIB + 4096, 2 * MIB) == 2 * MIB
    assert next_data(fd, 3 * MIB, 4 * MIB) == 4 * MIB
    assert next_hole(fd, 3 * MIB, 4 * MIB) == 3 * MIB
    os.close(fd)


def test_names_and_syncs(tmp_path: Path) -> None:
    fd = opened(tmp_path / "a")
    FILES.pwrite(fd, b"x", 0)
    FILES.start_writeback(fd, 0, 4096)
    FILES.datasync(fd)
    FILES.sync(fd)
    FILES.truncate(fd, 0)
    FILES.close(fd)
    FILES.mkdir(str(tmp_path / "d"))
    FILES.link(str(tmp_path / "a"), str(tmp_path / "b"))
    FILES.rename(str(tmp_path / "a"), str(tmp_path / "d" / "a"))
    FILES.unlink(str(tmp_path / "b"))
    FILES.sync_directory(str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("sync", "of_the_kernel"), [(FILES.datasync, "fdatasync"), (FILES.sync, "fsync")])
def test_what_a_failed_sync_has_not_written_is_not_believed_to_be_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: Callable[[int], None], of_the_kernel: str
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    forgotten: list[tuple[int, int, int, int]] = []
    fd = opened(tmp_path / "a")
    monkeypatch.setattr(os, "posix_fadvise", lambda *advice: forgotten.append(advice))
    sync(fd)
    assert not forgotten
    monkeypatch.setattr(os, of_the_kernel, fail)
    with pytest.raises(OSError, match="Input/output error"):
        sync(fd)
    assert forgotten == [(fd, 0, 0, os.POSIX_FADV_DONTNEED)]
    FILES.close(fd)
