"""Crashes of a worker and of its machine while NBD clients write: after each single file call, and with calls
that no sync has made durable lost or torn, what a flush has answered is there and the image is whole.

The requests go through the plugin's own callbacks, as nbdkit calls them, and a socket here grants disks
as the gateway does; FUA is a write and then a flush, which is what nbdkit makes of it.
"""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest

from gateway.access.client_link import ClientLink
from gateway.access.protocol import File, Granted, Open
from gateway.images.chain import open_chain_files, open_disk
from gateway.images.vhd.check import check_vhd
from tests.crash import RecordingFileCalls
from tests.images.disks import content, inspect, libvhdi_reads
from tests.images.test_crash import (
    FLUSHED,
    SECTOR,
    Expectation,
    Make,
    Scene,
    check_files,
    go_on,
    make_differencing,
    make_dynamic,
    make_fixed,
    misread_by_libvhdi,
)
from tests.nbd_plugin.conftest import MAY_TRIM


class Granting:
    """What opens disks for the plugin: the image, whatever VDI is asked for, to one after another."""

    def __init__(self, path: Path, image: Path) -> None:
        self.path = path
        self._image = image
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _run(self) -> None:
        while True:
            try:
                accepted, _ = self._listening.accept()
            except OSError:
                return
            link = ClientLink(accepted)
            try:
                self._grant(link)
            finally:
                link.close()

    def _grant(self, link: ClientLink) -> None:
        asked = link.receive(30)
        assert isinstance(asked, Open)
        chain = open_chain_files(str(self._image), writable=asked.write)
        try:
            files = tuple(File(node.path, node.kind.value, node.parent) for node in chain.nodes)
            link.send(Granted("a lease", files), [node.fd for node in chain.nodes])
        finally:
            chain.close()
        while link.receive(60) is not None:
            pass


class Connection:
    """Random requests over one connection, with the promises noted: those to a part of the disk."""

    def __init__(
        self, plugin: ModuleType, files: RecordingFileCalls, rng: random.Random, *, part: int | None = None
    ) -> None:
        self.plugin = plugin
        self.files = files
        self.rng = rng
        self.part = part

    def mark(self, promise: object) -> None:
        self.files.mark(promise if self.part is None else (self.part, promise))

    def write(self, export: Any, offset: int, data: bytes, *, forced: bool = False) -> None:
        self.mark((offset, data))
        self.plugin.pwrite(export, memoryview(data), offset, 0)
        if forced:
            self.flush(export)

    def zero(self, export: Any, offset: int, length: int, kind: str) -> None:
        self.mark((offset, bytes(length)))
        if kind == "trim":
            self.plugin.trim(export, length, offset, 0)
        else:
            self.plugin.zero(export, length, offset, MAY_TRIM if kind == "zero" else 0)

    def flush(self, export: Any) -> None:
        self.plugin.flush(export, 0)
        self.mark(FLUSHED)

    def request(self, export: Any) -> None:
        rng, size = self.rng, self.plugin.get_size(export)
        offset = rng.randrange(size // SECTOR) * SECTOR
        sectors = min(rng.choice((1, 2, 8, 20)) * SECTOR, size - offset)
        kinds = ("write", "forced write", "odd write", "zero", "zero without a hole", "trim", "flush")
        match rng.choices(kinds, (6, 2, 2, 2, 1, 2, 3))[0]:
            case "write":
                self.write(export, offset, rng.randbytes(sectors))
            case "forced write":
                self.write(export, offset, rng.randbytes(sectors), forced=True)
            case "odd write":
                odd = rng.randrange(size)
                self.write(export, odd, rng.randbytes(min(rng.randrange(1, 1500), size - odd)))
            case "flush":
                self.flush(export)
            case kind:
                self.zero(export, offset, sectors, kind)


class Served:
    """An image behind the plugin, its file calls recorded."""

    def __init__(
        self, plugin: Any, scene: Scene, names: list[str], monkeypatch: pytest.MonkeyPatch, control: Path
    ) -> None:
        self.plugin = plugin
        self.files = RecordingFileCalls(scene.root)
        monkeypatch.setattr("gateway.access.client.open_disk", partial(open_disk, files=self.files))
        plugin.nbdkit.export_name = lambda: f"{uuid4()}?mode=rw"
        plugin.parameters = plugin.Parameters(control=str(control), private=True)
        self.image = scene.root / names[0]

    def open(self) -> Any:
        export = self.plugin.open(False)
        assert self.plugin.can_write(export)
        return export


@pytest.fixture
def served(
    plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Scene, list[str]], Served]]:
    granting: list[Granting] = []

    def serve(scene: Scene, names: list[str]) -> Served:
        control = tmp_path / "access.sock"
        granting.append(Granting(control, scene.root / names[0]))
        return Served(plugin, scene, names, monkeypatch, control)

    yield serve
    for each in granting:
        each.close()


def crash(
    scene: Scene,
    names: list[str],
    served: Served,
    *,
    connections: int,
    requests: int,
    per_point: int,
    qemu_every: int,
) -> None:
    """One connection after another writes; then all that a crash may leave is looked at."""
    before = content(served.image)
    client = Connection(served.plugin, served.files, scene.rng)
    for _ in range(connections):
        export = served.open()
        for _ in range(requests):
            client.request(export)
        served.plugin.close(export)
        served.files.mark(FLUSHED)
    fixed = inspect(served.image).header is None
    kinds = {kind: Expectation(before, parts_of_sectors=fixed) for kind in ("kill", "power")}
    for number, state in enumerate(scene.states(served.files, per_point)):
        expectation = kinds[state.directory.parent.name]
        expectation.follow(state.marks)
        paths = [state.directory / name for name in names]
        check_files(paths, expectation, state, qemu=number % qemu_every == 0)
        if number % 10 == 0:
            go_on(paths[0], scene.rng, expectation, alone=len(paths) == 1)
    assert kinds["power"].current == content(served.image)


@pytest.mark.parametrize("make", [make_dynamic, make_differencing, make_fixed])
class TestACrash:
    def test_takes_nothing_that_a_flush_has_answered(
        self, tmp_path: Path, served: Callable[[Scene, list[str]], Served], make: Make
    ) -> None:
        scene = Scene(tmp_path, seed=7)
        names = make(scene, 4096)
        crash(scene, names, served(scene, names), connections=2, requests=8, per_point=1, qemu_every=40)

    @pytest.mark.long
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("block_size", [4096, 16384])
    @pytest.mark.parametrize("seed", range(4))
    def test_takes_nothing_that_a_flush_has_answered_in_many_states(
        self,
        tmp_path: Path,
        served: Callable[[Scene, list[str]], Served],
        make: Make,
        block_size: int,
        seed: int,
    ) -> None:
        scene = Scene(tmp_path, seed)
        names = make(scene, block_size)
        crash(scene, names, served(scene, names), connections=3, requests=25, per_point=4, qemu_every=25)


# Requests of one connection run in parallel

THREADS = 4


def owned(sectors: int, thread: int) -> list[int]:
    """Every block of eight sectors is shared by all threads, and no sector is."""
    each = 8 // THREADS
    return [sector for sector in range(sectors) if sector % 8 // each == thread]


def work_in_parallel(served: Served, seed: int, requests: int) -> None:
    """Four threads of nbdkit's at a time, each of which flushes what it has written itself."""
    export = served.open()
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        rng = random.Random(seed * THREADS + thread)
        client = Connection(served.plugin, served.files, rng, part=thread)
        mine = owned(served.plugin.get_size(export) // SECTOR, thread)
        try:
            for _ in range(requests):
                sector = rng.choice(mine)
                match rng.choices(("write", "forced write", "trim", "flush"), (5, 2, 2, 2))[0]:
                    case "flush":
                        client.flush(export)
                    case "trim":
                        client.zero(export, sector * SECTOR, SECTOR, "trim")
                    case kind:
                        data = rng.randbytes(SECTOR)
                        client.write(export, sector * SECTOR, data, forced=kind == "forced write")
        except BaseException as error:  # noqa: BLE001 - it is raised below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.plugin.close(export)
    for number in range(THREADS):
        served.files.mark((number, FLUSHED))
    if failures:
        raise failures[0]


def crash_in_parallel(
    scene: Scene, names: list[str], served: Served, *, seed: int, requests: int, per_point: int
) -> None:
    before = content(served.image)
    work_in_parallel(served, seed, requests)
    kinds = {kind: [Expectation(before) for _ in range(THREADS)] for kind in ("kill", "power")}
    sectors = len(before) // SECTOR
    for state in scene.states(served.files, per_point):
        paths = [state.directory / name for name in names]
        misread = misread_by_libvhdi(paths[0]) if len(paths) > 1 else frozenset()
        ours, theirs = content(paths[0]), libvhdi_reads(paths)
        for thread, expectation in enumerate(kinds[state.directory.parent.name]):
            promises = tuple(mark[1] for mark in state.marks if isinstance(mark, tuple) and mark[0] == thread)
            expectation.follow(promises)
            others = frozenset(range(sectors)) - frozenset(owned(sectors, thread))
            expectation.check(ours, "we", state, others)
            expectation.check(theirs, "libvhdi", state, others | misread)
        assert all(check_vhd(str(path)).errors == () for path in paths), state


@pytest.mark.parametrize("make", [make_dynamic, make_differencing])
class TestACrashDuringParallelRequests:
    def test_takes_nothing_that_a_flush_has_answered(
        self, tmp_path: Path, served: Callable[[Scene, list[str]], Served], make: Make
    ) -> None:
        scene = Scene(tmp_path, seed=3)
        names = make(scene, 4096)
        crash_in_parallel(scene, names, served(scene, names), seed=3, requests=6, per_point=1)

    @pytest.mark.long
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("seed", range(4))
    def test_takes_nothing_that_a_flush_has_answered_in_many_states(
        self, tmp_path: Path, served: Callable[[Scene, list[str]], Served], make: Make, seed: int
    ) -> None:
        scene = Scene(tmp_path, seed)
        names = make(scene, 4096)
        crash_in_parallel(scene, names, served(scene, names), seed=seed, requests=30, per_point=3)
