"""What vdi-import says became of a disk: its file changes, the gateway is silent, the last line is lost."""

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway.cli import exchange
from gateway.cli.connection import Connection
from gateway.cli.door import DoorClosedError, block
from gateway.cli.exchange import ConnectionLostError, Exchange
from gateway.cli.transfer_task import TransferTask
from tests.cli.test_transfers import error, lines
from tests.conftest import RunningGateway

MIB = 1 << 20


@pytest.fixture
def disk(house: RunningGateway, request: pytest.FixtureRequest) -> str:
    """The uuid of a new disk of 8 MiB."""
    return house.run("vdi-create", request.node.name[:100], "8MiB").stdout.strip()


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A file of 8 MiB whose data is at its end."""
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        file.seek(6 * MIB)
        file.write(os.urandom(2 * MIB))
    return path


@pytest.fixture
def while_sending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Has something done once, when the first piece of a disk is about to be sent."""

    def arrange(happens: Callable[[], object]) -> None:
        send = Exchange.send
        left = [happens]

        def sending(self: Exchange, data: bytes | memoryview) -> None:
            if len(data) >= MIB and left:
                left.pop()()
            send(self, data)

        monkeypatch.setattr(Exchange, "send", sending)

    return arrange


def exported(house: RunningGateway, disk: str, path: Path) -> bytes:
    assert house.run("vdi-export", disk, str(path), "--quiet", "--force").returncode == 0
    return path.read_bytes()


def test_a_sparse_file_that_is_cut_while_it_is_read_changes_nothing(
    house: RunningGateway,
    disk: str,
    sparse: Path,
    tmp_path: Path,
    while_sending: Callable[[Callable[[], object]], None],
) -> None:
    assert house.run("vdi-import", disk, str(sparse), "--quiet").returncode == 0
    before = sparse.read_bytes()
    while_sending(lambda: os.truncate(sparse, 5 * MIB))
    said = error(house.run("vdi-import", disk, str(sparse)))
    assert "became shorter while it was read; nothing was changed" in said
    assert exported(house, disk, tmp_path / "out") == before


def test_a_file_that_is_written_to_while_it_is_read_is_told(
    house: RunningGateway, disk: str, sparse: Path, while_sending: Callable[[Callable[[], object]], None]
) -> None:
    def write() -> None:
        status = sparse.stat()
        with sparse.open("r+b") as file:
            file.write(b"new")
        os.utime(sparse, ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    while_sending(write)
    done = house.run("vdi-import", disk, str(sparse))
    assert done.returncode == 0
    assert "was written to while it was read" in str(lines(done))
    assert "was written to" not in str(lines(house.run("vdi-import", disk, str(sparse))))


def test_an_import_whose_last_line_is_lost_is_what_its_task_becomes(
    house: RunningGateway, disk: str, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = TransferTask.record
    busy = ["pending", "pending", "pending"]

    def at_work(self: TransferTask) -> dict[str, Any]:
        return record(self) | ({"status": busy.pop()} if busy else {})

    monkeypatch.setattr(TransferTask, "record", at_work)
    monkeypatch.setattr(Exchange, "rest", lambda *_: b"")
    done = house.run("vdi-import", disk, str(sparse))
    assert (done.returncode, busy) == (0, []), done
    assert "waiting for what the gateway makes of it" in str(lines(done))
    assert exported(house, disk, tmp_path / "out") == sparse.read_bytes()


def test_a_disk_that_was_made_is_told_by_a_gateway_that_stops_then(
    house: RunningGateway, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest, call = Exchange.rest, Connection.call
    stopped: list[bool] = []

    def last_line(self: Exchange, limit: int) -> bytes:
        line = rest(self, limit)
        stopped.append(True)
        return line

    def calling(self: Connection, method: str, *parameters: Any) -> Any:
        if stopped:
            raise DoorClosedError("no gateway answers")
        return call(self, method, *parameters)

    monkeypatch.setattr(Exchange, "rest", last_line)
    monkeypatch.setattr(Connection, "call", calling)
    done = house.run("vdi-import", str(sparse), "sr=disks", "name=made", "--quiet")
    stopped.clear()
    assert (done.returncode, done.stderr) == (0, "")
    assert house.call("VDI.get_by_name_label", "made") == [house.call("VDI.get_by_uuid", done.stdout.strip())]


class _Door:
    """A way to a socket that is there already."""

    url = "http://gateway"

    def __init__(self, near: socket.socket) -> None:
        self._near = near

    def open(self) -> socket.socket:
        return self._near


@pytest.fixture(params=["plain", "TLS"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Both ends of a connection, over which a second of silence is too long."""
    monkeypatch.setattr(exchange, "block", lambda connected: block(connected, 1))
    near, far = socket.socketpair()
    both = [near, far]
    if request.param == "TLS":
        authority = trustme.CA()
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("gateway").configure_cert(serving)
        asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(asking)
        accepting = threading.Thread(
            target=lambda: both.append(serving.wrap_socket(far, server_side=True)), daemon=True
        )
        accepting.start()
        near = asking.wrap_socket(near, server_hostname="gateway")
        accepting.join(30)
        both = [near, both[2]]
    yield both
    for each in both:
        each.close()


def test_a_connection_on_which_nothing_moves_is_lost(ends: list[socket.socket]) -> None:
    door: Any = _Door(ends[0])
    opened = Exchange(door)
    with pytest.raises(ConnectionLostError, match="nothing moved"):
        opened.recv_into(memoryview(bytearray(1)))
    with pytest.raises(ConnectionLostError, match="nothing moved"):
        opened.send(bytes(64 * MIB))


def test_a_connection_on_which_nothing_moves_is_kept_while_the_gateway_is_at_work(
    ends: list[socket.socket],
) -> None:
    got = bytearray()
    data = os.urandom(64 * MIB)

    def receive() -> None:
        while len(got) < len(data):
            got.extend(ends[1].recv(MIB))
        ends[1].sendall(b"last line")

    reading = threading.Thread(target=receive, daemon=True)

    def begins() -> bool:
        if not reading.is_alive():
            reading.start()
        return True

    door: Any = _Door(ends[0])
    opened = Exchange(door, begins)
    opened.send(data)
    assert opened.rest(9) == b"last line"
    reading.join(30)
    assert got == data
