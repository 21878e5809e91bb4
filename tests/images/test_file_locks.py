"""Who may lock an image beside whom, here, in another process and in QEMU, and when a lock ends."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.images.file_locks import FileInUse, FileUse, lock_file, lock_files, lock_wholly
from tests.images.other_process import OtherProcess

Opener = Callable[[int], int]

MEBIBYTE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(b"\xa5" * MEBIBYTE)
    return path


@pytest.fixture
def open_image(image: Path) -> Iterator[Opener]:
    opened: list[int] = []

    def opener(flags: int = os.O_RDONLY) -> int:
        opened.append(os.open(image, flags))
        return opened[-1]

    yield opener
    for fd in opened:
        os.close(fd)


def may(use: FileUse, image: Path) -> bool:
    fd = os.open(image, os.O_RDONLY)
    try:
        lock_file(fd, use, str(image))
    except FileInUse:
        return False
    finally:
        os.close(fd)
    return True


def qemu_io(image: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["qemu-io", "-f", "raw", *options, str(image)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def other() -> Iterator[OtherProcess]:
    process = OtherProcess()
    yield process
    process.end()


@pytest.mark.parametrize("second", FileUse)
@pytest.mark.parametrize("first", FileUse)
def test_only_readers_share_a_file(
    image: Path, open_image: Opener, other: OtherProcess, first: FileUse, second: FileUse
) -> None:
    lock_file(open_image(os.O_RDONLY), first, str(image))
    both_read = first is second is FileUse.READ
    assert may(second, image) == both_read
    assert other.ask(second, image) == ("locked" if both_read else "in use")


def test_the_refusal_names_the_file_and_the_reason(image: Path, open_image: Opener) -> None:
    lock_file(open_image(os.O_RDONLY), FileUse.WRITE, str(image))
    with pytest.raises(FileInUse, match="another program") as caught:
        lock_file(open_image(os.O_RDONLY), FileUse.READ, str(image))
    assert caught.value.filename == str(image)


def test_a_read_only_descriptor_can_take_the_writers_lock(image: Path, open_image: Opener) -> None:
    lock_file(open_image(os.O_RDONLY), FileUse.WRITE, str(image))


def test_while_one_of_several_files_is_in_use_no_byte_of_the_others_is_locked(
    image: Path, open_image: Opener, tmp_path: Path
) -> None:
    free = tmp_path / "free.raw"
    free.touch()
    fd = os.open(free, os.O_RDONLY)
    lock_file(open_image(os.O_RDONLY), FileUse.READ, str(image))
    wanted = [(fd, FileUse.WRITE, str(free)), (open_image(os.O_RDONLY), FileUse.WRITE, str(image))]
    with pytest.raises(FileInUse, match="lets nobody write it") as caught:
        lock_files(wanted)
    assert caught.value.filename == str(image)
    assert may(FileUse.WRITE, free), "its descriptor is open still"
    lock_files((fd, FileUse.READ, path) for fd, _, path in wanted)
    assert not may(FileUse.WRITE, free)
    os.close(fd)


def test_a_refused_descriptor_leaves_nothing_behind_once_closed(image: Path) -> None:
    reader = os.open(image, os.O_RDONLY)
    lock_file(reader, FileUse.READ, str(image))
    assert not may(FileUse.WRITE, image)
    os.close(reader)
    assert may(FileUse.WRITE, image)


def test_closing_ends_the_lock(image: Path, open_image: Opener) -> None:
    fd = os.open(image, os.O_RDONLY)
    lock_file(fd, FileUse.WRITE, str(image))
    os.close(fd)
    lock_file(open_image(os.O_RDONLY), FileUse.WRITE, str(image))


def test_closing_another_descriptor_of_the_same_file_keeps_the_lock(
    image: Path, open_image: Opener, other: OtherProcess
) -> None:
    lock_file(open_image(os.O_RDONLY), FileUse.WRITE, str(image))
    os.close(os.open(image, os.O_RDONLY))
    assert other.ask(FileUse.READ, image) == "in use"


def test_the_lock_lives_until_the_last_duplicate_is_closed(
    image: Path, open_image: Opener, other: OtherProcess
) -> None:
    fd = os.open(image, os.O_RDONLY)
    lock_file(fd, FileUse.WRITE, str(image))
    duplicate = os.dup(fd)
    os.close(fd)
    assert other.ask(FileUse.READ, image) == "in use"
    os.close(duplicate)
    assert other.ask(FileUse.READ, image) == "locked"


def test_the_end_of_a_process_ends_its_lock(image: Path, other: OtherProcess) -> None:
    assert other.ask(FileUse.WRITE, image) == "locked"
    assert not may(FileUse.READ, image)
    other.end()
    assert may(FileUse.WRITE, image)


def test_a_lock_outlives_its_taker_when_the_descriptor_was_passed_on(
    image: Path, other: OtherProcess
) -> None:
    program = """
import os, socket, sys
from gateway.images.file_locks import FileUse, lock_file
fd = os.open(sys.argv[1], os.O_RDONLY)
lock_file(fd, FileUse.WRITE, sys.argv[1])
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"x"], [fd])
"""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            subprocess.run(
                [sys.executable, "-c", program, str(image), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                check=True,
                timeout=30,
            )
        _, (passed,), _, _ = socket.recv_fds(ours, 1, 1)
    assert other.ask(FileUse.READ, image) == "in use"
    os.close(passed)
    assert other.ask(FileUse.READ, image) == "locked"


def test_an_exclusive_lock_of_another_kind_is_respected(image: Path, open_image: Opener) -> None:
    lock_wholly(open_image(os.O_RDWR))
    with pytest.raises(FileInUse, match="exclusively"):
        lock_file(open_image(os.O_RDONLY), FileUse.READ, str(image))


class TestQemu:
    def test_can_read_beside_our_reader(self, image: Path, open_image: Opener) -> None:
        lock_file(open_image(os.O_RDONLY), FileUse.READ, str(image))
        done = qemu_io(image, "-r", "-c", "read -P 0xa5 0 64k")
        assert (done.returncode, done.stderr) == (0, "")

    def test_cannot_write_beside_our_reader(self, image: Path, open_image: Opener) -> None:
        lock_file(open_image(os.O_RDONLY), FileUse.READ, str(image))
        done = qemu_io(image, "-c", "write -P 1 0 64k")
        assert done.returncode != 0
        assert "lock" in done.stderr
        assert image.read_bytes() == b"\xa5" * MEBIBYTE

    @pytest.mark.parametrize("options", [("-r", "-c", "read 0 64k"), ("-c", "write -P 1 0 64k")])
    def test_can_do_nothing_beside_our_writer(
        self, image: Path, open_image: Opener, options: tuple[str, ...]
    ) -> None:
        lock_file(open_image(os.O_RDONLY), FileUse.WRITE, str(image))
        done = qemu_io(image, *options)
        assert done.returncode != 0
        assert "lock" in done.stderr
        assert image.read_bytes() == b"\xa5" * MEBIBYTE

    @pytest.mark.parametrize(
        ("options", "readers_may"), [(("-r",), True), ((), False)], ids=["reading", "writing"]
    )
    def test_locks_us_out(self, image: Path, options: tuple[str, ...], readers_may: bool) -> None:
        qemu = subprocess.Popen(
            ["qemu-io", "-f", "raw", *options, str(image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert qemu.stdin is not None
            assert qemu.stdout is not None
            qemu.stdin.write("length\n")
            qemu.stdin.flush()
            while "1 MiB" not in qemu.stdout.readline():  # the image is open and locked once it answers
                assert qemu.poll() is None
            assert may(FileUse.READ, image) == readers_may
            assert not may(FileUse.WRITE, image)
        finally:
            qemu.kill()
            qemu.communicate()
        assert may(FileUse.WRITE, image)
