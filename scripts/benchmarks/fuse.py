#!/usr/bin/env -S .venv/bin/python
"""`vdi-gateway mount` beside qemu-storage-daemon's FUSE export and nbdfuse over nbdkit's file plugin.

    scripts/bench fuse [--size MiB] [--rounds N] [--only GROUP] [--directory DIR]

Groups: sequential, random, listing, memory. The same bytes, an ext4 with one large file, are a raw VDI, a
dense chain of three VHDs whose blocks are spread over its levels, and a raw file for the peers.
qemu-storage-daemon runs with each of its two ways to read a file, and the better one counts. Everything lies
in memory (/dev/shm) unless `--directory` says where, so that programs are measured and not disks. It needs
root, for mounts and loop devices. A markdown table goes to stdout.
"""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(dirname(abspath(__file__))))

# ruff: noqa: E402
import os
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from gateway.images.vhd.create import create_dynamic
from scripts.benchmarks.harness import chain
from scripts.benchmarks.harness.fuse_mounts import GatewayMount, NbdFuse, StorageDaemon, ext4, loop_device
from scripts.benchmarks.harness.gateway import PROGRAM
from scripts.benchmarks.harness.groups import Benchmark, add_groups, run_groups
from scripts.benchmarks.harness.measure import GIB, MIB, interleave, timed, touch_memory
from scripts.benchmarks.harness.peers import PeerUnavailableError, wait_for
from scripts.benchmarks.harness.workplace import IN_MEMORY, Workplace, options_of, workplace, write_noise

BLOCK = 2 * MIB
RAW, CHAIN = "raw VDI", "VHD chain of depth 3"
DAEMONS = {"qemu-storage-daemon": "threads", "qemu-storage-daemon, io_uring": "io_uring"}
NBDFUSE = "nbdfuse"
RANDOM_SECONDS = 3
LISTED = 10_000
READERS = 50


class Bench(Benchmark):
    def __init__(self, place: Workplace, size: int, rounds: int) -> None:
        super().__init__(place, size, rounds)
        self.mount = place.running.enter_context(GatewayMount(self.directory / "mount", self.gateway.state))

    # --- what is measured -----------------------------------------------------------------------------------

    def sequential(self) -> None:
        """Each file from its first byte to its last."""
        rounds = interleave(
            "dd bs=1M",
            self.size,
            {name: self._reader(file) for name, file in self._files.items()},
            rounds=self.rounds,
        )
        name = "dd bs=1M"
        self.report.compare(f"{name}: {RAW}", rounds, RAW, rounds.fastest(DAEMONS), at_least=3)
        self.report.compare(f"{name}: {RAW}", rounds, RAW, NBDFUSE, at_least=1.5)
        self.report.compare(f"{name}: {CHAIN}", rounds, CHAIN, RAW, at_least=0.9)

    def random(self) -> None:
        """In the large file of the ext4, with O_DIRECT, through a loop device with direct I/O."""
        files = {}
        for number, (name, file) in enumerate(self._files.items()):
            device = self.peers.enter_context(loop_device(file))
            mounted = self.peers.enter_context(ext4(device, self.directory / f"ext4-{number}"))
            files[name] = mounted / "large"
        for engine, depth in (("psync", 1), ("libaio", 16)):
            name = f"4 KiB random read, {engine}, depth {depth}"
            rounds = interleave(
                name,
                100_000 * 4096,
                {each: self._random_reader(file, engine, depth) for each, file in files.items()},
                rounds=self.rounds,
            )
            self.report.compare(f"{name}: {RAW}", rounds, RAW, NBDFUSE, at_least=1)
            self.report.compare(f"{name}: {CHAIN}", rounds, CHAIN, NBDFUSE, at_least=1)
            self.report.compare(f"{name}: {RAW}", rounds, RAW, rounds.fastest(DAEMONS), at_least=None)
        self.report.notes.append("random reads are shown as the time of 100,000 of them")

    def listing(self) -> None:
        """The directory of an SR with so many VDIs, which the mount has heard of but nobody has looked at."""
        images = self.gateway.directories["memory"]
        for _ in range(LISTED):
            create_dynamic(str(images / f"{uuid.uuid4()}.vhd"), GIB)
        command = [str(PROGRAM), "sr-scan", "--state-dir", str(self.gateway.state), "memory"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        top = self.mount.point / "memory"
        wait_for(lambda: len(os.listdir(top)) == LISTED, "so many VDIs", self.mount.process, 60)
        for name, program in (
            ("ls", ["ls", "-f", str(top)]),
            ("ls -l", ["ls", "-l", str(top)]),
            ("find -maxdepth 1 -type d", ["find", str(top), "-maxdepth", "1", "-type", "d"]),
        ):
            # The kernel believes names and attributes for a second; here it has to ask again.
            taken = [self._after_a_while(program) for _ in range(self.rounds)]
            self.report.figure(f"{name} of {LISTED:,} VDIs", statistics.median(taken), "s", below=1)

    def memory(self) -> None:
        """Readers of small disks, whole, and of disks of 2040 GiB with full tables, here and there."""
        noise = os.urandom(BLOCK)
        small, large = [], []
        for number in range(READERS):
            if number % 5:
                vdi = self.gateway.create_vdi("disk", 16 * MIB)
                with self.writing(vdi) as disk:
                    for offset in range(0, disk.size, BLOCK):
                        disk.pwrite(noise, offset)
                small.append(vdi)
            else:
                vdi = self.gateway.create_vdi("disk", chain.LARGEST)
                chain.fill(self.gateway.image("disk", vdi), every=1)
                large.append(vdi)
        # Of a new process: the measurements before have left nothing in it.
        with GatewayMount(self.directory / "fresh", self.gateway.state) as mount, ExitStack() as stack:
            started = mount.resident()
            files = [mount.of(vdi) for vdi in small]
            files += [
                mount.of(vdi, ("disk.raw", "disk.raw", "disk.vhd", "disk.qcow2")[number % 4])
                for number, vdi in enumerate(large)
            ]
            readers = [stack.enter_context(_reading(file)) for file in files]
            most = started
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline:
                most = max(most, mount.resident())
                time.sleep(0.01)
            ended = [reader.args for reader in readers if reader.poll() is not None]
            if ended:
                raise RuntimeError(f"readers have ended: {ended}")
        name = f"{READERS} readers at once, {len(large)} of disks of 2040 GiB"
        self.report.figure(name, most / MIB, "MiB", below=200)
        self.report.notes.append(f"a mount that nobody reads has {started / MIB:.0f} MiB")

    # --- steps ----------------------------------------------------------------------------------------------

    @cached_property
    def _files(self) -> dict[str, Path]:
        """One file with the same bytes of each contestant."""
        flat = self.directory / "flat.raw"
        self._make_ext4(flat)
        raw = self.gateway.create_vdi("disk", self.size, "raw")
        self._write(flat, raw, level=1)
        dense = self.gateway.create_vdi("disk", self.size)
        for level in (1, 2, 3):
            if level > 1:
                self.gateway.fork("snapshot", dense)
            self._write(flat, dense, level=level)
        made = {RAW: self.mount.of(raw), CHAIN: self.mount.of(dense)}
        for number, (name, engine) in enumerate(DAEMONS.items()):
            point = self.directory / f"daemon-{number}"
            try:
                made[name] = self.place.running.enter_context(StorageDaemon(point, flat, engine)).file
            except (PeerUnavailableError, FileNotFoundError) as missing:
                self.report.notes.append(f"{name} was not measured: {missing}")
        made[NBDFUSE] = self.place.running.enter_context(NbdFuse(self.directory / "nbdfuse", flat)).file
        for file in made.values():
            subprocess.run(["cmp", str(flat), str(file)], check=True)
        return made

    def _make_ext4(self, flat: Path) -> None:
        """An ext4 whose only file leaves little room."""
        write_noise(flat, self.size)
        with tempfile.TemporaryDirectory(dir=self.directory) as content:
            write_noise(Path(content) / "large", self.size * 7 // 8)
            command = ["mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-O", "^has_journal", "-d", content]
            subprocess.run([*command, str(flat)], check=True)

    def _write(self, source: Path, vdi: str, *, level: int) -> None:
        """Every so many blocks."""
        with self.writing(vdi) as disk, source.open("rb") as file:
            for offset in range(0, disk.size, BLOCK * level):
                disk.pwrite(os.pread(file.fileno(), BLOCK, offset), offset)

    def _reader(self, file: Path) -> Callable[[], float]:
        def read() -> float:
            # Whoever has his bytes in the page cache gives them back, and gets pages that are warm.
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            touch_memory(self.size)
            return timed(lambda: self.run("dd", f"if={file}", "of=/dev/null", "bs=1M", "iflag=fullblock"))

        return read

    def _random_reader(self, file: Path, engine: str, depth: int) -> Callable[[], float]:
        options = [f"--filename={file}", "--readonly", "--direct=1"]
        options += [f"--ioengine={engine}", f"--iodepth={depth}"]
        return lambda: self.random_reads(RANDOM_SECONDS, *options)

    def _after_a_while(self, command: list[str]) -> float:
        time.sleep(1.2)
        return timed(lambda: self.run(*command))


READ_FOR_EVER = """
import os, random, sys
file = os.open(sys.argv[1], os.O_RDONLY)
size, rng = os.fstat(file).st_size, random.Random(1)
if size < 1 << 30:
    while True:
        for offset in range(0, size, 1 << 20):
            assert os.pread(file, 1 << 20, offset)
while True:
    assert os.pread(file, rng.choice((4096, 1 << 20)), rng.randrange(size >> 20) << 20)
"""


@contextmanager
def _reading(file: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", READ_FOR_EVER, str(file)]) as reader:
        try:
            yield reader
        finally:
            reader.kill()


GROUPS: dict[str, Callable[[Bench], None]] = {
    "sequential": Bench.sequential,
    "random": Bench.random,
    "listing": Bench.listing,
    "memory": Bench.memory,
}


def main() -> None:
    parser = options_of("fuse", __doc__, directory="where all files lie", default=IN_MEMORY)
    add_groups(parser, GROUPS, size=1024, of="of the disks")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("mounts and loop devices need root; run it as root")
    with workplace("fuse", options.directory, options.directory) as place:
        run_groups(Bench, GROUPS, place, options)


if __name__ == "__main__":
    main()
