"""Interleaved rounds, medians and ratios, printed as one markdown table.

Contestants take turns within a round and the order rotates from round to round, so that a busy minute of
the machine falls on all of them. A ratio is made per round and its median is shown: absolute figures move by
±40 % from one machine to the next, ratios don't. Nothing here fails because something was slow; the verdict
column says it and the reader decides.
"""

import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MIB = 1 << 20
GIB = 1 << 30

QUIET_SECONDS = 0.3
QUIET_BUSY = 0.15
PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where there is no target or nothing to compare with."""

    name: str
    ours: str
    peer: str
    ratio: str
    target: str
    met: bool | None


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        log(f"{row.name}: {row.ours} | {row.peer} | {row.ratio} | target {row.target} | {_verdict(row.met)}")

    def figure(self, name: str, value: float, unit: str, *, below: float) -> None:
        """A figure of ours alone with an upper bound."""
        self.add(Row(name, f"{value:.3g} {unit}", "", "", f"< {below:g} {unit}", value < below))

    def compare(self, name: str, rounds: "Rounds", ours: str, peer: str, *, at_least: float | None) -> None:
        """How many times faster `ours` was than `peer`, by the median of the rounds' ratios."""
        if peer not in rounds.seconds or ours not in rounds.seconds:
            self.add(Row(name, "", "not measured", "", f"≥ {at_least:g} ×" if at_least else "", None))
            return
        ratios = [p / o for o, p in zip(rounds.seconds[ours], rounds.seconds[peer], strict=True)]
        ratio = statistics.median(ratios)
        self.add(
            Row(
                name,
                rounds.rate(ours),
                f"{peer}: {rounds.rate(peer)}",
                f"{ratio:.2f} × ({min(ratios):.2f}-{max(ratios):.2f})",
                f"≥ {at_least:g} ×" if at_least else "",
                ratio >= at_least if at_least else None,
            )
        )

    def markdown(self) -> str:
        lines = [
            machine_line(),
            "",
            "| measurement | VDI Gateway | peer | ratio | target | met |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.name} | {row.ours} | {row.peer} | {row.ratio} | {row.target} | {_verdict(row.met)} |"
            for row in self.rows
        ]
        lines += [""] + [f"- {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass
class Rounds:
    """Seconds of each contestant, one figure per round."""

    size: int
    seconds: dict[str, list[float]]

    def rate(self, name: str) -> str:
        """Median and range in GB/s (10^9 bytes), and the median in seconds."""
        times = self.seconds[name]
        fast, middle, slow = (self.size / t / 1e9 for t in (min(times), statistics.median(times), max(times)))
        return f"{middle:.2f} GB/s ({slow:.2f}-{fast:.2f}), {statistics.median(times):.3f} s"

    def fastest(self, names: Iterable[str]) -> str:
        """By the median, of those that were measured; the first where none was."""
        names = list(names)
        measured = [name for name in names if name in self.seconds]
        return min(measured, key=lambda name: statistics.median(self.seconds[name]), default=names[0])


def interleave(
    name: str, size: int, contestants: Mapping[str, Callable[[], float]], *, rounds: int
) -> Rounds:
    """Let every contestant run once per round; a contestant returns the seconds it took.

    One round before the counted ones warms page cache, free lists and connections of everybody alike."""
    order: Sequence[str] = list(contestants)
    seconds: dict[str, list[float]] = {contestant: [] for contestant in order}
    for number in range(rounds + 1):
        turn = number % len(order)
        for contestant in [*order[turn:], *order[:turn]]:
            os.sync()  # nobody pays for the dirty pages of the one before
            wait_for_quiet()
            taken = contestants[contestant]()
            if number:
                seconds[contestant].append(taken)
        log(f"{name}: round {number}/{rounds}: " + ", ".join(_latest(seconds, number)))
    return Rounds(size, seconds)


def wait_for_quiet() -> None:
    """Until the processors have been nearly idle for a moment, for as long as patience lasts.

    On a machine that others use too, a contestant with one busy thread and one with three suffer differently;
    waiting costs time and treats all alike.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        busy, total = _processor_ticks()
        time.sleep(QUIET_SECONDS)
        busy_then, total_then = _processor_ticks()
        if busy_then - busy <= QUIET_BUSY * (total_then - total):
            return


def touch_memory(length: int) -> None:
    """Take `length` bytes of memory from the kernel, use them once, and give them back.

    A virtual machine may have to get each free page from its host first, which takes longer than to copy a
    page. Whoever runs after another one has freed its pages is spared that; this spares both.
    """
    with mmap.mmap(-1, length) as memory:
        for offset in range(0, length, mmap.PAGESIZE):
            memory[offset] = 1


def _processor_ticks() -> tuple[int, int]:
    """Busy and all ticks of all processors since the machine started."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def machine_line() -> str:
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {os.uname().release}, "
        f"Python {sys.version.split()[0]}, load {load}, {now}"
    )


def log(text: str) -> None:
    """Progress goes to stderr, so that stdout holds the table alone."""
    print(text, file=sys.stderr, flush=True)


def _latest(seconds: Mapping[str, list[float]], number: int) -> list[str]:
    return [f"{name} {times[-1]:.3f} s" if number else name for name, times in seconds.items()]


def _verdict(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "**no**"
