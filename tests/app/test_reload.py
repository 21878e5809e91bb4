import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import trio

from gateway.certificates import ensure_server_certificate
from gateway.core.database import Database
from tests.conftest import RunningGateway, clean_environment, program

MIB = 1 << 20


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[RunningGateway]:
    """A gateway that isn't started yet; its state directory is there for a config.toml."""
    gateway = RunningGateway(tmp_path)
    gateway.state_dir.mkdir()
    yield gateway
    if gateway.running:
        gateway.kill()
    assert "Traceback" not in gateway.log()


def configure(gateway: RunningGateway, text: str) -> None:
    (gateway.state_dir / "config.toml").write_text(text)


def address(url: str) -> tuple[str, int]:
    host, _, port = url.rpartition("/")[2].rpartition(":")
    return host, int(port)


def wait_for(condition: Callable[[], bool], gateway: RunningGateway) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, gateway.log()
        time.sleep(0.01)


def reload(gateway: RunningGateway, text: str, told: str = '"configuration reloaded"') -> dict[str, Any]:
    """SIGHUP with another file; the log line that has `told` in it."""
    before = len(gateway.log())
    configure(gateway, text)
    gateway.signal(signal.SIGHUP)

    def lines() -> list[str]:
        return [line for line in gateway.log()[before:].splitlines(keepends=True) if line.endswith("\n")]

    wait_for(lambda: any(told in line for line in lines()), gateway)
    line: dict[str, Any] = json.loads(next(line for line in lines() if told in line))
    return line


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    connection.settimeout(30)
    while piece := connection.recv(65536):
        received += piece
    return received


def ask(gateway: RunningGateway, head: bytes) -> bytes:
    """What comes until the gateway closes the connection; only what is asked is sent."""
    with socket.create_connection(address(gateway.url)) as connection:
        connection.sendall(head)
        return until_closed(connection)


def disk(gateway: RunningGateway, directory: Path) -> str:
    directory.mkdir()
    host = gateway.call("host.get_all")[0]
    arguments: tuple[Any, ...] = ({"location": str(directory)}, "0", "disks", "", "file", "", False, {})
    sr = gateway.call("SR.create", host, *arguments)
    fields = {"name_label": "disk", "name_description": "", "SR": sr, "virtual_size": str(4 * MIB)}
    fixed = {"type": "user", "sharable": False, "read_only": False, "other_config": {}}
    return str(gateway.call("VDI.create", {**fields, **fixed}))


class Upload:
    """An import that has begun and stands still. Its answer's status: 200, or 503 at the limit."""

    def __init__(self, gateway: RunningGateway, vdi: str, opened: ExitStack) -> None:
        query = urlencode({"session_id": gateway.session, "vdi": vdi})
        self.connection = opened.enter_context(socket.create_connection(address(gateway.url)))
        self.connection.settimeout(30)
        self.connection.sendall(
            f"PUT /import_raw_vdi?{query} HTTP/1.1\r\nhost: x\r\ncontent-length: {4 * MIB}\r\n\r\n".encode()
        )
        self.status = int(self.connection.recv(65536).split()[1])


SMALL = """
[limits]
connections = 3
transfers = 1
header_time = "1s"
header_size = "1KiB"
keepalive_idle = "1s"
transfer_idle = "2s"
rpc_body_size = "4KiB"
password_delay_first = "0s"
"""


def test_each_limit_of_the_file_holds_on_real_sockets(configured: RunningGateway, tmp_path: Path) -> None:
    configure(configured, SMALL)
    configured.start()

    too_long = ask(configured, b"GET / HTTP/1.1\r\nhost: x\r\ncookie: " + b"x" * 1100)
    assert too_long.startswith(b"HTTP/1.1 431 ")
    assert b"longer than 1024 bytes" in too_long

    too_slow = ask(configured, b"GET / HTTP/1.1\r\nhost")
    assert too_slow.startswith(b"HTTP/1.1 408 ")
    assert b"after 1 s" in too_slow

    assert ask(configured, b"") == b""

    idle = ask(configured, b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
    assert idle.startswith(b"HTTP/1.1 404 ")
    assert b"connection: close" not in idle

    too_large = ask(configured, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4097\r\n\r\n")
    assert too_large.startswith(b"HTTP/1.1 413 ")

    vdi = disk(configured, tmp_path / "sr")
    with ExitStack() as opened:
        first = Upload(configured, vdi, opened)
        assert first.status == 200
        assert Upload(configured, vdi, opened).status == 503
        assert b"IMPORT_ERROR_CLIENT_STALLED" in until_closed(first.connection)

    with ExitStack() as opened:
        for _ in range(3):
            connection = opened.enter_context(socket.create_connection(address(configured.url)))
            connection.sendall(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(20).startswith(b"HTTP/1.1 404 ")
        with socket.create_connection(address(configured.url)) as fourth:
            assert until_closed(fourth).startswith(b"HTTP/1.1 503 ")
        with socket.socket(socket.AF_UNIX) as administrator:
            administrator.connect(str(configured.state_dir / "xapi.sock"))
            administrator.sendall(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
            assert administrator.recv(20).startswith(b"HTTP/1.1 404 ")


def test_sighup_changes_limits_of_what_is_running(configured: RunningGateway, tmp_path: Path) -> None:
    configure(configured, "[limits]\ntransfers = 1\n")
    configured.start()
    vdis = [disk(configured, tmp_path / name) for name in ("one", "two", "three")]
    with ExitStack() as opened:
        assert Upload(configured, vdis[0], opened).status == 200
        assert Upload(configured, vdis[1], opened).status == 503
        line = reload(configured, '[limits]\ntransfers = 2\nheader_size = "1KiB"\n')
        assert line["changed"] == ["limits.header_size", "limits.transfers"]
        assert Upload(configured, vdis[1], opened).status == 200
        reload(configured, "[limits]\ntransfers = 1\n")
        assert Upload(configured, vdis[2], opened).status == 503
        configured.kill()


def test_sighup_changes_the_level_of_the_log(configured: RunningGateway) -> None:
    configure(configured, '[log]\nlevel = "warning"\n')
    configured.start()
    configured.call("host.get_all")
    assert '"level": "info"' not in configured.log()
    assert reload(configured, '[log]\nlevel = "info"\n')["changed"] == ["log.level"]
    configured.call("host.get_all")
    wait_for(lambda: '"event": "request"' in configured.log(), configured)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[limits]\ntransfers = 0\n", "limits.transfers: 0 is out of range"),
        ("[limits]\ntransfer = 3\n", "limits.transfer: there is no such key"),
        ("[limits", "this is not TOML"),
    ],
)
def test_a_mistake_at_sighup_is_told_and_changes_nothing(
    configured: RunningGateway, text: str, why: str
) -> None:
    configure(configured, '[limits]\nheader_size = "2KiB"\n')
    configured.start()
    line = reload(configured, f'[log]\nlevel = "error"\n{text}', "the configuration was not reloaded")
    assert line["level"] == "warning"
    assert why in line["why"]
    assert str(configured.state_dir / "config.toml") in line["why"]
    assert b"longer than 2048 bytes" in ask(configured, b"GET / HTTP/1.1\r\nx: " + b"x" * 2100)
    assert '"event": "request"' in configured.log()


def test_sighup_during_a_start_is_obeyed_after_it(configured: RunningGateway) -> None:
    path = configured.state_dir / "gateway.sqlite3"
    database = trio.run(Database.open, str(path))
    trio.run(database.aclose)
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other,
        ThreadPoolExecutor() as pool,
    ):
        other.execute("BEGIN IMMEDIATE")
        started = pool.submit(configured.start)
        lock = configured.state_dir / "lock"
        wait_for(lambda: started.done() or (lock.exists() and lock.read_text().endswith("\n")), configured)
        configure(configured, '[limits]\nheader_size = "2KiB"\n')
        configured.signal(signal.SIGHUP)
        other.execute("ROLLBACK")
        started.result()
    wait_for(lambda: '"configuration reloaded"' in configured.log(), configured)
    assert b"longer than 2048 bytes" in ask(configured, b"GET / HTTP/1.1\r\nx: " + b"x" * 2100)


def test_what_cannot_change_at_run_time_is_told_until_it_is_undone(configured: RunningGateway) -> None:
    configured.start()
    for _ in range(2):
        line = reload(configured, "[limits]\nevent_entries = 99\n", "change only by a restart")
        assert line["options"] == ["limits.event_entries"]
    before = len(configured.log())
    reload(configured, "")
    assert "change only by a restart" not in configured.log()[before:]


def test_sighup_takes_the_certificate_from_another_place(configured: RunningGateway, tmp_path: Path) -> None:
    configured.start()
    own = json.loads((configured.state_dir / "gateway.json").read_text())["authority"]
    assert own == str(configured.ca_file)
    site = ensure_server_certificate(str(tmp_path / "site"), ["localhost", "127.0.0.1"])
    paths = f'[tls]\ncertificate = "{site.chain}"\nkey = "{site.key}"\n'
    line = reload(configured, paths, '"certificate loaded"')
    assert line["file"] == site.chain
    wait_for(
        lambda: json.loads((configured.state_dir / "gateway.json").read_text())["authority"] is None,
        configured,
    )


def test_its_own_certificate_is_renewed_unasked(
    configured: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = tmp_path / "impatient"
    impatient.write_text(
        f"#!{sys.executable}\nimport sys\nimport gateway.app\ngateway.app.RENEWAL_SECONDS = 0.1\n"
        "from gateway.cli.main import main\nsys.exit(main())\n"
    )
    impatient.chmod(0o700)
    monkeypatch.setattr("tests.conftest.program", lambda: str(impatient))
    configured.start()
    chain = configured.state_dir / "tls" / "server.pem"
    host_and_port = address(configured.https_url)
    first = ssl.get_server_certificate(host_and_port)
    assert chain.read_text().startswith(first)
    chain.unlink()
    wait_for(lambda: ssl.get_server_certificate(host_and_port) != first, configured)
    assert chain.read_text().startswith(ssl.get_server_certificate(host_and_port))


def test_a_wrong_file_keeps_it_from_starting(configured: RunningGateway) -> None:
    configure(configured, "[limits]\nconnections = -1\n")
    done = configured.command("serve", "--http", "127.0.0.1:0")
    file = configured.state_dir / "config.toml"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"vdi-gateway serve: {file}: limits.connections: -1 is out of range;"
        " give a whole number from 1 to 100000\n"
    )


def test_config_show_prints_what_serve_would_have(configured: RunningGateway, tmp_path: Path) -> None:
    configure(configured, "[limits]\nconnections = 7\n")
    done = configured.command("config-show", "--https", "127.0.0.1:0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "connections = 7  # file; the default is 512" in done.stdout
    assert 'https = ["127.0.0.1:0"]  # command line; the default is []' in done.stdout
    other = tmp_path / "other.toml"
    other.write_text("[limit]\n")
    wrong = configured.command("config-show", "--config", str(other))
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert f"{other}: limit: there is no such section" in wrong.stderr


def test_systemd_is_told_when_it_is_ready_and_when_it_stops(
    configured: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        configured.start()
        assert systemd.recv(100) == b"READY=1"
        assert configured.stop() == 0
        assert systemd.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("broken", ["reader gone", "disk full"])
def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, broken: str) -> None:
    reader, writer = os.pipe()
    if broken == "disk full":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    arguments = ["serve", "--state-dir", str(tmp_path / "state"), "--http", "127.0.0.1:0", "--nbd", "off"]
    with subprocess.Popen(
        [program(), *arguments], stdout=subprocess.PIPE, stderr=writer, env=clean_environment()
    ) as process:
        os.close(writer)
        os.close(reader)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1].decode()
            for _ in range(3):
                connection = http.client.HTTPConnection(*address(url), timeout=30)
                connection.request("GET", "/nothing")
                assert connection.getresponse().status == 404
                connection.close()
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
