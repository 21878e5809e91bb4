"""Where a benchmark works, and the options that all of them have."""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.harness.gateway import Gateway
from scripts.benchmarks.harness.measure import MIB
from scripts.benchmarks.harness.peers import ROOT

ON_DISK = "build/benchmarks"
IN_MEMORY = "/dev/shm"


def options_of(
    name: str, doc: str | None, *, directory: str, default: str = ON_DISK
) -> argparse.ArgumentParser:
    """The parser of `scripts/bench NAME`; `directory` says what --directory is for."""
    first = (doc or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=first)
    parser.add_argument(
        "--directory", type=Path, default=ROOT / default, help=f"{directory} (default {default})"
    )
    return parser


def positive(text: str) -> int:
    """The type of an option that says how many, of what there has to be at least one."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


@dataclass(frozen=True)
class Workplace:
    """A directory on the disk to measure and one in memory; `running` ends before they are removed."""

    directory: Path
    memory: Path
    running: ExitStack

    def gateway(self, name: str = "gateway") -> Gateway:
        """A gateway of this name, with an empty SR of its own in each directory."""
        disk, memory = self.directory / f"{name}-sr", self.memory / f"{name}-sr"
        disk.mkdir()
        memory.mkdir()
        return Gateway(self.directory / name, disk, memory)


@contextmanager
def workplace(name: str, parent: Path, memory: Path = Path(IN_MEMORY)) -> Iterator[Workplace]:
    """New directories below `parent` and `memory`; both are removed afterwards."""
    # As of timeout(1). It has to unwind what is open: servers would run on, and directories stay.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with ExitStack() as running:
        made = []
        for place in (parent.absolute(), memory.absolute()):
            try:
                place.mkdir(parents=True, exist_ok=True)
                directory = tempfile.TemporaryDirectory(
                    prefix=f"bench-{name}-", dir=place, ignore_cleanup_errors=True
                )
            except OSError as error:
                sys.exit(f"scripts/bench {name}: {error}")
            made.append(Path(running.enter_context(directory)))
        yield Workplace(made[0], made[1], running)


def write_noise(path: Path, size: int, noise: bytes = b"") -> None:
    """Make a file of `size` bytes: `noise`, or else 64 MiB of it, again and again."""
    noise = noise or os.urandom(min(size, 64 * MIB))
    with path.open("wb") as file:
        for start in range(0, size, len(noise)):
            file.write(noise[: size - start])
