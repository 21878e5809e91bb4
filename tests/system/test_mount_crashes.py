"""Whatever dies or goes away beside readers of a mount, none of them hangs, and none reads a wrong byte."""

import errno
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from tests.conftest import RunningGateway
from tests.system.mounted import Mounted, digest, leases, mounted, needs_fuse, run, wait_until_free
from tests.system.site import MIB, Site, Vdi, depth, wait_until
from tests.system.test_mount_tools import make_chain

pytestmark = needs_fuse


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Is killed and started again by many tests, while one mount of it lives on."""
    running = RunningGateway(tmp_path_factory.mktemp("crashes"))
    running.start()
    try:
        yield running
    finally:
        running.kill()
    assert "Traceback" not in running.log(), running.log()


@pytest.fixture(scope="module")
def lasting_mount(gateway: RunningGateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with mounted(gateway, tmp_path_factory.mktemp("mount") / "disks") as mount:
        yield mount


@pytest.fixture
def mount(lasting_mount: Mounted) -> Iterator[Mounted]:
    yield lasting_mount
    assert lasting_mount.running, lasting_mount.log()


@pytest.fixture
def own_sr(gateway: RunningGateway, tmp_path: Path) -> Site:
    """An SR of the test's own, which it may damage."""
    return Site(gateway, tmp_path / "sr")


class Readers:
    """Threads that read whole files again and again, and count; a wrong byte or an error is noted."""

    def __init__(self, files: list[Path]) -> None:
        self.failures: list[BaseException] = []
        self.turns = [0] * len(files)
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=each) for each in enumerate(files)]

    def __enter__(self) -> "Readers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a reader hangs"

    def _read(self, number: int, path: Path) -> None:
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                first = self._digest(file)
                # With a moment between them, or many readers take all processors from those who start again.
                while not self._ending.wait(0.03):
                    assert self._digest(file) == first, f"{path} has changed"
                    self.turns[number] += 1
            finally:
                os.close(file)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.failures.append(error)

    @staticmethod
    def _digest(file: int) -> str:
        found, offset = sha256(), 0
        while piece := os.pread(file, 300_000, offset):
            found.update(piece)
            offset += len(piece)
        return found.hexdigest()

    def all_go_on(self) -> None:
        """Each reads its file twice more."""
        goal = [turns + 2 for turns in self.turns]
        wait_until(
            lambda: bool(self.failures) or all(t >= g for t, g in zip(self.turns, goal, strict=True)),
            "all readers to go on",
            60,
        )
        assert self.failures == []


@contextmanager
def killed_and_started_again(gateway: RunningGateway) -> Iterator[None]:
    gateway.kill()
    try:
        yield
    finally:
        gateway.start()


def test_a_gateway_that_is_killed_disturbs_no_reader_and_knows_the_leases_afterwards(
    own_sr: Site, mount: Mounted, tmp_path: Path
) -> None:
    gateway = own_sr.gateway
    disks = [make_chain(own_sr, tmp_path, seed, levels=2, size=3 * MIB) for seed in range(3)]
    names = ("disk.raw", "disk.vhd", "disk.qcow2")
    with Readers([mount.of(vdi, names[n % 3]) for n, vdi in enumerate(disks * 2)]) as readers:
        readers.all_go_on()
        for _ in range(2):
            with killed_and_started_again(gateway):
                readers.all_go_on()
                run("ls", "-l", *(mount.of(vdi) for vdi in disks))
            wait_until(
                lambda: all(leases(gateway, vdi) == ["read"] for vdi in disks), "the leases to be announced"
            )
            readers.all_go_on()
    for vdi in disks:
        wait_until_free(gateway, vdi)


def test_an_open_waits_for_a_gateway_that_restarts(own_sr: Site, mount: Mounted) -> None:
    vdi = own_sr.create_vdi()
    file = mount.of(vdi, "disk.raw")
    own_sr.gateway.kill()
    with subprocess.Popen(["sha256sum", str(file)], stdout=subprocess.PIPE, text=True) as reader:
        own_sr.gateway.start()
        assert reader.stdout is not None
        assert reader.stdout.read().split()[0] == sha256(bytes(vdi.size)).hexdigest()
    assert reader.returncode == 0


def test_a_chain_is_merged_only_after_its_last_reader_also_over_a_restart(
    own_sr: Site, mount: Mounted, tmp_path: Path
) -> None:
    gateway = own_sr.gateway
    vdi = make_chain(own_sr, tmp_path, seed=4, levels=2, size=3 * MIB)
    file = os.open(mount.of(vdi, "disk.raw"), os.O_RDONLY)
    try:
        before = os.pread(file, vdi.size, 0)
        [snapshot] = gateway.call("VDI.get_snapshots", vdi.ref)
        gateway.call("VDI.destroy", snapshot)
        with killed_and_started_again(gateway):
            pass
        wait_until(lambda: leases(gateway, vdi) == ["read"], "the lease to be announced")
        gateway.call("SR.coalesce", own_sr.repository)
        left = gateway.call("SR.get_coalesce_state", own_sr.repository)
        assert "waits for read by root at unix (fuse, process" in left[vdi.uuid]
        assert depth(own_sr, vdi) == 2
        assert os.pread(file, vdi.size, 0) == before
    finally:
        os.close(file)
    wait_until(lambda: depth(own_sr, vdi) == 1, "the chain to be merged")
    assert mount.of(vdi, "disk.raw").read_bytes() == before


def test_kill_9_of_the_mount_frees_all_and_its_readers_get_errors(own_sr: Site, tmp_path: Path) -> None:
    disks = [make_chain(own_sr, tmp_path, seed, levels=2, size=3 * MIB) for seed in range(2)]
    with mounted(own_sr.gateway, tmp_path / "mount") as mount:
        with Readers([mount.of(disks[number % 2], "disk.raw") for number in range(6)]) as readers:
            readers.all_go_on()
            mount.kill()
            wait_until(lambda: len(readers.failures) == 6, "all readers to be told")
        told = {error.errno for error in readers.failures if isinstance(error, OSError)}
        assert told <= {errno.ENOTCONN, errno.ECONNABORTED}
        for vdi in disks:
            wait_until_free(own_sr.gateway, vdi)
        with pytest.raises(OSError, match="Transport endpoint is not connected"):
            os.listdir(mount.directory)
        mount.start()
        for vdi in disks:
            assert len(mount.of(vdi, "disk.raw").read_bytes()) == vdi.size
        assert mount.stop() == 0
        assert os.listdir(mount.directory) == []


def damage_header(vdi: Vdi) -> None:
    with vdi.file.open("r+b") as file:
        file.write(random.Random(1).randbytes(4096))
        file.seek(-512, os.SEEK_END)
        file.write(random.Random(2).randbytes(512))


def cut_short(vdi: Vdi) -> None:
    os.truncate(vdi.file, 3000)


def damage_table(vdi: Vdi) -> None:
    """Each block is said to lie far behind the end of the file."""
    with vdi.file.open("r+b") as file:
        file.seek(1536)
        file.write(b"\x7f" * 512)


@pytest.mark.parametrize("damage", [damage_header, cut_short, damage_table])
def test_a_damaged_image_disturbs_nobody_but_its_own_readers(
    own_sr: Site,
    mount: Mounted,
    tmp_path: Path,
    damage: Callable[[Vdi], None],
) -> None:
    gateway = own_sr.gateway
    healthy, broken = (make_chain(own_sr, tmp_path, seed, levels=1, size=3 * MIB) for seed in range(2))
    folder = mount.of(broken)
    with Readers([mount.of(healthy, name) for name in ("disk.raw", "disk.vhd", "disk.qcow2")]) as readers:
        readers.all_go_on()
        damage(broken)
        for name in ("disk.raw", "disk.vhd", "disk.qcow2"):
            with pytest.raises(OSError, match=r"Input/output error|No such file or directory|not permitted"):
                (folder / name).read_bytes()
        # The gateway is told that something has changed, and looks.
        gateway.run("sr-scan", gateway.call("SR.get_uuid", own_sr.repository))
        subprocess.run(["ls", "-lR", str(mount.directory)], check=False, capture_output=True, timeout=60)
        run("ls", "-lR", mount.of(healthy))
        readers.all_go_on()
    wait_until_free(gateway, healthy)


def test_an_image_that_gets_shorter_under_a_reader_is_an_error_for_him(
    own_sr: Site, mount: Mounted, tmp_path: Path
) -> None:
    vdi = make_chain(own_sr, tmp_path, seed=1, levels=1, size=3 * MIB)
    with mount.of(vdi, "disk.raw").open("rb", buffering=0) as file:
        assert file.read(4096)
        os.truncate(vdi.file, 4096)
        with pytest.raises(OSError, match="Input/output error"):
            while file.read(MIB):
                pass


def test_a_directory_that_is_moved_away_and_back_ends_nothing(
    own_sr: Site, mount: Mounted, tmp_path: Path
) -> None:
    """As when an NFS server's export isn't there for a while: what is open is read on."""
    vdi = make_chain(own_sr, tmp_path, seed=1, levels=2, size=3 * MIB)
    other = make_chain(own_sr, tmp_path, seed=2, levels=1, size=3 * MIB)
    files = [mount.of(vdi, "disk.raw"), mount.of(vdi, "disk.qcow2")]
    closed = mount.of(other, "disk.raw")
    away = own_sr.directory.with_name("away")
    with Readers(files) as readers:
        readers.all_go_on()
        own_sr.directory.rename(away)
        readers.all_go_on()
        with pytest.raises(OSError, match=r"\[Errno"):
            closed.read_bytes()
        subprocess.run(["ls", "-lR", str(mount.directory)], check=False, capture_output=True, timeout=60)
        away.rename(own_sr.directory)
        readers.all_go_on()

    def is_back() -> bool:
        try:
            return len(mount.of(other, "disk.raw").read_bytes()) == other.size
        except OSError:
            own_sr.gateway.run("sr-scan", own_sr.gateway.call("SR.get_uuid", own_sr.repository))
            return False

    wait_until(is_back, "the disk to be back")


def test_an_sr_that_is_forgotten_goes_and_its_readers_are_answered(
    own_sr: Site, mount: Mounted, tmp_path: Path
) -> None:
    directory = tmp_path / "second"
    second = own_sr.create_repository(directory)
    vdi = own_sr.create_vdi(repository=(second, directory))
    kept = own_sr.create_vdi()
    with mount.of(vdi, "disk.raw").open("rb", buffering=0) as file:
        assert file.read(4096) == bytes(4096)
        uuid = own_sr.gateway.call("SR.get_uuid", second)
        forgot = own_sr.gateway.run("sr-forget", uuid)
        if forgot.returncode == 0:
            file.read(4096)
        else:
            assert "in use" in forgot.stderr.lower(), forgot.stderr
    wait_until_free(own_sr.gateway, kept)
    if forgot.returncode:
        wait_until(lambda: own_sr.gateway.run("sr-forget", uuid).returncode == 0, "the SR to be forgotten")
    wait_until(lambda: not (mount.directory / "by-uuid" / vdi.uuid).exists(), "the VDI to go")
    assert len(mount.of(kept, "disk.raw").read_bytes()) == kept.size
    shutil.rmtree(directory)
    run("ls", "-lR", mount.of(kept))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_nobody_reads_a_wrong_byte_while_chains_grow_and_shrink_and_everything_dies(
    own_sr: Site, tmp_path: Path, seed: int
) -> None:
    """Disks are opened, read and closed all the time; a merge or a restart may be in the way for a while."""
    rng, gateway = random.Random(seed), own_sr.gateway
    disks = [make_chain(own_sr, tmp_path, n, levels=3, size=4 * MIB) for n in range(3)]
    with mounted(gateway, tmp_path / "mount") as mount:
        files = [mount.of(vdi, name) for vdi in disks for name in ("disk.raw", "disk.vhd", "disk.qcow2")]
        wanted = {file: digest(file) for file in files}
        in_the_way = {errno.EBUSY, errno.EHOSTDOWN, errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT}
        ending, read = threading.Event(), [0] * len(files)
        wrong: list[str] = []

        def reader(number: int) -> None:
            while not ending.is_set():
                try:
                    found = digest(files[number])
                except OSError as error:
                    if error.errno not in in_the_way:
                        wrong.append(str(error))
                    ending.wait(0.05)
                    continue
                if found != wanted[files[number]]:
                    wrong.append(f"{files[number]} was read as another disk")
                read[number] += 1

        threads = [threading.Thread(target=reader, args=(number,)) for number in range(len(files))]
        for thread in threads:
            thread.start()
        try:
            for _ in range(25):
                match rng.randrange(4):
                    case 0:
                        gateway.kill()
                        gateway.start()
                    case 1:
                        mount.kill()
                        mount.start()
                    case 2:
                        _attempt(gateway, "VDI.snapshot", rng.choice(disks).ref, {})
                    case 3:
                        taken = gateway.call("VDI.get_snapshots", rng.choice(disks).ref)
                        if taken:
                            _attempt(gateway, "VDI.destroy", rng.choice(taken))
                        _attempt(gateway, "SR.coalesce", own_sr.repository)
                goal = [times + 2 for times in read]
                wait_until(partial(_have_come_to, read, goal, wrong), "all to read on", 120)
                assert wrong == []
        finally:
            ending.set()
            for thread in threads:
                thread.join(60)
        assert wrong == []
    for vdi in disks:
        for taken in gateway.call("VDI.get_snapshots", vdi.ref):
            gateway.call("VDI.destroy", taken)
    wait_until(lambda: all(depth(own_sr, vdi) == 1 for vdi in disks), "the chains to become short", 60)


def _have_come_to(read: list[int], goal: list[int], wrong: list[str]) -> bool:
    return bool(wrong) or all(now >= then for now, then in zip(read, goal, strict=True))


def _attempt(gateway: RunningGateway, method: str, *arguments: object) -> None:
    try:
        gateway.call(method, *arguments)
    except AssertionError as error:
        assert any(code in str(error) for code in ("VDI_IN_USE", "OTHER_OPERATION", "CHAIN")), error
