import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nbd_plugin.supervised import ROOT, SUPERVISOR, TINY_PLUGIN, Supervised, ended, eventually

SIZE = 1 << 20


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervised]:
    with Supervised(tmp_path) as running:
        assert running.ready, running.log()
        yield running


def connected(libnbd: Any, uri: str) -> Any:
    handle = libnbd.NBD()
    handle.connect_uri(uri)
    return handle


def reads(handle: Any) -> bool:
    return bool(handle.pread(4096, 0) == b"x" * 4096)


def test_it_serves_both_sockets_and_sigterm_leaves_nothing(supervisor: Supervised, libnbd: Any) -> None:
    for uri in (supervisor.uri, supervisor.private_uri):
        client = connected(libnbd, uri)
        assert client.get_size() == SIZE
        assert reads(client)
        client.shutdown()
    assert (supervisor.state / "nbd.sock").stat().st_mode & 0o777 == 0o600
    workers = supervisor.workers()
    assert len(workers) == 2
    assert supervisor.stop() == 0, supervisor.log()
    assert all(ended(each) for each in workers)
    left = {each.name for each in supervisor.state.iterdir()}
    assert left == {"nbd.lock", "nbd-workers"}


def test_a_request_in_flight_is_answered_when_it_stops(supervisor: Supervised, libnbd: Any) -> None:
    client = connected(libnbd, supervisor.uri + "0.5")
    buffer = libnbd.Buffer(4096)
    asked = client.aio_pread(buffer, 0)
    eventually(lambda: '"reading"' in supervisor.log(), "the request is in flight")
    supervisor.signal(signal.SIGTERM)
    while not client.aio_command_completed(asked):
        client.poll(-1)
    assert bytes(buffer.to_bytearray()) == b"x" * 4096
    del client
    assert supervisor.process.wait(30) == 0


def test_an_idle_client_does_not_hold_up_the_end(tmp_path: Path, libnbd: Any) -> None:
    with Supervised(tmp_path, "--grace", "60") as supervisor:
        client = connected(libnbd, supervisor.uri)
        assert reads(client)
        # Were the worker killed after --grace, the test would last that long.
        assert supervisor.stop() == 0


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path, libnbd: Any) -> None:
    with Supervised(tmp_path, "--grace", "60") as supervisor:
        client = connected(libnbd, supervisor.uri + "50")
        asked = client.aio_pread(libnbd.Buffer(4096), 0)
        assert not client.aio_command_completed(asked)
        eventually(lambda: '"reading"' in supervisor.log(), "the request is in flight")
        supervisor.signal(signal.SIGTERM)
        eventually(lambda: "stopping" in supervisor.log(), "it stops")
        supervisor.signal(signal.SIGTERM)
        assert supervisor.process.wait(30) == 0
        assert "a worker that doesn't end is killed" in supervisor.log()


def test_a_killed_worker_is_replaced_and_its_address_answers_all_the_time(
    supervisor: Supervised, libnbd: Any
) -> None:
    for _ in range(2):
        (worker,) = supervisor.workers()
        os.kill(worker, signal.SIGKILL)
        # Whoever comes before the next one is there waits in the queue.
        client = connected(libnbd, supervisor.uri)
        assert reads(client)
        client.shutdown()
        assert supervisor.workers() != [worker]
    assert "a worker ended by itself and is started again" in supervisor.log()


def test_what_a_worker_said_before_is_not_why_it_was_killed(supervisor: Supervised, libnbd: Any) -> None:
    [worker] = supervisor.workers()
    client = connected(libnbd, supervisor.uri + "0.01")
    client.pread(512, 0)
    eventually(lambda: '"reading"' in supervisor.log(), "what it says")
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: "is started again" in supervisor.log(), "its end")
    lines = map(json.loads, supervisor.log().splitlines())
    [told] = [line for line in lines if "started again" in line["event"]]
    assert (told["how"], told["why"]) == ("SIGKILL", "SIGKILL")


def test_after_kill_9_of_it_clients_go_on_and_the_next_one_has_the_address_at_once(
    supervisor: Supervised, tmp_path: Path, libnbd: Any
) -> None:
    client = connected(libnbd, supervisor.uri)
    (orphan,) = supervisor.workers()
    supervisor.signal(signal.SIGKILL)
    supervisor.process.wait()
    with Supervised(tmp_path, port=supervisor.port) as following:
        assert following.ready, following.log()
        assert reads(client)
        other = connected(libnbd, following.uri)
        assert reads(other)
        assert not ended(orphan)
        assert following.stop() == 0, following.log()
        eventually(lambda: ended(orphan), "the orphan ends with the supervisor that found it")


def test_an_orphan_ends_after_its_last_client(supervisor: Supervised, libnbd: Any) -> None:
    client = connected(libnbd, supervisor.uri)
    (orphan,) = supervisor.workers()
    supervisor.signal(signal.SIGKILL)
    supervisor.process.wait()
    assert reads(client)
    client.shutdown()
    eventually(lambda: ended(orphan), "an orphan without clients ends")


def test_sighup_brings_new_workers_and_the_old_one_serves_its_clients(
    supervisor: Supervised, libnbd: Any
) -> None:
    old_client = connected(libnbd, supervisor.uri)
    (old,) = supervisor.workers()
    supervisor.signal(signal.SIGHUP)
    eventually(lambda: "new workers have taken over" in supervisor.log(), "a new generation")
    new = [each for each in supervisor.workers() if each != old]
    # The old one accepts nobody any more.
    eventually(lambda: not listens(old, supervisor.port), "the old worker has given up the address")
    for _ in range(5):
        client = connected(libnbd, supervisor.uri)
        assert reads(client)
        client.shutdown()
    assert reads(old_client)
    assert not ended(old)
    old_client.shutdown()
    eventually(lambda: ended(old), "the old worker ends")
    eventually(lambda: supervisor.workers() == new, "the new one stays")


def listens(process: int, port: int) -> bool:
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    }
    links = []
    for each in Path(f"/proc/{process}/fd").iterdir():
        try:
            links.append(str(each.readlink()))
        except OSError:
            continue
    return any(f"socket:[{inode}]" in links for inode in inodes)


def test_several_workers_end_in_time_whichever_of_them_waits_in_accept(tmp_path: Path, libnbd: Any) -> None:
    with Supervised(tmp_path, "--workers", "3", "--grace", "60") as supervisor:
        assert len(supervisor.workers()) == 3
        for _ in range(6):
            client = connected(libnbd, supervisor.uri)
            assert reads(client)
            client.shutdown()
        # Were one killed after --grace, the test would last that long.
        assert supervisor.stop() == 0


def test_without_gateway_and_clients_it_ends(tmp_path: Path) -> None:
    with Supervised(tmp_path, "--linger", "1") as supervisor:
        assert supervisor.process.wait(30) == 0
        assert "nobody needs NBD any more" in supervisor.log()


def test_a_client_that_only_connects_makes_room_for_the_next(tmp_path: Path) -> None:
    with Supervised(tmp_path, "--clients", "2", "--handshake", "0", plugin=None) as supervisor:
        address = ("127.0.0.1", supervisor.port)
        with socket.create_connection(address, 30) as first:
            assert first.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
            with socket.create_connection(address, 30) as second:
                assert second.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
                assert first.recv(1) == b""
        eventually(lambda: "to make room for another" in supervisor.log(), "the reason in the log")


def test_a_second_one_on_the_same_state_directory_is_refused(supervisor: Supervised, tmp_path: Path) -> None:
    with Supervised(tmp_path) as second:
        assert second.process.wait(30) == 1
        assert f"already (process {supervisor.process.pid})" in second.log()


def test_a_taken_port_is_refused_by_its_name(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Supervised(tmp_path, port=port) as supervisor:
            assert supervisor.process.wait(30) == 1
            assert f"can't listen on 127.0.0.1:{port}: Address already in use" in supervisor.log()


@pytest.mark.parametrize("name", ["nbd.sock", "nbd-control.sock", "nbd.lock"])
def test_what_stands_in_its_way_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    """As a directory that a container's mount has made."""
    in_the_way = tmp_path / "state" / name
    in_the_way.mkdir(parents=True)
    with Supervised(tmp_path) as supervisor:
        assert supervisor.process.wait(30) == 1
        assert supervisor.log() == f"vdi-gateway nbd: {in_the_way}: Is a directory\n"


def test_a_plugin_that_cannot_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no such luck')\n")
    with Supervised(tmp_path, plugin=broken) as supervisor:
        assert supervisor.process.wait(30) == 1
        assert "nbdkit doesn't start: " in supervisor.log()
        assert "no such luck" in supervisor.log()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of another user")
def test_workers_for_the_network_run_as_another_user_and_the_private_one_does_not(
    tmp_path: Path, libnbd: Any
) -> None:
    # Neither the program nor the state directory lies where that user may look.
    installed = tmp_path / "installed"
    shutil.copytree(ROOT / "nbd_plugin", installed / "nbd_plugin")
    for package in ("images", "access"):
        shutil.copytree(ROOT / "gateway" / package, installed / "gateway" / package)
    shutil.copy(ROOT / "gateway" / "__init__.py", installed / "gateway")
    tmp_path.chmod(0o700)
    program = installed / "nbd_plugin" / "supervisor.py"
    with Supervised(tmp_path, "--user", "nobody", plugin=None, program=program) as supervisor:
        assert supervisor.ready, supervisor.log()
        (public,) = supervisor.workers()
        handle = libnbd.NBD()
        handle.set_opt_mode(True)
        handle.connect_uri(supervisor.private_uri)
        (private,) = set(supervisor.workers()) - {public}
        assert owner(public) != 0
        assert owner(private) == 0
        groups = Path(f"/proc/{public}/status").read_text().partition("Groups:")[2].partition("\n")[0]
        assert groups.strip() == ""
        handle.opt_abort()


def owner(process: int) -> int:
    return Path(f"/proc/{process}").stat().st_uid


def test_accepted_connections_notice_a_dead_host_within_a_minute() -> None:
    from nbd_plugin.listening import listen_on

    (listening,) = listen_on("127.0.0.1", 0)
    with listening, socket.create_connection(listening.getsockname()) as client:
        accepted, _ = listening.accept()
        with accepted:
            assert client.getpeername() == listening.getsockname()
            options = [
                accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            ]
    assert options == [1, 15, 5, 3, 30_000]


def test_a_gateway_that_reads_nothing_holds_nobody_up(supervisor: Supervised, libnbd: Any) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(supervisor.state / "nbd-control.sock"))
        done = threading.Event()

        def come_and_go() -> None:
            for _ in range(20):
                client = connected(libnbd, supervisor.uri)
                assert reads(client)
                client.shutdown()
            done.set()

        threading.Thread(target=come_and_go).start()
        assert done.wait(30)
        assert supervisor.stop() == 0


@pytest.mark.parametrize("ready", [False, True])
def test_it_ends_at_once_when_who_started_it_has_gone_without_a_word(tmp_path: Path, ready: bool) -> None:
    """A gateway that is ended while it starts."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    state = tmp_path / "state"
    command = [sys.executable, "-I", "-S", str(SUPERVISOR), "--state-dir", str(state), "--linger", "600"]
    command += ["--listen", "127.0.0.1:0", "--plugin", str(TINY_PLUGIN), "--ready-fd", str(writing)]
    with subprocess.Popen(command, pass_fds=(writing,)) as process:
        try:
            os.close(writing)
            if ready:
                assert b"NBD ready: nbd://127.0.0.1:" in os.read(reading, 4096)
            else:
                eventually((state / "nbd-workers").exists, "the first worker")
            os.close(reading)
            assert process.wait(30) == 0
            left = [int(each) for each in (state / "nbd-workers").read_text().split()[::2]]
            assert left == []
        finally:
            process.kill()


def test_it_goes_on_when_who_started_it_is_connected(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    state = tmp_path / "state"
    command = [sys.executable, "-I", "-S", str(SUPERVISOR), "--state-dir", str(state)]
    command += ["--listen", "127.0.0.1:0", "--plugin", str(TINY_PLUGIN), "--ready-fd", str(writing)]
    with subprocess.Popen(command, pass_fds=(writing,)) as process, socket.socket(socket.AF_UNIX) as gateway:
        try:
            os.close(writing)
            eventually((state / "nbd-control.sock").exists, "the control socket")
            gateway.connect(str(state / "nbd-control.sock"))
            os.close(reading)
            with gateway.makefile("r") as messages:
                while '"ready": true' not in messages.readline():
                    pass
                gateway.sendall(b'{"do": "stop"}\n')
                assert process.wait(30) == 0
        finally:
            process.kill()
