"""The gateway renews the certificate of NBD at the moment in which the supervisor dies."""

import json
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from gateway.nbd import Nbd

STATUS = {
    "pid": 1,
    "options": {"port": 10809},
    "stay": False,
    "addresses": [["127.0.0.1", 10809]],
    "tls": "old",
    "leaving": None,
    "clients": 0,
}


class Door:
    def __init__(self) -> None:
        self.told: list[Any] = []
        self.closed = trio.Event()

    def serve(self, service: Any) -> None:
        self.told.append(service)
        if service is None:
            self.closed.set()


class Files:
    """Of a supervisor that runs."""

    tls = True
    host = "127.0.0.1"

    def __init__(self, control_socket: Path) -> None:
        self.control_socket = str(control_socket)

    def options(self, _version: str) -> dict[str, Any]:
        return {"port": 0}


async def test_a_certificate_is_renewed_while_the_supervisor_dies(tmp_path: Path, monkeypatch: Any) -> None:
    service = SimpleNamespace()
    monkeypatch.setattr("gateway.nbd.nbd_service", lambda *_: service)
    control = tmp_path / "control.sock"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(control))
    listening.listen()
    door: Any = Door()
    reading, died = threading.Event(), threading.Event()
    certificates = iter(("old", "new"))

    def read() -> tuple[str, str]:
        directory = next(certificates, None)
        if directory is None:
            raise OSError("another one can't be started")
        if directory == "new":
            reading.set()
            assert died.wait(30)
        return directory, "chain"

    files: Any = Files(control)
    nbd = Nbd(files, door, version="1", certificates=read, shutdown_seconds=lambda: 1.0)

    def supervise() -> None:
        """It is there until the new certificate is read."""
        connected, _ = listening.accept()
        with connected, listening:
            connected.sendall(json.dumps({"status": STATUS}).encode() + b"\n")
            assert reading.wait(30)

    supervisor = threading.Thread(target=supervise)
    supervisor.start()

    async def forever() -> None:
        await trio.sleep_forever()

    assert await nbd.start(unless=forever)
    assert door.told == [service]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(nbd.run)
        async with trio.open_nursery() as beside:
            beside.start_soon(nbd.renew)
            await door.closed.wait()
            died.set()
        nursery.cancel_scope.cancel()
    supervisor.join()
    assert door.told == [service, None]


async def test_a_certificate_that_workers_could_not_be_started_with_is_tried_again(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("gateway.nbd.nbd_service", lambda *_: SimpleNamespace())
    control = tmp_path / "control.sock"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(control))
    listening.listen()
    listening.settimeout(30)
    certificates = iter(("old", "new", "new", "new"))
    door: Any = Door()
    files: Any = Files(control)
    nbd = Nbd(
        files,
        door,
        version="1",
        certificates=lambda: (next(certificates), "chain"),
        shutdown_seconds=lambda: 1.0,
    )
    orders: list[dict[str, Any]] = []

    def supervise() -> None:
        """It keeps the old certificate the first time."""
        connected, _ = listening.accept()
        connected.settimeout(30)
        with connected, listening, connected.makefile("rb") as stream:
            connected.sendall(json.dumps({"status": STATUS}).encode() + b"\n")
            for tls in ("old", "new"):
                orders.append(json.loads(stream.readline()))
                connected.sendall(json.dumps({"status": {**STATUS, "tls": tls}}).encode() + b"\n")
            orders.extend(map(json.loads, stream))

    async def forever() -> None:
        await trio.sleep_forever()

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    assert await nbd.start(unless=forever)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(nbd.run)
        await nbd.renew()
        await nbd.renew()
        with trio.fail_after(30):
            while nbd._served_directory != "new":
                await trio.lowlevel.checkpoint()
        await nbd.renew()
        nbd.begin_stop()
        assert nbd._link is not None
        nbd._link.close()
        nursery.cancel_scope.cancel()
    supervisor.join()
    assert orders == [{"do": "renew", "tls": "new"}] * 2 + [{"do": "stop"}]
