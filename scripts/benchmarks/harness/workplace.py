"""Where a benchmark works, and the options that all of them have."""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.benchmarks.harness.peers import ROOT


def options_of(name: str, doc: str | None, *, directory: str) -> argparse.ArgumentParser:
    """The parser of `scripts/bench NAME`; `directory` says what --directory is for."""
    first = (doc or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=first)
    place = ROOT / "build" / "benchmarks"
    parser.add_argument(
        "--directory", type=Path, default=place, help=f"{directory} (default build/benchmarks)"
    )
    return parser


def add_groups(parser: argparse.ArgumentParser, groups: Iterable[str], *, size: int, of: str) -> None:
    """The options of a benchmark that has groups and interleaved rounds; `size` is in MiB."""
    parser.add_argument("--size", type=int, default=size, metavar="MiB", help=f"{of} (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default %(default)s)")
    parser.add_argument(
        "--only", action="append", choices=groups, help="this group; may be given several times"
    )


def clean_up_at_sigterm() -> None:
    """Let SIGTERM, as of timeout(1), unwind what is open: servers would run on, and directories stay."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextmanager
def workplace(name: str, parent: Path) -> Iterator[tuple[Path, Path]]:
    """A directory below `parent`, on the disk to measure, and one in memory; both are removed afterwards.

    Each has an empty directory `sr`.
    """
    clean_up_at_sigterm()
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
    memory = Path(tempfile.mkdtemp(prefix="vdi-gateway-bench-", dir="/dev/shm"))
    try:
        for path in (directory, memory):
            (path / "sr").mkdir()
        yield directory, memory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
