"""Disks in use by every kind of client while their SR is coalesced all the time."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from gateway.access.client import open_vdi
from tests.conftest import RunningGateway
from tests.system.clients import curl
from tests.system.site import Site, Vdi, stored_content, wait_until

SLOTS = 16
PIECE = 4096
STEP = 256 << 10


class Disk:
    """A disk whose content follows from the number of the last write: each goes to the next place."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.vdi = site.create_vdi(SLOTS * STEP)
        self.version = 0
        self.socket = str(site.gateway.state_dir / "access.sock")

    def write(self) -> None:
        """One version more, in place, by a process that has the disk alone meanwhile."""
        with closing(open_vdi(self.socket, self.vdi.uuid, write=True)) as disk:
            number = self.version + 1
            disk.pwrite(bytes([number % 251 + 1]) * PIECE, number % SLOTS * STEP)
            disk.flush()
            self.version = number

    def expected(self, version: int) -> list[int]:
        """The byte at each place."""
        latest = [version - (version - slot) % SLOTS for slot in range(SLOTS)]
        return [number % 251 + 1 if number > 0 else 0 for number in latest]

    def check(self, content: bytes, first: int, last: int) -> None:
        """It is that of one of the versions from `first` to `last`, whole."""
        assert len(content) == self.vdi.size
        found = []
        for slot in range(SLOTS):
            piece = content[slot * STEP : slot * STEP + PIECE]
            assert piece == piece[:1] * PIECE, f"a torn write at place {slot}"
            found.append(piece[0])
        # A write that is under way when the reading begins is the next version.
        assert found in [self.expected(version) for version in range(first, last + 2)], (first, last)

    def download(self) -> None:
        first = self.version
        done = curl("--fail-with-body", self.site.export_url(self.vdi))
        if done.returncode:
            # The writer was before us for longer than is waited.
            assert b"in use" in done.stdout, done.stdout
            return
        self.check(done.stdout, first, self.version)

    def read(self) -> None:
        first = self.version
        content = bytearray(self.vdi.size)
        with closing(open_vdi(self.socket, self.vdi.uuid)) as disk:
            disk.pread_into(content, 0)
        self.check(bytes(content), first, self.version)


@contextmanager
def looping(*actions: Callable[[], object]) -> Iterator[None]:
    """Each in a thread of its own, again and again, for the time of a block."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def loop(action: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                action()
        except BaseException as error:  # noqa: BLE001 - it is raised below
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=loop, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for failure in failures:
        raise failure


def coalesced(gateway: RunningGateway, status: str) -> int:
    tasks = gateway.call("task.get_all_records").values()
    return sum(task["name_label"] == "coalesce" and task["status"] == status for task in tasks)


def depth(site: Site, vdi: Vdi) -> int:
    nodes = json.loads(site.gateway.command("vdi-chain", vdi.uuid, "--json").stdout)
    return max(int(node["depth"]) for node in nodes)


def test_nobody_ever_sees_a_wrong_byte_and_the_chain_becomes_short(own_site: Site) -> None:
    disk = Disk(own_site)
    gateway = own_site.gateway

    def ask() -> None:
        own_site.gateway.command("sr-coalesce", own_site.gateway.call("SR.get_uuid", own_site.repository))

    with looping(disk.write, disk.download, disk.read, ask):
        for _ in range(4):
            taken = gateway.call("VDI.snapshot", disk.vdi.ref, {})
            before = disk.version
            wait_until(lambda: disk.version >= before + 6, "some writes", 60)  # noqa: B023
            gateway.call("VDI.destroy", taken)
    wait_until(lambda: depth(own_site, disk.vdi) == 1, "the chain to become short", 60)
    wait_until(lambda: coalesced(gateway, "pending") == 0, "the last merge to end", 60)
    disk.check(stored_content(disk.vdi), disk.version, disk.version)
    assert coalesced(gateway, "success") > 0
    assert coalesced(gateway, "failure") == 0
    assert sorted(path.name for path in own_site.directory.iterdir()) == [".vdi-gateway", disk.vdi.file.name]


def test_after_kill_9_a_disk_that_somebody_holds_is_not_merged_until_he_lets_go(own_site: Site) -> None:
    disk = Disk(own_site)
    gateway = own_site.gateway
    disk.write()
    taken = gateway.call("VDI.snapshot", disk.vdi.ref, {})
    disk.write()
    with closing(open_vdi(disk.socket, disk.vdi.uuid, purpose="a reader")) as held:
        gateway.call("VDI.destroy", taken)
        wait_until(lambda: coalesced(gateway, "pending") == 1, "the merge to wait")
        gateway.kill()
        found = bytearray(disk.vdi.size)
        held.pread_into(found, 0)
        disk.check(bytes(found), 2, 2)
        gateway.start()
        wait_until(lambda: held.connected, "the reader to be known again")
        asked = gateway.command("sr-coalesce", gateway.call("SR.get_uuid", own_site.repository))
        assert (asked.returncode, depth(own_site, disk.vdi)) == (3, 2), asked.stderr
        assert "waits for read by root (a reader" in asked.stdout
        held.pread_into(found, 0)
        disk.check(bytes(found), 2, 2)
    wait_until(lambda: depth(own_site, disk.vdi) == 1, "the merge")
    wait_until(lambda: coalesced(gateway, "pending") == 0, "the merge to end")
    disk.check(stored_content(disk.vdi), 2, 2)
