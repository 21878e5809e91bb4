#!/usr/bin/env -S .venv/bin/python
"""Taking and releasing a lease, inside the gateway and by another process through the control socket.

    scripts/bench leases [--samples N] [--directory DIR]

Medians. The first figures are `Leases.acquire` and `release` alone, which is three calls in another thread
and little else: what one of them costs here is told before them, because that differs most between machines.
The last figures hold a connection, the disk made of the descriptors, and the wait until the gateway has let
others in. A markdown table goes to stdout.
"""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(dirname(abspath(__file__))))

# ruff: noqa: E402
import statistics
import time
from pathlib import Path

import trio

from gateway.access.client import open_vdi
from gateway.core.leases import Holder, LeaseMode, Leases
from scripts.benchmarks.harness.measure import MIB, Report, Row, wait_for_quiet
from scripts.benchmarks.harness.workplace import options_of, positive, workplace

LONGEST = 0.5  # ms; what taking and releasing may cost inside the gateway


async def inside(path: Path, mode: LeaseMode, samples: int) -> float:
    """The median in milliseconds."""
    leases, taken = Leases(), []
    for _ in range(samples):
        start = time.perf_counter()
        lease = await leases.acquire(str(path), mode, Holder("bench", mode.value, "OpaqueRef:vdi"))
        lease.release()
        await lease.released()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1000


async def in_a_thread(samples: int) -> float:
    """The median in milliseconds of a call of nothing in another thread, and back."""
    taken = []
    for _ in range(samples):
        start = time.perf_counter()
        await trio.to_thread.run_sync(_nothing)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1000


def _nothing() -> None:
    pass


def through_the_socket(control_socket: Path, vdi: str, samples: int, *, write: bool) -> float:
    """The median in milliseconds."""
    taken = []
    for _ in range(samples):
        start = time.perf_counter()
        open_vdi(str(control_socket), vdi, write=write, purpose="bench").close()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1000


def main() -> None:
    parser = options_of("leases", __doc__, directory="for the gateway's state")
    parser.add_argument("--samples", type=positive, default=1000, help="(default %(default)s)")
    options = parser.parse_args()
    report = Report()
    with workplace("leases", options.directory) as place:
        with place.gateway() as gateway:
            wait_for_quiet()
            median = trio.run(in_a_thread, options.samples)
            report.add(Row("a call in another thread and back", f"{median:.3g} ms", "", "", "", None))
            for image_format in ("raw", "vhd"):
                vdi = gateway.create_vdi("disk", 1024 * MIB, image_format)
                file = gateway.image("disk", vdi)
                for mode in (LeaseMode.READ, LeaseMode.WRITE):
                    name = f"{image_format}, {mode.value}"
                    median = trio.run(inside, file, mode, options.samples)
                    report.figure(f"lease, {name}", median, "ms", below=LONGEST)
                    write = mode is LeaseMode.WRITE
                    samples = max(options.samples // (5 if write else 1), 1)
                    median = through_the_socket(gateway.state / "access.sock", vdi, samples, write=write)
                    name = f"open and close by another process, {name}"
                    report.add(Row(name, f"{median:.3g} ms", "", "", "", None))
        print(report.markdown())


if __name__ == "__main__":
    main()
