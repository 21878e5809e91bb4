"""Everybody who uses the disks of an SR at once: uploads, downloads, processes, an administrator.

Who writes to a disk notes first what it will hold; whoever reads compares with what it may hold by then.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from gateway.access.client import AccessRefused, open_vdi
from tests.system.clients import curl, upload_with_curl
from tests.system.crew import Crew
from tests.system.site import MIB, Site, Vdi, wait_until

SIZE = 6 * MIB
# libvhdi reads blocks that are written in finer parts wrongly.
GRAIN = 4096
MOST_KEPT = 5
_BUSY = ("VDI_IN_USE", "OTHER_OPERATION_IN_PROGRESS")


class Disk:
    """A VDI with all that it has ever held, by number. One thread at a time writes to it."""

    def __init__(self, site: Site) -> None:
        self.vdi = site.create_vdi(SIZE)
        self.content = bytes(SIZE)
        self.history = [sha256(self.content).digest()]
        self.version = 0

    @contextmanager
    def becoming(self, content: bytes) -> Iterator[Callable[[], None]]:
        """What it holds if the block calls what it gets, and may hold from now on."""
        done = False

        def succeeded() -> None:
            nonlocal done
            done = True

        self.history.append(sha256(content).digest())
        yield succeeded
        if done:
            self.content, self.version = content, self.version + 1
        else:
            self.history.pop()

    def assert_held(self, found: bytes, first: int) -> None:
        """It is what the disk held at some time since its version `first`."""
        last, digest = self.version + 1, sha256(found).digest()
        held = [number for number, known in enumerate(self.history) if known == digest]
        assert any(first <= number <= last for number in held), (
            f"{self.vdi.uuid} read as in its versions {held}, not as from {first} to {last}"
        )


@dataclass(eq=False)
class Kept:
    """A snapshot, clone or copy that nobody writes to. `of` is the disk whose content it has had."""

    ref: str
    uuid: str
    of: Disk
    content: bytes
    snapshot: bool
    doomed: bool = False


class Load:
    """Everybody who uses the SR, each in a thread of the crew."""

    def __init__(
        self, site: Site, directory: Path, rng: random.Random, disks: list[Disk], alone: Disk
    ) -> None:
        self.site = site
        self.directory = directory
        self.disks = disks
        self.alone = alone
        self.kept: list[Kept] = []
        self.crew = Crew(rng)
        self._guard = threading.Lock()

    def begin(self) -> None:
        self.crew.go()
        for number, disk in enumerate(self.disks):
            self.crew.start(f"writer {number}", self._write, disk)
            self.crew.start(f"download {number}", self._download, disk)
            self.crew.start(f"reader {number}", self._read, disk)
        self.crew.start("reader of what is kept", self._read_kept)
        self.crew.start("administrator", self._administer)
        self.crew.start("asker", self._ask)

    # What each does in a turn

    def _write(self, rng: random.Random, disk: Disk) -> None:
        match rng.randrange(8):
            case 0:
                self._upload(disk, rng.randbytes(rng.randrange(1, SIZE // GRAIN) * GRAIN).ljust(SIZE, b"\0"))
            case 1:
                head = rng.randbytes(GRAIN * rng.randrange(1, 64))
                self._upload(disk, head + disk.content[len(head) :], len(head))
            case 2:
                self._revert(disk, rng)
            case _:
                self._write_in_place(disk, rng)

    def _upload(self, disk: Disk, content: bytes, length: int = SIZE) -> None:
        source = self.directory / f"upload-{disk.vdi.uuid}"
        source.write_bytes(content[:length])
        with disk.becoming(content) as succeeded:
            outcome = upload_with_curl(source, self.site.import_url(disk.vdi))
            if outcome.success:
                succeeded()
            else:
                assert is_busy(outcome.said), outcome.said

    def _revert(self, disk: Disk, rng: random.Random) -> None:
        with self._guard:
            snapshots = [kept for kept in self.kept if kept.of is disk and kept.snapshot and not kept.doomed]
        if not snapshots:
            return
        snapshot = rng.choice(snapshots)
        with disk.becoming(snapshot.content) as succeeded:
            try:
                self.site.gateway.call("VDI.revert", snapshot.ref)
                succeeded()
            except AssertionError as error:
                assert snapshot.doomed or is_busy(str(error)), error

    def _write_in_place(self, disk: Disk, rng: random.Random) -> None:
        """Several pieces, some in a block of their own, by a process that has the disk alone meanwhile."""
        new = bytearray(disk.content)
        pieces = []
        for _ in range(rng.randrange(1, 6)):
            length = GRAIN * rng.choice((1, 2, 16, 512))
            offset = GRAIN * rng.randrange((SIZE - length) // GRAIN + 1)
            pieces.append((offset, rng.choice((rng.randbytes(length), bytes(length)))))
            new[offset : offset + length] = pieces[-1][1]
        with disk.becoming(bytes(new)) as succeeded:
            try:
                with closing(open_vdi(self._socket, disk.vdi.uuid, write=True, purpose="writer")) as opened:
                    for offset, data in pieces:
                        opened.pwrite(data, offset)
                    assert pread(opened, SIZE) == new
                    opened.flush()
                succeeded()
            except AccessRefused as refused:
                assert refused.code in _BUSY, refused

    def _download(self, _: random.Random, disk: Disk) -> None:
        first = disk.version
        done = curl("--fail-with-body", self.site.export_url(disk.vdi))
        if done.returncode:
            assert is_busy(done.stdout.decode()) or b"in use" in done.stdout, done
        else:
            disk.assert_held(done.stdout, first)

    def _read(self, rng: random.Random, disk: Disk) -> None:
        """More than once while it is held; then it stays what it is."""
        first = disk.version
        try:
            with closing(open_vdi(self._socket, disk.vdi.uuid, purpose="reader")) as opened:
                found = {pread(opened, SIZE) for _ in range(rng.randrange(1, 4))}
        except AccessRefused as refused:
            assert refused.code in _BUSY, refused
            return
        assert len(found) == 1
        disk.assert_held(found.pop(), first)

    def _read_kept(self, rng: random.Random) -> None:
        with self._guard:
            kept = rng.choice(self.kept) if self.kept else None
        if kept is None:
            self._read(rng, rng.choice(self.disks))
            return
        vdi = Vdi(kept.ref, kept.uuid, SIZE, self.site.directory / f"{kept.uuid}.vhd")
        if rng.randrange(2):
            done = curl("--fail-with-body", self.site.export_url(vdi))
            found = done.stdout if done.returncode == 0 else None
        else:
            try:
                with closing(open_vdi(self._socket, kept.uuid, purpose="reader of a snapshot")) as opened:
                    found = pread(opened, SIZE)
            except AccessRefused:
                found = None
        assert found == kept.content or (found is None and kept.doomed), f"wrong bytes in {kept.uuid}"

    def _administer(self, rng: random.Random) -> None:
        """Make a VDI that is kept, or destroy one."""
        if rng.randrange(3) == 0 or len(self.kept) >= MOST_KEPT:
            self._destroy(rng.choice(self.kept) if self.kept else None)
        elif rng.randrange(2) and self.kept:
            source = rng.choice(self.kept)
            if rng.randrange(2):
                made = self._attempt("VDI.clone", source.ref, {})
            else:
                made = self._attempt("VDI.copy", source.ref, self.site.repository)
            self._keep(made, source.of, source.content, snapshot=False)
        else:
            disk = rng.choice(self.disks)
            first = disk.version
            made = self._attempt("VDI.snapshot", disk.vdi.ref, {})
            if made is not None:
                last = disk.version + 2
                found = curl("--fail-with-body", self.site.export_url(self._vdi(made)))
                assert found.returncode == 0, found
                assert sha256(found.stdout).digest() in disk.history[first:last], "a wrong snapshot"
                self._keep(made, disk, found.stdout, snapshot=True)

    def _keep(self, ref: str | None, of: Disk, content: bytes, *, snapshot: bool) -> None:
        if ref is not None:
            with self._guard:
                self.kept.append(Kept(ref, self._vdi(ref).uuid, of, content, snapshot))

    def _destroy(self, kept: Kept | None) -> None:
        if kept is None:
            return
        kept.doomed = True
        with self._guard:
            self.kept.remove(kept)
        # Whoever began to read it ends some time.
        wait_until(lambda: self._attempt("VDI.destroy", kept.ref) is not None, "a VDI to be destroyed", 120)

    def _ask(self, rng: random.Random) -> None:
        self._attempt(rng.choice(("SR.scan", "SR.coalesce")), self.site.repository)

    # How

    @property
    def _socket(self) -> str:
        return str(self.site.gateway.state_dir / "access.sock")

    def _vdi(self, ref: str) -> Vdi:
        uuid = self.site.gateway.call("VDI.get_uuid", ref)
        return Vdi(ref, uuid, SIZE, self.site.directory / f"{uuid}.vhd")

    def _attempt(self, method: str, *arguments: object) -> Any:
        """What the call returns; None if somebody was in the way."""
        try:
            return self.site.gateway.call(method, *arguments)
        except AssertionError as error:
            assert is_busy(str(error)), error
            return None

    def leave_something_to_merge(self, rng: random.Random) -> None:
        """In the disk that nobody uses."""
        taken = self.site.gateway.call("VDI.snapshot", self.alone.vdi.ref, {})
        self._write_in_place(self.alone, rng)
        self.site.gateway.call("VDI.destroy", taken)

    def destroy_all_kept(self) -> None:
        for kept in list(self.kept):
            self._destroy(kept)


def is_busy(text: str) -> bool:
    return any(code in text for code in _BUSY)


def pread(opened: Any, length: int) -> bytes:
    found = bytearray(length)
    for offset in range(0, length, MIB):
        opened.pread_into(memoryview(found)[offset : offset + MIB], offset)
    return bytes(found)
