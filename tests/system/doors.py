"""The doors of a gateway, and of a second one that has the SR read-only, and disks that are used by all.

The trap: whoever serves may be killed under a client. Then a disk holds what it did or what it was to hold;
after writes in place some parts are the one, some the other; and from then on it stays as it is.
"""

import json
import os
import random
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from tests.conftest import RunningGateway
from tests.nbd_plugin.served import NbdSite
from tests.system.clients import curl, upload_with_curl
from tests.system.mounted import Mounted
from tests.system.site import MIB, Vdi

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 4 * MIB
# libvhdi reads blocks that are written in finer parts wrongly.
GRAIN = 4096
QUIET_SECONDS = 60


class Closed(Exception):  # noqa: N818 - which is no error while people are in each other's way, or killed
    """The door didn't open, or fell shut under its client."""


@dataclass(frozen=True)
class State:
    """What a disk may hold: `old` or `new`, and if it is written in place each grain as in either."""

    old: bytes
    new: bytes
    in_place: bool = False

    def may_be(self, found: bytes) -> bool:
        if found in (self.old, self.new):
            return True
        places = range(0, SIZE, GRAIN)
        return (
            self.in_place
            and len(found) == SIZE
            and all(
                found[p : p + GRAIN] in (self.old[p : p + GRAIN], self.new[p : p + GRAIN]) for p in places
            )
        )


class Doors:
    """`readers` give all bytes of a VDI, `writers` change some; by the names of doors, raising Closed."""

    def __init__(self, site: NbdSite, mount: Mounted, other: RunningGateway, directory: Path) -> None:
        self.site = site
        self.mount = mount
        self.other = other
        self._directory = directory
        self.readers: dict[str, Callable[[Vdi], bytes]] = {
            "http": lambda vdi: self._download(site.gateway, vdi),
            "http resumed": lambda vdi: self._resumed(site.gateway, vdi),
            "qcow2": lambda vdi: self._converted(vdi, "qcow2", "qcow2"),
            "vhd": lambda vdi: self._converted(vdi, "vhd", "vpc"),
            "nbd": self._nbd_read,
            "mount": self._mount_read,
            "other gateway": lambda vdi: self._download(other, vdi),
            "other gateway resumed": lambda vdi: self._resumed(other, vdi),
        }
        self.writers: dict[str, Callable[[Vdi, bytes, list[int]], None]] = {
            "http": lambda vdi, new, _places: self._upload(vdi, new, "raw"),
            "qcow2": lambda vdi, new, _places: self._upload(vdi, new, "qcow2"),
            "nbd": self._nbd_write,
            "mount": self._mount_write,
        }
        self.in_place = {"nbd", "mount"}

    def _file(self, suffix: str) -> Path:
        return self._directory / f"{threading.get_ident()}.{suffix}"

    # Reading

    def _url(self, gateway: RunningGateway, vdi: Vdi, **query: str) -> str:
        try:
            parameters = urlencode({"session_id": gateway.session, "vdi": vdi.uuid, **query})
        except (OSError, HTTPException) as error:
            raise Closed(error) from error
        return f"{gateway.url.rstrip('/')}/export_raw_vdi?{parameters}"

    def _download(self, gateway: RunningGateway, vdi: Vdi, *options: str) -> bytes:
        done = curl("--fail-with-body", *options, self._url(gateway, vdi))
        if done.returncode:
            raise Closed(done.stdout[:200], done.stderr)
        return done.stdout

    def _resumed(self, gateway: RunningGateway, vdi: Vdi) -> bytes:
        """In two parts, of which the second is asked for by the ETag of the first."""
        head = self._file("head")
        first = self._download(gateway, vdi, "-D", str(head), "-r", f"0-{SIZE // 2 - 1}")
        [tag] = [
            line[5:].strip() for line in head.read_text().splitlines() if line.lower().startswith("etag:")
        ]
        return first + self._download(gateway, vdi, "-r", f"{SIZE // 2}-", "-H", f"If-Match: {tag}")

    def _converted(self, vdi: Vdi, image_format: str, qemu_format: str) -> bytes:
        image, raw = self._file(image_format), self._file("raw")
        url = self._url(self.site.gateway, vdi, format=image_format)
        self._run("curl", "-sSf", "-o", str(image), url)
        command = ["qemu-img", "convert", "-f", qemu_format, "-O", "raw", str(image), str(raw)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return raw.read_bytes()

    def _nbd_read(self, vdi: Vdi) -> bytes:
        raw = self._file("raw")
        raw.unlink(missing_ok=True)
        self._run("nbdcopy", self.site.private_uri(vdi), str(raw))
        return raw.read_bytes()

    def _mount_read(self, vdi: Vdi) -> bytes:
        # By a process of its own, which can be ended if the file never answers.
        raw = self._file("raw")
        self._run("dd", f"if={self._disk_file(vdi)}", f"of={raw}", "bs=64k", "status=none")
        return raw.read_bytes()

    # Writing

    def _upload(self, vdi: Vdi, new: bytes, image_format: str) -> None:
        raw, image = self._file("raw"), self._file(image_format)
        raw.write_bytes(new)
        if image_format != "raw":
            command = ["qemu-img", "convert", "-f", "raw", "-O", image_format, str(raw), str(image)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        try:
            outcome = upload_with_curl(image, self.site.import_url(vdi, format=image_format))
        except (OSError, HTTPException) as error:
            raise Closed(error) from error
        if not outcome.success:
            raise Closed(outcome.said)

    def _nbd_write(self, vdi: Vdi, new: bytes, places: list[int]) -> None:
        commands = ["-c", "flush"]
        for place in places:
            piece = self._file(f"{place}.piece")
            piece.write_bytes(new[place : place + GRAIN])
            commands[:0] = ["-c", f"write -s {piece} {place} {GRAIN}"]
        try:
            self._run("qemu-io", "-f", "raw", *commands, self.site.private_uri(vdi, write=True))
        finally:
            for place in places:
                self._file(f"{place}.piece").unlink()

    def _mount_write(self, vdi: Vdi, new: bytes, places: list[int]) -> None:
        raw = self._file("raw")
        for place in places:
            raw.write_bytes(new[place : place + GRAIN])
            options = [f"seek={place // GRAIN}", f"bs={GRAIN}", "conv=notrunc,fsync", "status=none"]
            self._run("dd", f"if={raw}", f"of={self._disk_file(vdi)}", *options)

    def _disk_file(self, vdi: Vdi) -> Path:
        return self.mount.directory / "by-uuid" / vdi.uuid / "disk.raw"

    @staticmethod
    def _run(*command: str) -> None:
        """Nobody waits for ever: a client that gets no answer fails the test."""
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        # qemu-io says on its output alone what failed.
        if done.returncode or "failed" in done.stdout + done.stderr:
            raise Closed(done.stdout, done.stderr)


class Disk:
    """A VDI with all that it may have held. One thread writes to it, others read."""

    def __init__(self, doors: Doors, image_format: str) -> None:
        self.doors = doors
        self.vdi = doors.site.create_vdi(SIZE, image_format)
        self.content = bytes(SIZE)
        self._states = [State(self.content, self.content)]
        self._settled = 0

    def write(self, rng: random.Random) -> None:
        door = rng.choice(sorted(self.doors.writers))
        places = sorted(rng.sample(range(0, SIZE, GRAIN), 4))
        new = bytearray(self.content)
        for place in places:
            new[place : place + GRAIN] = rng.choice((rng.randbytes(GRAIN), bytes(GRAIN)))
        self._states.append(State(self.content, bytes(new), door in self.doors.in_place))
        try:
            self.doors.writers[door](self.vdi, bytes(new), places)
            self._settle(bytes(new))
        except Closed:
            self._look(rng, door)

    def take_snapshot(self, rng: random.Random) -> None:
        """Look at it, and give it up, so that there is something to coalesce."""
        gateway = self.doors.site.gateway
        try:
            ref = gateway.call("VDI.snapshot", self.vdi.ref, {})
            uuid = gateway.call("VDI.get_uuid", ref)
            snapshot = Vdi(ref, uuid, SIZE, self.vdi.file.with_stem(uuid))
            found = self.doors.readers[rng.choice(("http", "qcow2", "nbd"))](snapshot)
            assert found == self.content, f"a wrong snapshot of {self.vdi.uuid}"
            gateway.call("VDI.destroy", ref)
        except (Closed, OSError, HTTPException):
            pass
        except AssertionError as error:
            if not any(code in str(error) for code in ("VDI_IN_USE", "OTHER_OPERATION_IN_PROGRESS")):
                raise

    def read(self, rng: random.Random) -> None:
        door, first = rng.choice(sorted(self.doors.readers)), self._settled
        try:
            found = self.doors.readers[door](self.vdi)
        except Closed:
            return
        self._assert_possible(found, first, door)

    def _look(self, rng: random.Random, written_by: str) -> None:
        """Find out what it holds after a write of which nobody knows how far it came."""
        deadline = time.monotonic() + QUIET_SECONDS
        while True:
            door = rng.choice(("http", "nbd", "mount"))
            try:
                found = self.doors.readers[door](self.vdi)
                break
            except Closed as closed:
                assert time.monotonic() < deadline, f"{self.vdi.uuid} can't be read any more: {closed}"
                time.sleep(0.1)
        self._assert_possible(found, self._settled, f"{door} after a write by {written_by}")
        self._settle(found)

    def _settle(self, content: bytes) -> None:
        self.content = content
        self._states.append(State(content, content))
        self._settled = len(self._states) - 1

    def _assert_possible(self, found: bytes, first: int, door: str) -> None:
        states = self._states[first:]
        assert any(state.may_be(found) for state in states), f"wrong bytes of {self.vdi.uuid} by {door}"

    def assert_read_everywhere(self) -> None:
        """When nobody else uses it each door opens, and shows the same."""
        for door, read in self.doors.readers.items():
            assert read(self.vdi) == self.content, f"wrong bytes of {self.vdi.uuid} by {door}"

    def assert_told_as_changed(self, since: str, before: bytes) -> None:
        """No block that differs from what the snapshot `since` had is left out."""
        told = self.doors.site.gateway.command(
            "vdi-list-changed-blocks", f"vdi-from-uuid={since}", f"vdi-to-uuid={self.vdi.uuid}", "--json"
        )
        assert told.returncode == 0, told.stderr
        changed = json.loads(told.stdout)["changed"]
        ranges = [(each["offset"], each["offset"] + each["length"]) for each in changed]
        for place in range(0, SIZE, GRAIN):
            if before[place : place + GRAIN] != self.content[place : place + GRAIN]:
                assert any(start <= place < end for start, end in ranges), f"{place} was missed"


def second_gateway(directory: Path, site: NbdSite) -> RunningGateway:
    """One that has the SR read-only, as where a XenServer writes to it; not yet started."""
    state = directory / "state"
    state.mkdir(parents=True, mode=0o700)
    shutil.copy(site.gateway.state_dir / "admin-password", state / "admin-password")
    return RunningGateway(directory)


def open_descriptors(gateway: RunningGateway) -> int:
    return len(os.listdir(f"/proc/{gateway.pid}/fd"))
