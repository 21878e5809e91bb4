#!/usr/bin/env -S .venv/bin/python
"""The RPC door: all records of a large estate, and how late an event arrives, idle and under eight uploads.

    scripts/bench rpc [--vdis N] [--tasks N] [--samples N] [--directory DIR]

A figure of records is the time from the request to the whole answer at the client, unparsed. A figure of
events is the time from the request that causes an event to its arrival at another client that waits in
event.from, so it holds two calls. A markdown table goes to stdout, progress to stderr.

The trap: this directory holds a file with the name of a standard-library package, so it must not be on
sys.path.
"""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(dirname(abspath(__file__))))

# ruff: noqa: E402
import http.client
import json
import queue
import statistics
import subprocess
import threading
import time
import uuid
import xmlrpc.client
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scripts.benchmarks.harness.gateway import Gateway
from scripts.benchmarks.harness.measure import MIB, Report, Row, log, wait_for_quiet
from scripts.benchmarks.harness.workplace import options_of, positive, workplace, write_noise

UPLOADS = 8
UPLOAD_SIZE = 512 * MIB
BETWEEN_SAMPLES = 0.02
LATEST = 50.0


class Client:
    """One connection that speaks JSON-RPC or XML-RPC, kept open."""

    def __init__(self, url: str, session: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=120)
        self._session = session

    def post(self, path: str, body: bytes) -> bytes:
        self._connection.request("POST", path, body)
        return self._connection.getresponse().read()

    def call(self, method: str, *parameters: Any) -> Any:
        answer = json.loads(self.post("/jsonrpc", self.json(method, *parameters)))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def json(self, method: str, *parameters: Any) -> bytes:
        request = {"jsonrpc": "2.0", "method": method, "params": [self._session, *parameters], "id": 1}
        return json.dumps(request).encode()

    def xml(self, method: str, *parameters: Any) -> bytes:
        return xmlrpc.client.dumps((self._session, *parameters), method).encode()


def fill(gateway: Gateway, client: Client, vdis: int, tasks: int) -> None:
    """So many VDIs, found by a scan of sparse images, and so many tasks."""
    directory = gateway.directories["memory"]
    for _ in range(vdis):
        path = directory / f"{uuid.uuid4()}.raw"
        with path.open("wb") as file:
            file.truncate(2 * MIB)
    start = time.perf_counter()
    client.call("SR.scan", gateway.repositories["memory"])
    log(f"SR.scan found {vdis} images in {time.perf_counter() - start:.1f} s")
    for number in range(tasks):
        client.call("task.create", f"task {number}", "")


def records(report: Report, client: Client, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        method = f"{name}.get_all_records"
        for path, body in (("/jsonrpc", client.json(method)), ("/", client.xml(method))):
            seconds = []
            size = 0
            for _ in range(5):
                start = time.perf_counter()
                size = len(client.post(path, body))
                seconds.append(time.perf_counter() - start)
            what = (
                f"{method}, {count} objects, {'JSON' if path == '/jsonrpc' else 'XML'}, {size / 1e6:.1f} MB"
            )
            report.figure(what, statistics.median(seconds), "s", below=1)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        client.call("VDI.get_all_records_where", 'field "name__label" = "no such name"')
        seconds.append(time.perf_counter() - start)
    report.figure("VDI.get_all_records_where, nothing found", statistics.median(seconds), "s", below=1)


class Listener:
    """A client that waits in event.from for ever, and says when each answer came."""

    def __init__(self, url: str, session: str) -> None:
        self._client = Client(url, session)
        self._arrivals: queue.Queue[float] = queue.Queue()
        self._stopped = False
        self._waiting = threading.Thread(target=self._run, daemon=True)
        self._token = self._client.call("event.from", ["pool"], "", 0.0)["token"]
        self._waiting.start()

    def _run(self) -> None:
        while not self._stopped:
            answer = self._client.call("event.from", ["pool"], self._token, 30.0)
            arrival = time.perf_counter()
            self._token = answer["token"]
            if answer["events"]:
                self._arrivals.put(arrival)

    def arrival(self) -> float:
        return self._arrivals.get(timeout=30)

    def stop(self) -> None:
        self._stopped = True


def latencies(gateway: Gateway, samples: int) -> list[float]:
    """Milliseconds from a request that causes an event to the event's arrival."""
    listener = Listener(gateway.http, gateway.session)
    client = Client(gateway.http, gateway.session)
    (pool,) = client.call("pool.get_all")
    taken = []
    for _ in range(samples):
        time.sleep(BETWEEN_SAMPLES)
        start = time.perf_counter()
        client.call("event.inject", "pool", pool)
        taken.append(1000 * (listener.arrival() - start))
    listener.stop()
    client.call("event.inject", "pool", pool)
    return sorted(taken)


@contextmanager
def uploading(gateway: Gateway, source: Path) -> Iterator[None]:
    """Eight uploads at once, each begun again when it ends."""
    vdis = [gateway.create_vdi("memory", UPLOAD_SIZE) for _ in range(UPLOADS)]
    stopping = threading.Event()

    def upload(url: str) -> None:
        while not stopping.is_set():
            command = ["curl", "-sS", "--fail", "-o", "/dev/null", "-T", str(source), url]
            subprocess.run(command, check=True)

    threads = [threading.Thread(target=upload, args=(gateway.put_url(vdi),)) for vdi in vdis]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1)
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def tell(report: Report, what: str, taken: list[float], beside: list[float] | None = None) -> None:
    """`beside` was measured at the same gateway while another one had the uploads: what the machine costs."""
    for name, part in (("half are sooner than", 0.5), ("99 % are sooner than", 0.99)):
        ours = taken[int(len(taken) * part)]
        row = f"event.from, {what}, {len(taken)} events: {name}"
        if beside is None:
            report.figure(row, ours, "ms", below=LATEST)
            continue
        theirs = beside[int(len(beside) * part)]
        peer = f"uploads at another gateway: {theirs:.3g} ms"
        ratio = f"{theirs / ours:.2f} ×"
        report.add(Row(row, f"{ours:.3g} ms", peer, ratio, f"< {LATEST:g} ms", ours < LATEST))


def main() -> None:
    parser = options_of("rpc", __doc__, directory="for the gateway's state")
    parser.add_argument("--vdis", type=int, default=10_000, help="in the SR (default %(default)s)")
    parser.add_argument("--tasks", type=int, default=1000, help="(default %(default)s)")
    parser.add_argument("--samples", type=positive, default=300, help="events (default %(default)s)")
    options = parser.parse_args()
    report = Report()
    with workplace("rpc", options.directory) as place:
        source = place.memory / "source"
        write_noise(source, UPLOAD_SIZE)
        with place.gateway() as gateway:
            client = Client(gateway.http, gateway.session)
            wait_for_quiet()
            tell(report, "idle, small estate", latencies(gateway, options.samples))
            fill(gateway, client, options.vdis, options.tasks)
            records(report, client, {"VDI": options.vdis, "task": options.tasks})
            wait_for_quiet()
            tell(report, "idle", latencies(gateway, options.samples))
            with place.gateway("other") as other, uploading(other, source):
                beside = latencies(gateway, options.samples)
            with uploading(gateway, source):
                tell(report, f"{UPLOADS} uploads", latencies(gateway, options.samples), beside)
            start = time.perf_counter()
            count = len(client.call("event.from", ["*"], "", 0.0)["events"])
            taken = time.perf_counter() - start
            report.figure(f"event.from of everything, {count} objects, JSON", taken, "s", below=2)
        print(report.markdown())


if __name__ == "__main__":
    main()
