"""A benchmark of groups, which are methods of one class and run one after the other.

What a group leaves running for those after it goes into `place.running`; what it alone needs goes into
`peers`, which ends with the group. Neither outlives a group that fails.
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar

from gateway.access.client import AccessDisk, open_vdi
from scripts.benchmarks.harness.measure import MIB, Report, log
from scripts.benchmarks.harness.workplace import Workplace, positive


class Benchmark:
    """What the groups have in common: a gateway, the options, and the report; `size` is in bytes."""

    def __init__(self, place: Workplace, size: int, rounds: int) -> None:
        self.place = place
        self.directory = place.directory
        self.size = size
        self.rounds = rounds
        self.report = Report()
        self.gateway = place.running.enter_context(place.gateway())
        self.access = str(self.gateway.state / "access.sock")
        self.peers = ExitStack()

    def run(self, *command: str | Path) -> str:
        """The standard output of a program; RuntimeError with its last words where it fails."""
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False, cwd=self.directory
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stderr.strip()[-500:]}")
        return done.stdout

    @contextmanager
    def writing(self, vdi: str) -> Iterator[AccessDisk]:
        """A disk of the gateway, through its control socket; flushed in the end."""
        with closing(open_vdi(self.access, vdi, write=True, purpose="bench")) as disk:
            yield disk
            disk.flush()

    def random_reads(self, seconds: int, *options: str) -> float:
        """Seconds for 100,000 requests of 4 KiB, by what fio counts in so many seconds."""
        output = self.run(
            *("fio", "--name=random", "--rw=randread", "--bs=4k", "--output-format=json"),
            *("--time_based", f"--runtime={seconds}", *options),
        )
        document = json.loads(output[output.index("{") :])
        return 100_000 / float(document["jobs"][0]["read"]["iops"])


B = TypeVar("B", bound=Benchmark)


def add_groups(
    parser: argparse.ArgumentParser, groups: Iterable[str], *, size: int, of: str, rounds: int = 5
) -> None:
    """The options of a benchmark that has groups and interleaved rounds; `size` is in MiB."""
    parser.add_argument(
        "--size", type=positive, default=size, metavar="MiB", help=f"{of} (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="counted rounds (default %(default)s)"
    )
    parser.add_argument(
        "--only", action="append", choices=groups, help="this group; may be given several times"
    )


def run_groups(
    kind: type[B],
    groups: Mapping[str, Callable[[B], None]],
    place: Workplace,
    options: argparse.Namespace,
) -> None:
    """Run the groups that were asked for, or else all, and print the table."""
    bench = kind(place, options.size * MIB, options.rounds)
    for name in options.only or groups:
        log(f"== {name}")
        with bench.peers:
            groups[name](bench)
    print(bench.report.markdown())
