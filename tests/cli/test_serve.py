import http.client
import os
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import time
from pathlib import Path

import pytest
import trio

from gateway.certificates import ensure_server_certificate
from gateway.core.database import Database
from tests.conftest import RunningGateway, clean_environment, program


def serve(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [program(), "serve", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean_environment(),
    )


def host_and_port(url: str) -> tuple[str, int]:
    host, _, port = url.rpartition("/")[2].rpartition(":")
    return host, int(port)


def status_of(url: str, ca_file: Path | None = None) -> int:
    host, port = host_and_port(url)
    if ca_file is None:
        connection = http.client.HTTPConnection(host, port, timeout=30)
    else:
        context = ssl.create_default_context(cafile=str(ca_file))
        connection = http.client.HTTPSConnection(host, port, timeout=30, context=context)
    try:
        connection.request("GET", "/nothing-is-here")
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def wait_for(condition: object, gateway: RunningGateway) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, gateway.log()
        time.sleep(0.01)


def test_it_answers_over_http_and_over_https_with_its_own_authority(gateway: RunningGateway) -> None:
    assert status_of(gateway.url) == 404
    assert status_of(gateway.https_url, gateway.ca_file) == 404


def test_everything_it_keeps_is_under_the_state_directory_and_private(gateway: RunningGateway) -> None:
    names = {
        str(path.relative_to(gateway.state_dir)) for path in gateway.state_dir.rglob("*") if path.is_file()
    }
    assert {
        "admin-password",
        "gateway.sqlite3",
        "gateway.json",
        "lock",
        "tls/ca.pem",
        "tls/ca-key.pem",
    } <= names
    public = {"tls/ca.pem", "tls/server.pem"}
    for name in names - public:
        assert stat.S_IMODE((gateway.state_dir / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(gateway.state_dir.stat().st_mode) == 0o700


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(gateway: RunningGateway, number: signal.Signals) -> None:
    gateway.signal(number)
    assert gateway.wait() == 0
    assert not (gateway.state_dir / "gateway.json").exists()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(host_and_port(gateway.url)):
        pass


def test_a_client_that_keeps_its_connection_open_does_not_keep_it_running(gateway: RunningGateway) -> None:
    connection = http.client.HTTPConnection(*host_and_port(gateway.url), timeout=30)
    connection.request("GET", "/nothing-is-here")
    connection.getresponse().read()
    assert gateway.stop() == 0
    connection.close()


def test_a_restart_keeps_password_and_authority(gateway: RunningGateway) -> None:
    before = gateway.password, gateway.ca_file.read_bytes()
    gateway.restart()
    assert (gateway.password, gateway.ca_file.read_bytes()) == before
    assert status_of(gateway.https_url, gateway.ca_file) == 404


def test_a_password_that_was_written_into_the_file_counts_after_a_restart(gateway: RunningGateway) -> None:
    gateway.stop()
    (gateway.state_dir / "admin-password").write_text("a new one\n")
    gateway.start()
    assert gateway.command("vdi-list").returncode == 0


def test_a_second_gateway_on_the_directory_is_refused_with_the_process_of_the_first(
    gateway: RunningGateway,
) -> None:
    done = serve("--state-dir", str(gateway.state_dir), "--http", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert f"process {gateway.pid}" in done.stderr
    assert status_of(gateway.url) == 404


def test_after_kill_9_it_starts_again(gateway: RunningGateway) -> None:
    gateway.kill()
    gateway.start()
    assert status_of(gateway.url) == 404


def test_a_port_in_use_is_refused_with_the_address(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        done = serve("--state-dir", str(tmp_path), "--http", address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"vdi-gateway serve: --http: can't listen on {address}: Address already in use;"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["xapi.sock", "access.sock", "tls"])
def test_what_lies_in_the_way_in_the_state_directory_is_named_with_what_to_do(
    tmp_path: Path, name: str
) -> None:
    if name == "tls":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    refused = serve("--state-dir", str(tmp_path), "--https", "127.0.0.1:0", "--nbd", "off")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert f"{tmp_path / name}: " in refused.stderr
    assert refused.stderr.endswith("this user has to read and write it\n")


def test_a_gateway_that_cannot_tell_the_commands_where_it_is_serves_all_the_same(tmp_path: Path) -> None:
    gateway = RunningGateway(tmp_path)
    (gateway.state_dir / "gateway.json.new").mkdir(parents=True)
    gateway.start()
    try:
        assert status_of(gateway.url) == 404
        assert "the commands on this machine are not told where the gateway is" in gateway.log()
    finally:
        gateway.kill()


def test_a_gateway_whose_ready_line_finds_no_space_serves_all_the_same(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, open("/dev/full", "wb") as full:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        with subprocess.Popen(
            [program(), "serve", "--state-dir", tmp_path / "state", "--http", "127.0.0.1:0", "--nbd", "off"],
            stdout=full,
            env={**clean_environment(), "NOTIFY_SOCKET": str(tmp_path / "notify")},
        ) as process:
            try:
                assert systemd.recv(64).startswith(b"READY=1")
            finally:
                process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize("option", ["--http", "--https", "--nbd"])
def test_a_host_that_can_be_no_name_is_refused_in_one_line(tmp_path: Path, option: str) -> None:
    addresses = ("--http", "127.0.0.1:0", option, "gateway..example:8443")
    refused = serve("--state-dir", str(tmp_path), "--insecure", *addresses)
    assert refused.returncode in {1, 2}
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert option in refused.stderr
    assert "gateway..example" in refused.stderr


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gateway.sqlite3").write_text("this is no database, and long enough to look at " * 100)
    done = serve("--state-dir", str(tmp_path), "--http", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (1, "")
    assert str(tmp_path / "gateway.sqlite3") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_that_is_found_damaged_as_it_is_read_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    database = trio.run(Database.open, str(path))
    trio.run(database.aclose)
    connection = sqlite3.connect(path)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'settings'").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))
    refused = serve("--state-dir", str(tmp_path), "--http", "127.0.0.1:0", "--nbd", "off")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert last.startswith(f"vdi-gateway serve: {path}: ")
    assert last.endswith("malformed); move it away, or restore it from a copy")


def test_a_certificate_with_the_wrong_key_is_refused(tmp_path: Path) -> None:
    one = ensure_server_certificate(str(tmp_path / "one"), ["localhost"])
    other = ensure_server_certificate(str(tmp_path / "other"), ["localhost"])
    done = serve(
        *("--state-dir", str(tmp_path / "state"), "--https", "127.0.0.1:0"),
        *("--tls-cert", one.chain, "--tls-key", other.key),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "can't be used together" in done.stderr
    assert done.stderr.count("\n") == 1


def test_sighup_makes_new_connections_use_the_replaced_certificate(tmp_path: Path) -> None:
    site = ensure_server_certificate(str(tmp_path / "site"), ["localhost", "127.0.0.1"])
    running = RunningGateway(tmp_path, ("--tls-cert", site.chain, "--tls-key", site.key))
    running.start()
    try:
        assert status_of(running.https_url, Path(str(site.authority))) == 404
        new = ensure_server_certificate(str(tmp_path / "new"), ["localhost", "127.0.0.1"])
        os.replace(new.chain, site.chain)
        os.replace(new.key, site.key)
        running.signal(signal.SIGHUP)
        wait_for(lambda: "certificate loaded" in running.log(), running)
        assert status_of(running.https_url, Path(str(new.authority))) == 404
    finally:
        running.kill()


def test_it_serves_on_ipv6(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    running = RunningGateway(tmp_path, ("--http", "[::1]:0"))
    running.start()
    try:
        listed = running.command("vdi-list")
        assert (listed.returncode, listed.stderr) == (0, "")
        assert '"http://[::1]:' in (running.state_dir / "gateway.json").read_text()
    finally:
        running.stop()
