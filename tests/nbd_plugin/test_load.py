"""Ten minutes of every kind of load on one worker, whose memory is watched all the time."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.images.vhd.check import check_vhd
from tests.nbd_plugin.conftest import Nbd
from tests.nbd_plugin.test_process import status
from tests.system.site import MIB, Vdi, wait_until

GIB = 1 << 30
LARGEST = 2040 * GIB  # the largest VHD, a disk of "2 TiB"
PLACES = 8192
SECONDS = float(os.environ.get("LOAD_SECONDS") or 600)
WORKER_KIB = 60 << 10
LARGE_DISK_KIB = 10 << 10


class Load:
    """What clients do to a worker, each in a thread of its own until `stop`."""

    def __init__(self, nbd: Nbd, libnbd: Any, directory: Path) -> None:
        self.nbd = nbd
        self.libnbd = libnbd
        self.directory = directory
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.done: dict[str, int] = {}

    @contextmanager
    def running(self, *actions: Callable[[], object]) -> Iterator[None]:
        threads = [threading.Thread(target=self._loop, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
        if self.failures:
            raise self.failures[0]

    def _loop(self, action: Callable[[], object]) -> None:
        try:
            while not self.stop.is_set():
                action()
                self.done[action.__name__] = self.done.get(action.__name__, 0) + 1
        except BaseException as error:  # noqa: BLE001 - it is raised in `running`
            self.failures.append(error)
            self.stop.set()

    def reads_at_random(self, vdi: Vdi) -> None:
        command = ["fio", "--name=random", f"--aux-path={self.directory}", "--ioengine=nbd", "--rw=randread"]
        command += [f"--uri={self.nbd.uri(vdi)}", "--bs=4k", "--iodepth=16", f"--size={vdi.size}"]
        self._run(*command, "--time_based", "--runtime=10", "--norandommap")

    def writes_at_random(self, vdi: Vdi, seed: int) -> None:
        """All over the disk, in more blocks than a writer remembers before it stores what it knows."""
        chance = random.Random(seed)
        writer = self.nbd.connect(self.libnbd, vdi, write=True)
        data = os.urandom(4096)
        for number in range(2000):
            place = chance.randrange(PLACES) * (vdi.size // PLACES)
            match number % 8:
                case 6:
                    writer.trim(MIB, min(place, vdi.size - MIB))
                case 7:
                    writer.flush()
                case _:
                    writer.pwrite(data[: chance.choice((512, 4096))], place)
            if self.stop.is_set():
                break
        writer.shutdown()

    def copies(self, vdi: Vdi) -> None:
        self._run("nbdcopy", "--connections=4", self.nbd.uri(vdi), "null:")

    def maps(self, vdi: Vdi) -> None:
        self._run("nbdinfo", "--map", "--totals", self.nbd.uri(vdi))

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def spread(nbd: Nbd, libnbd: Any, vdi: Vdi, every: int) -> None:
    """A little data in so many places that the whole table of blocks is used."""
    writer = nbd.connect(libnbd, vdi, write=True)
    for place in range(0, vdi.size, every):
        writer.pwrite(b"s" * 4096, place)
    writer.shutdown()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_minutes_of_load_leave_a_worker_small(own_nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    nbd, load = own_nbd, Load(own_nbd, libnbd, tmp_path)
    read, written = nbd.site.create_vdi(LARGEST), nbd.site.create_vdi(LARGEST)
    small, chain = nbd.site.create_vdi(64 * MIB), nbd.site.create_vdi(64 * MIB)
    spread(nbd, libnbd, read, 2 * GIB)
    for _ in range(3):
        spread(nbd, libnbd, chain, 256 << 10)
        nbd.site.gateway.call("VDI.snapshot", chain.ref)
    samples: list[int] = []

    def watch() -> None:
        samples.append(status(nbd, "VmRSS"))
        time.sleep(0.1)

    def read_large() -> None:
        load.reads_at_random(read)

    def write_large() -> None:
        load.writes_at_random(written, len(samples))

    def write_small() -> None:
        load.writes_at_random(small, len(samples))

    def copy_chain() -> None:
        load.copies(chain)

    def map_large() -> None:
        load.maps(read)

    with load.running(watch, read_large, write_large, write_small, copy_chain, map_large):
        load.stop.wait(SECONDS)
    # One connection reads a large disk, one writes one, and one maps one.
    most = WORKER_KIB + 3 * LARGE_DISK_KIB
    first = max(samples[: len(samples) // 5])
    wait_until(lambda: nbd.site.gateway.call("VDI.get_current_operations", read.ref) == {}, "the last to go")
    sys.stdout.write(
        f"{load.done}; memory in KiB: at most {max(samples)}, in the first fifth {first},"
        f" after all {status(nbd, 'VmRSS')}\n"
    )
    assert max(samples) < most
    assert status(nbd, "VmRSS") < WORKER_KIB
    assert nbd.process.poll() is None
    assert "Traceback" not in nbd.log(), nbd.log()
    for vdi in (written, small):
        assert check_vhd(str(vdi.file)).errors == ()
        nbd.site.gateway.call("VDI.destroy", vdi.ref)
