#!/usr/bin/env -S .venv/bin/python
"""Disks in standard formats, out of a running gateway and into it, beside what qemu-img takes for the same.

    scripts/bench formats [--size MiB] [--rounds N] [--only GROUP] [--directory DIR]

Groups: export, first-byte, import, changed. The disk is half of what its chain of three VHDs can hold; all
of what is counted is in it, and in the page cache. qemu-img can't read chains of VHDs: it gets the same bytes
as a raw file with the same holes. Exports are files that nobody waits for until they are on the disk, imports
are durable on both sides. Images that are imported hold a quarter of the data: a disk that is written to for
longer sets the pace of everybody. A markdown table goes to stdout.
"""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(dirname(abspath(__file__))))

# ruff: noqa: E402
import http.client
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from scripts.benchmarks.harness import chain
from scripts.benchmarks.harness.groups import Benchmark, add_groups, run_groups
from scripts.benchmarks.harness.measure import MIB, Rounds, interleave, timed, touch_memory
from scripts.benchmarks.harness.workplace import Workplace, options_of, workplace, write_noise

# What qemu-img calls a format.
QEMU_IMG = "qemu-img convert"
DRIVERS = {"vhd": "vpc", "qcow2": "qcow2"}
BLOCK = 2 * MIB


class Bench(Benchmark):
    def __init__(self, place: Workplace, size: int, rounds: int) -> None:
        super().__init__(place, size, rounds)
        self._noise = os.urandom(BLOCK)

    # --- what is measured -----------------------------------------------------------------------------------

    def export(self) -> None:
        """Whole images; qemu-img writes a file."""
        vdi, source = self._chain(self.size), self.directory / "source.raw"
        self._curl(self.gateway.get_url(vdi), source)
        self._make_sparse(source)
        for image_format, at_least in (("vhd", 1.5), ("qcow2", 1.0)):
            rounds = self._export(image_format, vdi, source)
            name = f"GET {image_format} of a chain with {self.size // MIB} MiB"
            self.report.compare(name, rounds, "gateway", QEMU_IMG, at_least=at_least)
            self.report.compare(
                f"{name}, into a file", rounds, "gateway, into a file", QEMU_IMG, at_least=None
            )
        source.unlink()
        self.gateway.destroy_vdi(vdi)

    def first_byte(self) -> None:
        """From the request to the first byte of the image, of 2040 GiB in a chain of three."""
        for full, state in ((False, "empty"), (True, "full")):
            vdi, snapshots = self._largest(full=full)
            for image_format in ("vhd", "qcow2"):
                for base, kind in (("", "whole"), (f"&base={snapshots[0]}", "delta")):
                    url = f"{self.gateway.get_url(vdi)}&format={image_format}{base}"
                    waits = [self._first_byte(url) for _ in range(max(self.rounds, 5))]
                    name = f"first byte of {image_format}, {kind}, 2040 GiB, {state} tables"
                    self.report.figure(name, statistics.median(waits) * 1000, "ms", below=100)
            for uuid in (vdi, *snapshots):
                self.gateway.destroy_vdi(uuid)

    def import_(self) -> None:
        """Images into a VDI: until durable on the disk, and in memory, where syncs are free.

        In memory nobody waits for a disk, and the socket that an upload crosses is one copy more than
        qemu-img makes: what that costs is shown, and no target.
        """
        size = self.size // 4
        vdi, image = self._chain(size), self.directory / "image.vhd"
        self._curl(f"{self.gateway.get_url(vdi)}&format=vhd", image)
        self.gateway.destroy_vdi(vdi)
        qcow2 = self.directory / "image.qcow2"
        self._convert_in("vpc", image, qcow2, into="qcow2")
        dense = self._dense(size)
        for repository, where, at_least in (("disk", "until durable", 1.5), ("memory", "in memory", None)):
            target = self.gateway.create_vdi(repository, 2 * size)
            out = self.gateway.image(repository, target).parent.parent / "out.raw"
            for image_format, source, shape, wanted in (
                ("vhd", dense, "dense", at_least),
                ("vhd", image, "every other block", at_least),
                ("qcow2", qcow2, "every other block", None),
            ):
                rounds = self._import(image_format, source, target, out, size)
                name = f"PUT {image_format} with {size // MIB} MiB, {shape}, {where}"
                self.report.compare(name, rounds, "gateway", QEMU_IMG, at_least=wanted)
            self.gateway.destroy_vdi(target)
        for made in (image, qcow2, dense):
            made.unlink()

    def changed(self) -> None:
        """VDI.list_changed_blocks by XML-RPC, of 2040 GiB in a chain of three."""
        for full, state in ((False, "empty"), (True, "full")):
            vdi, snapshots = self._largest(full=full, tracked=True)
            for older, newer, what in (
                (snapshots[0], snapshots[1], "between two snapshots"),
                (snapshots[0], vdi, "since the snapshot before the last"),
            ):
                waits = []
                for _ in range(max(self.rounds, 5)):
                    seconds, bits = self.gateway.changed_blocks(older, newer)
                    waits.append(seconds)
                    assert len(bits) == 4 * (chain.LARGEST // BLOCK)
                    assert any(bits) is full
                name = f"list_changed_blocks {what}, 2040 GiB, {state} tables"
                self.report.figure(name, statistics.median(waits) * 1000, "ms", below=100)
            for uuid in (vdi, *snapshots):
                self.gateway.destroy_vdi(uuid)

    # --- steps ----------------------------------------------------------------------------------------------

    def _chain(self, size: int) -> str:
        """A disk of twice the size, of which each of three files has its share of the blocks."""
        vdi = self.gateway.create_vdi("disk", 2 * size)
        for level in range(3):
            if level:
                self.gateway.fork("snapshot", vdi)
            with self.writing(vdi) as disk:
                for number in range(level, size // BLOCK, 3):
                    disk.pwrite(self._noise, 2 * number * BLOCK)
        return vdi

    def _dense(self, size: int) -> Path:
        """A VHD of qemu-img's that has every block."""
        raw, image = self.directory / "dense.raw", self.directory / "dense.vhd"
        write_noise(raw, size)
        self.run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", raw, image)
        raw.unlink()
        return image

    def _largest(self, *, full: bool, tracked: bool = False) -> tuple[str, list[str]]:
        """A disk of 2040 GiB over two snapshots, of which each file has all blocks if `full`, else none."""
        vdi, snapshots = self.gateway.create_vdi("disk", chain.LARGEST), list[str]()
        if tracked:
            self.gateway.enable_cbt(vdi)
        for level in range(3):
            if level:
                snapshots.append(self.gateway.fork("snapshot", vdi))
            if full:
                chain.fill(self.gateway.image("disk", vdi), every=1)
        return vdi, snapshots

    def _make_sparse(self, path: Path) -> None:
        subprocess.run(["fallocate", "--dig-holes", str(path)], check=True)

    def _into(self, out: Path, work: Callable[[], None]) -> Callable[[], float]:
        """Everybody begins without a file, and with memory that was used once."""

        def run() -> float:
            out.unlink(missing_ok=True)
            touch_memory(self.size)
            taken = timed(work)
            out.unlink(missing_ok=True)
            return taken

        return run

    def _curl(self, url: str, out: Path) -> None:
        subprocess.run(["curl", "-sS", "--fail", "-o", str(out), url], check=True)

    def _convert(self, driver: str, source: Path, out: Path) -> None:
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", driver, str(source), str(out)], check=True)

    def _export(self, image_format: str, vdi: str, source: Path) -> Rounds:
        out = self.directory / f"out.{image_format}"
        url = f"{self.gateway.get_url(vdi)}&format={image_format}"
        contestants = {
            "gateway": self._into(out, lambda: self._curl(url, Path("/dev/null"))),
            # Writing what it receives, curl alone takes longer than the gateway.
            "gateway, into a file": self._into(out, lambda: self._curl(url, out)),
            QEMU_IMG: self._into(out, lambda: self._convert(DRIVERS[image_format], source, out)),
        }
        return interleave(f"GET {image_format}", self.size, contestants, rounds=self.rounds)

    def _import(self, image_format: str, image: Path, vdi: str, out: Path, size: int) -> Rounds:
        url = f"{self.gateway.put_url(vdi)}&format={image_format}"
        contestants = {
            "gateway": self._into(out, lambda: self._put(image, url)),
            QEMU_IMG: self._into(out, lambda: self._convert_in(DRIVERS[image_format], image, out)),
        }
        return interleave(f"PUT {image_format}", size, contestants, rounds=self.rounds)

    def _put(self, image: Path, url: str) -> None:
        command = ["curl", "-sS", "--fail", "-T", str(image), url]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        assert answer.stdout.startswith("success"), answer.stdout

    def _convert_in(self, driver: str, image: Path, out: Path, *, into: str = "raw") -> None:
        command = ["qemu-img", "convert", "-f", driver, "-O", into, str(image), str(out)]
        subprocess.run(command, check=True)
        subprocess.run(["sync", str(out)], check=True)

    def _first_byte(self, url: str) -> float:
        parts = urlsplit(url)
        assert parts.hostname is not None
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        connection.connect()
        start = time.perf_counter()
        connection.request("GET", f"{parts.path}?{parts.query}")
        answer = connection.getresponse()
        assert answer.read(1) == (b"c" if "format=vhd" in url else b"Q"), answer.status
        taken = time.perf_counter() - start
        connection.close()
        return taken


GROUPS: dict[str, Callable[[Bench], None]] = {
    "export": Bench.export,
    "first-byte": Bench.first_byte,
    "import": Bench.import_,
    "changed": Bench.changed,
}


def main() -> None:
    parser = options_of("formats", __doc__, directory="on the disk to measure")
    add_groups(parser, GROUPS, size=4096, of="of the data in the disk")
    options = parser.parse_args()
    with workplace("formats", options.directory) as place:
        run_groups(Bench, GROUPS, place, options)


if __name__ == "__main__":
    main()
