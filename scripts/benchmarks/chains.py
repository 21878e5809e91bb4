#!/usr/bin/env -S .venv/bin/python
"""Snapshots, clones and coalesce of a running gateway, beside what cp costs.

    scripts/bench chains [--size MiB] [--rounds N] [--only GROUP] [--directory DIR]

Groups: coalesce, fork, open. A coalesce is timed from the call of VDI.destroy for the snapshot until its
task has ended; its peer is `cp` of the same image followed by `sync`. The chain is dense: every block of the
child is whole. "into its own blocks" means that the parent had none of them, "over blocks" that it had them
all. A markdown table goes to stdout.
"""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(dirname(abspath(__file__))))

# ruff: noqa: E402
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from gateway.access.client import open_vdi
from scripts.benchmarks.harness import chain
from scripts.benchmarks.harness.groups import Benchmark, add_groups, run_groups
from scripts.benchmarks.harness.measure import (
    GIB,
    MIB,
    interleave,
    log,
    timed,
    touch_memory,
    wait_for_quiet,
)
from scripts.benchmarks.harness.workplace import Workplace, options_of, workplace, write_noise


class Bench(Benchmark):
    def __init__(self, place: Workplace, size: int, rounds: int) -> None:
        super().__init__(place, size, rounds)
        self.longest_relink = 0.0
        self._noise = os.urandom(8 * MIB)

    # --- what is measured -----------------------------------------------------------------------------------

    def coalesce(self) -> None:
        thin = interleave(
            "coalesce into its own blocks",
            self.size,
            {"gateway": lambda: self._coalesced(over_blocks=False), "cp and sync": self._copied},
            rounds=self.rounds,
        )
        name = f"coalesce of {self.size // MIB} MiB"
        self.report.compare(f"{name}, into its own blocks", thin, "gateway", "cp and sync", at_least=0.8)
        dense = interleave(
            "coalesce over blocks",
            self.size,
            {"gateway": lambda: self._coalesced(over_blocks=True), "cp and sync": self._copied},
            rounds=self.rounds,
        )
        self.report.compare(f"{name}, over blocks", dense, "gateway", "cp and sync", at_least=0.8)
        self.report.figure("longest relink", self.longest_relink, "ms", below=200)
        self._let_in()

    def fork(self) -> None:
        """Snapshots and clones of thin and of full tables."""
        for size, bound in ((64 * GIB, 20), (chain.LARGEST, 60)):
            for full in (False, True):
                for operation in ("snapshot", "clone"):
                    median = statistics.median(self._forks(operation, size, full))
                    state = "full" if full else "empty"
                    name = f"VDI.{operation} of {size // GIB} GiB, {state} table"
                    self.report.figure(name, median * 1000, "ms", below=bound)

    def open(self) -> None:
        directory = self.directory / "deep"
        directory.mkdir()
        self.report.figure(
            "opening a 2040 GiB VHD chain of depth 30", chain.milliseconds(directory, 30), "ms", below=50
        )

    # --- steps ----------------------------------------------------------------------------------------------

    def _coalesced(self, *, over_blocks: bool) -> float:
        with self._snapshotted(over_blocks=over_blocks) as (vdi, snapshot):
            touch_memory(self.size)
            start = time.perf_counter()
            self.gateway.destroy_vdi(snapshot)
            self._wait_for_coalesce(vdi)
            return time.perf_counter() - start

    def _let_in(self) -> None:
        """How long a reader waits who comes in the middle of the copy."""
        waits: list[float] = []
        for _ in range(self.rounds):
            with self._snapshotted(over_blocks=False) as (vdi, snapshot):
                self.gateway.destroy_vdi(snapshot)
                while not self._progress():
                    time.sleep(0.005)
                start = time.perf_counter()
                with closing(open_vdi(self.access, vdi, purpose="bench")):
                    waits.append(time.perf_counter() - start)
                self._wait_for_coalesce(vdi)
        log("a reader waited for " + ", ".join(f"{wait * 1000:.0f} ms" for wait in waits))
        self.report.figure(
            "longest wait of a reader who comes during the copy", max(waits) * 1000, "ms", below=200
        )

    @contextmanager
    def _snapshotted(self, *, over_blocks: bool) -> Iterator[tuple[str, str]]:
        """A disk whose leaf alone has data, or has it once more, and its snapshot; their uuids."""
        vdi = self.gateway.create_vdi("disk", self.size)
        if over_blocks:
            self._fill(vdi)
        snapshot = self.gateway.fork("snapshot", vdi)
        self._fill(vdi)
        os.sync()
        wait_for_quiet()
        yield vdi, snapshot
        self.gateway.destroy_vdi(vdi)

    def _fill(self, vdi: str) -> None:
        with self.writing(vdi) as disk:
            for offset in range(0, self.size, len(self._noise)):
                disk.pwrite(self._noise, offset)

    def _progress(self) -> float:
        return max((task["progress"] for task in self.gateway.coalesces()), default=0.0)

    def _wait_for_coalesce(self, vdi: str) -> None:
        """Until the disk has no parent any more and no coalesce is pending."""
        while True:
            pending = [task for task in self.gateway.coalesces() if task["status"] == "pending"]
            if not pending and not self.gateway.has_parent(vdi):
                break
            failed = [task for task in self.gateway.coalesces() if task["status"] == "failure"]
            if failed:
                raise RuntimeError(f"a coalesce failed: {failed[0]['error_info']}")
            time.sleep(0.05)  # often asked, it would take the processor from what is measured
        relinks = [
            float(task["other_config"].get("longest-relink-ms", 0)) for task in self.gateway.coalesces()
        ]
        self.longest_relink = max([self.longest_relink, *relinks])

    def _copied(self) -> float:
        source = self.directory / "source"
        if not source.exists():
            write_noise(source, self.size, self._noise)
            os.sync()
        target = self.directory / "target"
        target.unlink(missing_ok=True)
        copy = ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source), str(target)]
        touch_memory(self.size)
        try:
            return timed(lambda: subprocess.run(copy, check=True))
        finally:
            target.unlink(missing_ok=True)

    def _forks(self, operation: str, size: int, full: bool) -> list[float]:
        taken = []
        vdi = self.gateway.create_vdi("disk", size)
        if full:
            chain.fill(self.gateway.image("disk", vdi), every=1)
        wait_for_quiet()
        made = []
        for _ in range(max(self.rounds, 3)):
            start = time.perf_counter()
            made.append(self.gateway.fork(operation, vdi))
            taken.append(time.perf_counter() - start)
        for uuid in [*made, vdi]:
            self.gateway.destroy_vdi(uuid)
        return taken


GROUPS: dict[str, Callable[[Bench], None]] = {
    "coalesce": Bench.coalesce,
    "fork": Bench.fork,
    "open": Bench.open,
}


def main() -> None:
    parser = options_of("chains", __doc__, directory="on the disk to measure")
    add_groups(parser, GROUPS, size=4096, of="of the disk to coalesce")
    options = parser.parse_args()
    with workplace("chains", options.directory) as place:
        run_groups(Bench, GROUPS, place, options)


if __name__ == "__main__":
    main()
