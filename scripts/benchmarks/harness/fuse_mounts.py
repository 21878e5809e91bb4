"""The FUSE mounts that are measured against each other, and loop devices and file systems on their files.

The trap: whoever removes a directory with a mount in it removes what is in the mount. So each ends unmounted,
by itself or else by force.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.benchmarks.harness.gateway import PROGRAM
from scripts.benchmarks.harness.nbd_servers import file_plugin
from scripts.benchmarks.harness.peers import Peer, PeerUnavailableError, wait_for


class Mount(Peer):
    """A process that serves files at `point`, a directory or a file."""

    def __init__(self, point: Path, command: list[str | Path]) -> None:
        self.point = point
        self._log = (point.parent / f"{point.name}.log").open("a")
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            text=True,
        )
        try:
            wait_for(lambda: _is_mounted(point), str(command[0]), self.process)
        except RuntimeError as error:
            self.close()
            said = Path(self._log.name).read_text().strip()
            raise PeerUnavailableError(f"{error}: {said[-300:]}") from None

    def close(self) -> None:
        try:
            super().close()
        finally:
            while _is_mounted(self.point):
                subprocess.run(["umount", "--lazy", str(self.point)], check=True)
            self._log.close()


class GatewayMount(Mount):
    """`vdi-gateway mount`."""

    def __init__(self, point: Path, state: Path) -> None:
        point.mkdir()
        super().__init__(point, [PROGRAM, "mount", point, "--state-dir", state])

    def of(self, vdi: str, name: str = "disk.raw") -> Path:
        """A file of a VDI, once the mount has heard of it."""
        file = self.point / "by-uuid" / vdi / name
        wait_for(file.exists, f"{file} in the mount", self.process)
        return file


class StorageDaemon(Mount):
    """qemu-storage-daemon's export of a raw file; `engine` is how it reads that: threads or io_uring."""

    def __init__(self, point: Path, file: Path, engine: str) -> None:
        point.touch()
        self.file = point
        source = f"driver=file,node-name=file,filename={file},read-only=on,aio={engine}"
        export = f"fuse,id=export,node-name=disk,mountpoint={point},writable=off"
        command: list[str | Path] = ["qemu-storage-daemon", "--blockdev", source]
        command += ["--blockdev", "driver=raw,node-name=disk,file=file,read-only=on", "--export", export]
        super().__init__(point, command)


class NbdFuse(Mount):
    """nbdfuse over nbdkit's file plugin, with as many connections and threads as each has by default."""

    def __init__(self, point: Path, file: Path) -> None:
        point.mkdir()
        self.file = point / "disk"
        self._server = file_plugin(point.with_suffix(".sock"), file, 16)
        try:
            super().__init__(point, ["nbdfuse", "--readonly", self.file, self._server.uri])
        except BaseException:
            self._server.close()
            raise

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._server.close()


@contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """A read-only block device of a file, with direct I/O: each of its requests is one to the file system
    that has the file. Without it the page cache would answer for nbdfuse after the first time.
    """
    options = ["--find", "--show", "--read-only", "--direct-io=on", str(file)]
    done = subprocess.run(["losetup", *options], capture_output=True, text=True, check=True)
    device = Path(done.stdout.strip())
    try:
        listed = subprocess.run(
            ["losetup", "--json", "--list", "--output", "DIO", str(device)],
            capture_output=True,
            text=True,
            check=True,
        )
        if not json.loads(listed.stdout)["loopdevices"][0]["dio"]:
            raise RuntimeError(f"{file} can't be read by a loop device with direct I/O")
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


@contextmanager
def ext4(device: Path, directory: Path) -> Iterator[Path]:
    """The file system on a device, mounted read-only and without looking at its journal."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "ext4", "-o", "ro,noload", str(device), str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def _is_mounted(point: Path) -> bool:
    with open("/proc/self/mountinfo", "rb") as lines:
        return any(line.split(b" ")[4] == os.fsencode(point) for line in lines)
