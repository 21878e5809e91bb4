"""`vdi-gateway mount` as a process, and what people do with the files of a mount: losetup, mount, umount.

The traps: after a kill -9 of the mount its directory answers ENOTCONN, and stays until it is unmounted; a
loop device that is left behind keeps a lease. So everything here is a context that takes away what it has
made, in whatever state it is.
"""

import contextlib
import hashlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import START_SECONDS, STOP_SECONDS, RunningGateway, clean_environment, program
from tests.system.site import Vdi, wait_until

CAP_SYS_ADMIN = 21


def _why_no_fuse() -> str:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse can't be used: {error.strerror}"
    if os.geteuid() != 0:
        return "" if shutil.which("fusermount3") else "fusermount3 isn't there"
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    return "" if capabilities >> CAP_SYS_ADMIN & 1 else "mounting needs the capability SYS_ADMIN"


def _why_no_loops() -> str:
    if os.geteuid() != 0:
        return "loop devices need root"
    return "" if os.path.exists("/dev/loop-control") else "there is no /dev/loop-control"


NO_FUSE = _why_no_fuse()
NO_LOOPS = _why_no_loops()
needs_fuse = pytest.mark.skipif(bool(NO_FUSE), reason=NO_FUSE)
needs_loops = pytest.mark.skipif(bool(NO_FUSE or NO_LOOPS), reason=NO_FUSE or NO_LOOPS)


class Mounted:
    """The disks of a gateway on a directory. `lines` are what the mount has logged."""

    def __init__(self, gateway: RunningGateway, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self._command = [program(), "mount", str(directory), "--state-dir", str(gateway.state_dir)]
        self._command += arguments
        self._log_file = directory.with_suffix(".log")
        directory.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        with self._log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=clean_environment(),
            )
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(START_SECONDS), "the mount says nothing"
        said = self.process.stdout.readline().decode()
        self.process.stdout.close()
        if "is mounted on" not in said:
            self.end()
            raise AssertionError(f"no ready line but {said!r}; the log says:\n{self.log()}")

    def of(self, vdi: Vdi | str, *names: str) -> Path:
        """A file of a VDI, once the VDI is shown."""
        uuid = vdi if isinstance(vdi, str) else vdi.uuid
        directory = self.directory / "by-uuid" / uuid
        wait_until(directory.exists, f"{uuid} to be shown")
        return directory.joinpath(*names)

    def log(self) -> str:
        return self._log_file.read_text()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def mounted(self) -> bool:
        """Whether the kernel has it, dead or alive."""
        with open("/proc/self/mountinfo", "rb") as lines:
            return any(line.split(b" ")[4] == os.fsencode(self.directory) for line in lines)

    def resident(self) -> int:
        """Bytes of memory that the process has now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL: nothing is cleaned up."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Take all away, whatever has happened."""
        try:
            if self.running:
                self.stop()
        finally:
            self.kill()
            while self.mounted:
                subprocess.run(["umount", "--lazy", str(self.directory)], check=True)


@contextlib.contextmanager
def mounted(gateway: RunningGateway, directory: Path, *arguments: str) -> Iterator[Mounted]:
    """A mount for the time of a block; nothing unexpected may have happened in it."""
    mount = Mounted(gateway, directory, *arguments)
    try:
        yield mount
    finally:
        mount.end()
    assert "Traceback" not in mount.log(), mount.log()


def run(*command: str | Path, code: int = 0, given: str | None = None) -> str:
    """The output of a program, which must end with that exit code; `given` is its standard input."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60, input=given
    )
    assert done.returncode == code, (command, done.returncode, done.stdout, done.stderr)
    return done.stdout


@contextlib.contextmanager
def loop_device(file: Path, *, write: bool = False) -> Iterator[Path]:
    """A block device of a file."""
    mode = [] if write else ["--read-only"]
    device = Path(run("losetup", "--find", "--show", *mode, file).strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def filesystem(source: Path, directory: Path, *options: str, kind: str = "auto") -> Iterator[Path]:
    """A file system on a directory; a file is mounted through a loop device that goes with it."""
    directory.mkdir(exist_ok=True)
    loop = () if source.is_block_device() else ("loop",)
    how = ["-o", ",".join((*loop, *options))] if loop or options else []
    run("mount", "-t", kind, *how, source, directory)
    try:
        yield directory
    finally:
        _umount(directory)


@contextlib.contextmanager
def ntfs_3g(source: Path, directory: Path, *options: str) -> Iterator[Path]:
    """An NTFS by the program that everybody has, on a directory."""
    directory.mkdir(exist_ok=True)
    run("ntfs-3g", *(("-o", ",".join(options)) if options else ()), source, directory)
    try:
        yield directory
    finally:
        _umount(directory)


def _umount(directory: Path) -> None:
    """Something else on the machine may look into a mount at that moment."""
    deadline = time.monotonic() + 10
    while subprocess.run(["umount", str(directory)], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            run("umount", "--lazy", directory)
            return
        time.sleep(0.05)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(directory: Path) -> dict[str, str]:
    """What is in the files below a directory, by their paths in it. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    found = {}
    # Python 3.13's rglob takes a directory that can't be read for an empty one.
    for folder, _, names in os.walk(directory, onerror=fail):
        for path in (Path(folder, name) for name in names):
            if path.is_file() and "lost+found" not in path.parts:
                found[str(path.relative_to(directory))] = digest(path)
    return found


def leases(gateway: RunningGateway, vdi: Vdi) -> list[str]:
    """What is being done with a VDI: "read" and "write" are leases."""
    return sorted(gateway.call("VDI.get_current_operations", vdi.ref).values())


def wait_until_free(gateway: RunningGateway, vdi: Vdi) -> None:
    """The kernel tells of a close after close(2) has returned."""
    wait_until(lambda: leases(gateway, vdi) == [], "the lease to end")
