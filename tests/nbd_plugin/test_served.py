"""NBD as a user of `vdi-gateway serve` meets it: sessions, TLS, and everything killed while clients go on."""

import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environment, program
from tests.nbd_plugin.dead_host import Host, another_host
from tests.nbd_plugin.served import (
    NbdSite,
    answers,
    command_line,
    filled,
    pending,
    public_workers,
    run,
    serving,
)
from tests.nbd_plugin.supervised import ended
from tests.system.site import MIB, Vdi, depth, wait_until

pytestmark = pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="libnbd-bin is not installed")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces are made by root")


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdSite]:
    """For tests that leave a gateway as they found it."""
    with serving(tmp_path_factory.mktemp("shared")) as site:
        yield site


@pytest.fixture
def nbd_site(tmp_path: Path) -> Iterator[NbdSite]:
    with serving(tmp_path) as site:
        yield site


@dataclass(frozen=True)
class DeadHost:
    """A disk that is open on a host whose link has been cut, and the task of its connection."""

    site: NbdSite
    host: Host
    vdi: Vdi
    task: str


@pytest.fixture(scope="module")
def dead_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeadHost]:
    """It takes half a minute until the kernel notices: the first test has it die, and the last one looks."""
    with (
        another_host() as host,
        serving(tmp_path_factory.mktemp("dead"), "--nbd", f"{host.address}:0", "--insecure-nbd") as site,
    ):
        vdi = site.create_vdi(MIB)
        info = site.info(vdi)
        assert info["address"] == host.address
        host.hold(info["port"], info["exportname"] + "&mode=rw")
        wait_until(lambda: len(pending(site, vdi)) == 1, "the task of the client")
        [task] = pending(site, vdi)
        host.die()
        yield DeadHost(site, host, vdi, task)


def copying(source: str | Path, target: str | Path) -> "subprocess.Popen[str]":
    """nbdcopy with four connections, slow enough to be met on its way by a small window of requests."""
    return subprocess.Popen(
        [
            "nbdcopy",
            "--connections=4",
            "--threads=4",
            "--requests=1",
            "--request-size=65536",
            str(source),
            str(target),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_client_whose_host_has_died_just_now_has_its_lease(dead_host: DeadHost) -> None:
    assert pending(dead_host.site, dead_host.vdi) == [dead_host.task]


def test_what_the_api_says_of_a_disk_is_what_clients_connect_to(shared_site: NbdSite, tmp_path: Path) -> None:
    vdi, content = filled(shared_site, tmp_path, 4 * MIB)
    assert "cert" not in shared_site.info(vdi)
    run("nbdcopy", shared_site.uri(vdi), tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == content.read_bytes()
    run("nbdcopy", "--flush", content, shared_site.uri(vdi, write=True))
    log = shared_site.gateway.log()
    assert shared_site.gateway.session not in log
    assert (len(shared_site.workers()), len(shared_site.supervisors())) == (2, 1)


def test_kill_9_of_the_gateway_during_a_copy_harms_nobody_and_the_next_one_knows_it_all(
    nbd_site: NbdSite, tmp_path: Path, libnbd: Any
) -> None:
    vdi, content = filled_for_four(nbd_site, tmp_path)
    gateway = nbd_site.gateway
    workers, supervisors = nbd_site.workers(), nbd_site.supervisors()
    # The chain is one level longer than need be, and waits to be merged for those who read it.
    snapshot = gateway.call("VDI.snapshot", vdi.ref)
    reader = libnbd.NBD()
    reader.connect_uri(nbd_site.uri(vdi))
    beginning = bytes(reader.pread(MIB, 0))
    wait_until(lambda: len(pending(nbd_site, vdi)) == 1, "the task of the reader")
    [task] = pending(nbd_site, vdi)
    gateway.call("VDI.destroy", snapshot)
    copy = tmp_path / "copy.raw"
    with slow_target(copy, vdi.size) as target, copying(nbd_site.uri(vdi), target.uri) as process:
        try:
            wait_until(lambda: copy.stat().st_blocks > 0, "the copy to begin")
            target.pause()
            wait_until(lambda: len(pending(nbd_site, vdi)) == 5, "the tasks of the copy's connections")
            before = set(pending(nbd_site, vdi))
            gateway.kill()
            arrived = copy.stat().st_blocks
            target.go_on()
            wait_until(lambda: copy.stat().st_blocks > arrived + 100, "the copy to go on without the gateway")
            # What has not arrived yet waits, with the connections, for the next gateway.
            target.pause()
            assert process.poll() is None
            gateway.start()
            assert (nbd_site.supervisors(), nbd_site.workers()) == (supervisors, workers)
            wait_until(lambda: set(pending(nbd_site, vdi)) == before, "the tasks to be there again")
            wait_until(lambda: depth(nbd_site, vdi) == 2, "the chain to be known")
            sr = gateway.call("SR.get_uuid", nbd_site.repository)

            def is_refused_by_name() -> bool:
                asked = gateway.command("sr-coalesce", sr)
                assert (asked.returncode, depth(nbd_site, vdi)) == (3, 2), asked.stdout + asked.stderr
                return bool(re.search(r"waits for read by root at \S+ \(nbd, process", asked.stdout))

            # Until the readers have announced themselves, only their locks say that they are there.
            wait_until(is_refused_by_name, "the merge to know for whom it waits")
            assert reader.pread(MIB, 0) == beginning
            gateway.call("task.cancel", task)
            wait_until(partial(is_shut_down, libnbd, reader), "the disk to be taken away")
            assert nbd_site.finished_task(task)["status"] == "cancelled"
            assert set(pending(nbd_site, vdi)) == before - {task}
            target.go_on()
            _, error = process.communicate(timeout=60)
            assert (process.returncode, error) == (0, "")
        finally:
            process.kill()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", content, copy)
    wait_until(lambda: depth(nbd_site, vdi) == 1, "the merge, when nobody reads any more")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", content, nbd_site.uri(vdi))
    assert gateway.stop() == 0
    assert all(ended(each) for each in workers + supervisors)


def filled_for_four(site: NbdSite, tmp_path: Path) -> tuple[Vdi, Path]:
    """A disk with data for each of four connections: nbdcopy gives 128 MiB at a time to one."""
    vdi = site.create_vdi(512 * MIB)
    content = tmp_path / "content.raw"
    with content.open("wb") as file:
        for number in range(4):
            file.seek(number * 128 * MIB)
            file.write(os.urandom(8 * MIB))
        file.truncate(vdi.size)
    run("nbdcopy", "--flush", "--destination-is-zero", content, site.private_uri(vdi, write=True))
    return vdi, content


def is_shut_down(libnbd: Any, client: Any) -> bool:
    """Whether requests are refused because the lease has ended."""
    try:
        client.pread(512, 0)
    except libnbd.Error as refused:
        assert refused.errno == "ESHUTDOWN"
        return True
    return False


class SlowTarget:
    """An NBD server of nbdkit's own that takes its time for each write, and can be stopped."""

    def __init__(self, file: Path, size: int) -> None:
        with file.open("wb") as made:
            made.truncate(size)
        socket = file.with_suffix(".sock")
        self.uri = f"nbd+unix:///?socket={socket}"
        command = ["nbdkit", "-f", "-U", str(socket), "--filter=delay", "file", str(file), "wdelay=5ms"]
        self.process = subprocess.Popen(command)
        wait_until(socket.exists, "the target")

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def slow_target(file: Path, size: int) -> Iterator[SlowTarget]:
    target = SlowTarget(file, size)
    try:
        yield target
    finally:
        target.process.kill()
        target.process.wait()


def test_kill_9_of_the_supervisor_leaves_clients_and_brings_another_one(
    nbd_site: NbdSite, tmp_path: Path, libnbd: Any
) -> None:
    vdi, content = filled(nbd_site, tmp_path, 4 * MIB)
    client = libnbd.NBD()
    client.connect_uri(nbd_site.private_uri(vdi))
    workers = nbd_site.workers()
    for _ in range(2):
        [supervisor] = nbd_site.supervisors()
        os.kill(supervisor, signal.SIGKILL)
        wait_until(
            partial(is_replaced, nbd_site, supervisor, vdi),
            "another supervisor",
        )
        assert client.pread(MIB, 0) == content.read_bytes()[:MIB]
    assert not all(ended(each) for each in workers)
    assert nbd_site.gateway.stop() == 0
    wait_until(lambda: all(ended(each) for each in workers), "all workers to end")


def is_replaced(site: NbdSite, gone: int, vdi: Vdi) -> bool:
    found = site.supervisors()
    # The gateway says where NBD is again once the new one is ready; until then an orphan may answer.
    told = site.gateway.call("VDI.get_nbd_info", vdi.ref)
    return len(found) == 1 and found != [gone] and bool(told) and answers(site, vdi)


def test_kill_9_of_a_worker_frees_its_leases_and_the_address_answers_again(
    shared_site: NbdSite, tmp_path: Path, libnbd: Any
) -> None:
    vdi, content = filled(shared_site, tmp_path, 4 * MIB)
    writer = libnbd.NBD()
    writer.connect_uri(shared_site.private_uri(vdi, write=True))
    writer.pwrite(content.read_bytes()[:MIB], 0)
    writer.flush()
    for worker in shared_site.workers():
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(libnbd.Error):
        writer.pread(512, 0)
    assert answers(shared_site, vdi)
    run("nbdcopy", "--flush", content, shared_site.uri(vdi, write=True))
    run("nbdcopy", shared_site.private_uri(vdi), tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == content.read_bytes()


def test_a_taken_port_keeps_serve_from_starting_and_is_named(shared_site: NbdSite, tmp_path: Path) -> None:
    port = shared_site.info(shared_site.create_vdi(MIB))["port"]
    command = [program(), "serve", "--state-dir", str(tmp_path / "other"), "--http", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--nbd", f"127.0.0.1:{port}"],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"vdi-gateway serve: --nbd: can't listen on 127.0.0.1:{port}: Address already in use; give a free"
        " port and an address of this machine with --nbd, or --nbd off"
    )


@root_only
@pytest.mark.parametrize("asked_for", [False, True])
def test_without_nbdkit_serve_starts_unless_nbd_was_asked_for(tmp_path: Path, asked_for: bool) -> None:
    hidden = f'mount --bind /dev/null {shutil.which("nbdkit")} && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", hidden, "sh", program(), "serve", "--http", "127.0.0.1:0"]
    command += ["--state-dir", str(tmp_path / "state"), *(["--nbd", "127.0.0.1:0"] if asked_for else [])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = process.stdout.readline()
        process.terminate()
        log = process.stderr.read()
        assert process.wait(30) == (1 if asked_for else 0)
    assert ("ready: http://" in ready) is not asked_for
    assert "nbd://" not in ready
    advice = (
        "nbdkit is not installed; scripts/setup installs the Debian packages nbdkit and nbdkit-plugin-python"
    )
    assert (f"vdi-gateway serve: --nbd: {advice}" if asked_for else advice) in log


def test_vdi_gateway_nbd_alone_is_used_by_serve_and_may_stay(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    with subprocess.Popen(
        [program(), "nbd", "--state-dir", str(state), "--nbd", "127.0.0.1:0", "--stay"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=clean_environment(),
    ) as alone:
        try:
            assert alone.stdout is not None
            found = re.match(r"NBD ready: nbd://127\.0\.0\.1:(\d+) nbd\+unix:", alone.stdout.readline())
            assert found is not None
            with serving(tmp_path) as site:
                vdi, _ = filled(site, tmp_path, MIB)
                assert site.info(vdi)["port"] == found[1]
                assert site.supervisors() == [alone.pid]
                assert site.gateway.stop() == 0
                assert alone.poll() is None
                alone.terminate()
                assert alone.wait(30) == 0
        finally:
            alone.kill()


def test_serve_with_other_options_replaces_the_supervisor_and_clients_stay(
    nbd_site: NbdSite, tmp_path: Path, libnbd: Any
) -> None:
    vdi, content = filled(nbd_site, tmp_path, MIB)
    client = libnbd.NBD()
    client.connect_uri(nbd_site.private_uri(vdi))
    [before] = nbd_site.supervisors()
    nbd_site.gateway.kill()
    (nbd_site.gateway.state_dir / "config.toml").write_text("[limits]\nnbd_workers = 2\n")
    nbd_site.gateway.start()
    assert client.pread(MIB, 0) == content.read_bytes()
    assert answers(nbd_site, vdi)
    wait_until(lambda: len(public_workers(nbd_site)) == 2, "two workers")
    assert before in nbd_site.supervisors()
    client.shutdown()
    wait_until(lambda: before not in nbd_site.supervisors(), "the old one ends after its client")


def test_who_configures_it_gets_several_requests_of_a_connection_at_a_time(nbd_site: NbdSite) -> None:
    vdi = nbd_site.create_vdi(MIB)
    for configuration, wanted in (("", "parallel=false"), ("[nbd]\nparallel = true\n", "parallel=true")):
        assert nbd_site.gateway.stop() == 0
        (nbd_site.gateway.state_dir / "config.toml").write_text(configuration)
        nbd_site.gateway.start()
        assert answers(nbd_site, vdi)
        workers = nbd_site.workers()
        assert len(workers) == 2
        assert all(wanted in command_line(each) for each in workers)


def test_a_client_whose_host_died_has_lost_its_lease_within_a_minute(dead_host: DeadHost) -> None:
    site, vdi = dead_host.site, dead_host.vdi
    record = site.finished_task(dead_host.task, 60)
    finished = datetime.datetime.strptime(str(record["finished"]), "%Y%m%dT%H:%M:%SZ")
    assert datetime.timedelta(0) < finished - dead_host.host.died < datetime.timedelta(minutes=1)
    assert dead_host.host.holds
    assert answers(site, vdi)
