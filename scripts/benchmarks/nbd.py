#!/usr/bin/env -S .venv/bin/python
"""NBD exports of a running gateway beside nbdkit's file plugin (C) and qemu-nbd.

    scripts/bench nbd [--size MiB] [--rounds N] [--only GROUP] [--tcp] [--parallel]
        [--directory DIR]

Groups: read, random, write, partial, sparse, memory. The same bytes are a raw VDI, a dense chain of three
VHDs whose blocks are spread over its levels, a raw file, and a VHD for qemu-nbd. The peer of a comparison
with the file plugin is the better of `-t 16`, its default, and `-t 4`. Everything lies in memory (/dev/shm)
unless `--directory` says where, so that programs are measured and not disks; a write ends with a flush. All
servers listen on Unix sockets, with `--tcp` on TCP ports of loopback. With `--parallel` the plugin has four
requests of a connection at a time with any nbdkit, see docs/nbd.md. A markdown table goes to stdout.
"""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(dirname(abspath(__file__))))

# ruff: noqa: E402
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from scripts.benchmarks.harness.groups import Benchmark, add_groups, run_groups
from scripts.benchmarks.harness.measure import GIB, MIB, Rounds, interleave, timed, touch_memory
from scripts.benchmarks.harness.nbd_servers import Address, Server, export, file_plugin, plugin, qemu_nbd
from scripts.benchmarks.harness.peers import free_port
from scripts.benchmarks.harness.workplace import IN_MEMORY, Workplace, options_of, workplace, write_noise

BLOCK = 2 * MIB
RAW, CHAIN, PARTIAL = "raw VDI", "VHD chain of depth 3", "VHD chain with partial bitmaps"
C16, C4, QEMU = "file plugin -t 16", "file plugin -t 4", "qemu-nbd -f vpc"
RANDOM_SECONDS = 4


class Bench(Benchmark):
    tcp = False
    parallel = False

    def __init__(self, place: Workplace, size: int, rounds: int) -> None:
        super().__init__(place, size, rounds)
        self._noise = os.urandom(64 * MIB)
        self.ours = self._serve(plugin, self.access, self.parallel)
        self.file = self.directory / "flat.raw"
        write_noise(self.file, size, self._noise)
        self.vpc = self.directory / "flat.vhd"
        self.run("qemu-img", "convert", "-O", "vpc", "-o", "force_size=on", self.file, self.vpc)
        self.raw = self.gateway.create_vdi("disk", size, "raw")
        self._fill(self.raw, 1)
        self.chain = self._chain(partial=False)

    # --- what is measured -----------------------------------------------------------------------------------

    def read(self) -> None:
        for piece in (256 << 10, MIB):
            rounds = interleave(
                f"read in {piece >> 10} KiB",
                self.size,
                {name: self._copier(uri, piece) for name, uri in self._exports.items()},
                rounds=self.rounds,
            )
            name = f"sequential read, {piece >> 10} KiB × 4 connections"
            self._compare(name, rounds, RAW, 1.0)
            self._compare(name, rounds, CHAIN, 1.1)
            wanted = 2.5 if piece == MIB else None
            self.report.compare(f"{name}: {CHAIN}", rounds, CHAIN, QEMU, at_least=wanted)

    def random(self) -> None:
        rounds = interleave(
            "random read",
            100_000 * 4096,
            {name: self._random_reader(uri) for name, uri in self._exports.items()},
            rounds=self.rounds,
        )
        name = "random read, 4 KiB, depth 16 × 4 jobs"
        self._compare(name, rounds, RAW, 0.95)
        self._compare(name, rounds, CHAIN, 0.85)
        self.report.compare(f"{name}: {CHAIN}", rounds, CHAIN, QEMU, at_least=2)
        self.report.notes.append("random reads are shown as the time of 100,000 of them")

    def write(self) -> None:
        rounds = interleave(
            "write",
            self.size,
            {
                "thin VHD": self._write_ours,
                C16: lambda: self._write_flat(16),
                C4: lambda: self._write_flat(4),
                QEMU: self._write_qemu,
            },
            rounds=self.rounds,
        )
        name = "sequential write, 1 connection"
        self._compare(name, rounds, "thin VHD", 1.0)
        self.report.compare(f"{name}: thin VHD", rounds, "thin VHD", QEMU, at_least=2)

    def partial(self) -> None:
        """Each block of the leaf has scattered pages."""
        vdi = self._chain(partial=True)
        rounds = interleave(
            "partial bitmaps",
            self.size,
            {
                CHAIN: self._copier(export(self.ours, self.chain), MIB),
                PARTIAL: self._copier(export(self.ours, vdi), MIB),
            },
            rounds=self.rounds,
        )
        self.report.compare("sequential read: partial bitmaps", rounds, PARTIAL, CHAIN, at_least=0.8)

    def sparse(self) -> None:
        """1 TiB of which as much is allocated as the dense disks have, one block every so often."""
        blocks = self.size // BLOCK
        vdi = self.gateway.create_vdi("disk", 1024 * GIB)
        self._fill(vdi, 1024 * GIB // self.size)
        self.gateway.fork("snapshot", vdi)
        rounds = interleave(
            "qemu-img convert",
            self.size,
            {
                "sparse 1 TiB chain": lambda: self._convert(vdi),
                "dense chain": lambda: self._convert(self.chain),
            },
            rounds=self.rounds,
        )
        name = f"qemu-img convert of {blocks} blocks spread over 1 TiB"
        self.report.compare(name, rounds, "sparse 1 TiB chain", "dense chain", at_least=0.5)

    def memory(self) -> None:
        self.report.figure("worker after all that", self.ours.resident() / MIB, "MiB", below=60)
        large = self.gateway.create_vdi("disk", 2040 * GIB)
        self._fill(large, 2040 * GIB // (64 * MIB))
        before = most = self.ours.resident()
        looks = [f"read {place}G 4k" for place in range(0, 2040, 2)]
        arguments = [part for look in [*looks, "map"] for part in ("-c", look)]
        command = ["qemu-io", "-f", "raw", "-r", *arguments, export(self.ours, large)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as reader:
            while reader.poll() is None:
                most = max(most, self.ours.resident())
                time.sleep(0.01)
        grown = (most - before) / MIB
        self.report.figure("an open disk of 2040 GiB, looked at everywhere", grown, "MiB more", below=10)

    # --- steps ----------------------------------------------------------------------------------------------

    def _compare(self, name: str, rounds: Rounds, ours: str, at_least: float) -> None:
        self.report.compare(f"{name}: {ours}", rounds, ours, rounds.fastest((C16, C4)), at_least=at_least)

    def _serve(self, make: Callable[..., Server], *arguments: object) -> Server:
        return self.place.running.enter_context(make(self._address(), *arguments))

    def _address(self) -> Address:
        return free_port() if self.tcp else Path(tempfile.mktemp(prefix="nbd-", dir=self.directory))

    @cached_property
    def _exports(self) -> dict[str, str]:
        """The URI of each contestant that reads."""
        return {
            RAW: export(self.ours, self.raw),
            CHAIN: export(self.ours, self.chain),
            C16: self._serve(file_plugin, self.file, 16).uri,
            C4: self._serve(file_plugin, self.file, 4).uri,
            QEMU: self._serve(qemu_nbd, self.vpc, "vpc").uri,
        }

    def _copier(self, uri: str, piece: int) -> Callable[[], float]:
        command = ["nbdcopy", "--connections=4", f"--request-size={piece}", "--no-extents", uri, "null:"]
        return lambda: timed(lambda: self.run(*command))

    def _random_reader(self, uri: str) -> Callable[[], float]:
        options = ["--ioengine=nbd", f"--uri={uri}", f"--size={self.size}"]
        options += ["--iodepth=16", "--numjobs=4", "--group_reporting"]
        return lambda: self.random_reads(RANDOM_SECONDS, *options)

    def _write_ours(self) -> float:
        vdi = self.gateway.create_vdi("disk", self.size)
        try:
            return self._write_to(export(self.ours, vdi, write=True))
        finally:
            self.gateway.destroy_vdi(vdi)

    def _write_flat(self, threads: int) -> float:
        target = self.directory / "target.raw"
        with target.open("wb") as file:
            file.truncate(self.size)
        try:
            with file_plugin(self._address(), target, threads) as server:
                return self._write_to(server.uri)
        finally:
            target.unlink()

    def _write_qemu(self) -> float:
        target = self.directory / "target.vhd"
        self.run("qemu-img", "create", "-f", "vpc", "-o", "force_size=on", target, str(self.size))
        try:
            with qemu_nbd(self._address(), target, "vpc", write=True) as server:
                return self._write_to(server.uri)
        finally:
            target.unlink()

    def _write_to(self, uri: str) -> float:
        touch_memory(self.size)
        return timed(lambda: self.run("nbdcopy", "--connections=1", "--flush", self.file, uri))

    def _convert(self, vdi: str) -> float:
        target = self.directory / "converted"
        try:
            return timed(lambda: self.run("qemu-img", "convert", "-O", "raw", export(self.ours, vdi), target))
        finally:
            target.unlink()

    def _chain(self, *, partial: bool) -> str:
        """A disk over two snapshots: the root has all blocks, each child some of them, or pages of all."""
        vdi = self.gateway.create_vdi("disk", self.size)
        self._fill(vdi, 1)
        for level in (2, 3):
            self.gateway.fork("snapshot", vdi)
            if not partial:
                self._fill(vdi, level)
                continue
            with self.writing(vdi) as disk:
                for block in range(0, self.size, BLOCK):
                    for page in range(8):
                        place = block + (level * 37 + page * 64) % 512 * 4096
                        disk.pwrite(self._noise[:16384], min(place, block + BLOCK - 16384))
        return vdi

    def _fill(self, vdi: str, every: int) -> None:
        """Write every so many blocks."""
        with self.writing(vdi) as disk:
            for offset in range(0, disk.size, BLOCK * every):
                start = offset % len(self._noise)
                disk.pwrite(self._noise[start : start + BLOCK], offset)


GROUPS: dict[str, Callable[[Bench], None]] = {
    "read": Bench.read,
    "random": Bench.random,
    "write": Bench.write,
    "partial": Bench.partial,
    "sparse": Bench.sparse,
    "memory": Bench.memory,
}


def main() -> None:
    parser = options_of("nbd", __doc__, directory="where all files lie", default=IN_MEMORY)
    add_groups(parser, GROUPS, size=1024, of="of the disks", rounds=7)
    parser.add_argument("--tcp", action="store_true", help="over TCP on loopback, not Unix sockets")
    parser.add_argument("--parallel", action="store_true", help="several requests of a connection at a time")
    options = parser.parse_args()
    Bench.tcp, Bench.parallel = options.tcp, options.parallel
    with workplace("nbd", options.directory, options.directory) as place:
        run_groups(Bench, GROUPS, place, options)


if __name__ == "__main__":
    main()
