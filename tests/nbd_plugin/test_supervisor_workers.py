"""Which processes the supervisor knows of when not all could be started."""

import errno
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nbd_plugin.pool import Pool
from nbd_plugin.supervisor_events import Events
from nbd_plugin.supervisor_log import Log
from nbd_plugin.supervisor_workers import Workers
from nbd_plugin.worker import Worker, WorkerOptions, start_worker
from tests.nbd_plugin.supervised import eventually
from tests.nbd_plugin.test_pool import OPTIONS


@pytest.mark.parametrize("renewed", [False, True])
def test_a_worker_that_started_before_another_could_not_is_known_and_its_end_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    processes: list[subprocess.Popen[bytes]] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fails_at = 3 if renewed else 1

    def start(options: WorkerOptions, sockets: Sequence[socket.socket]) -> Worker:
        if len(processes) == fails_at:
            raise OSError("no more processes")
        process = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
        processes.append(process)
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.close(writing)
        return Worker(process.pid, os.pidfd_open(process.pid), ours.dup(), reading)

    events = Events()
    public = Pool([], OPTIONS, 2, start=start)
    private = Pool([], replace(OPTIONS, private=True), 1, on_demand=True, start=start)
    workers = Workers(public, private, events, Log())
    workers.begun = True
    try:
        workers.fill(0.0)
        if renewed:
            workers.renew("/tls")
        assert workers.problem is not None
        assert len(workers.everybody) == fails_at
        for process in processes:
            process.kill()

        def all_known_to_have_ended() -> bool:
            events.wait(0.1)
            return not workers.everybody

        eventually(all_known_to_have_ended, "the ends of the workers", 10)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        ours.close()
        theirs.close()


def test_a_worker_that_nobody_could_watch_does_not_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take clients from the socket, and never be told to stop."""

    def fail(_: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())

    monkeypatch.setattr(os, "pidfd_open", fail)
    options = replace(OPTIONS, nbdkit="/bin/cat", root=str(tmp_path), access=str(tmp_path / "access.sock"))
    before, descriptors = children(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="too many open files"):
        start_worker(options, [])
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_signal_to_a_worker_that_is_not_nbdkit_yet_is_not_the_supervisors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second SIGTERM would end all workers at once, whatever their clients have asked."""
    heard, waiting = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)

    def stay() -> None:
        os.write(waiting[1], b"x")
        signal.sigwait([signal.SIGUSR1])

    def no_action(*_: object) -> None: ...

    monkeypatch.setattr(os, "setsid", stay)
    options = replace(OPTIONS, nbdkit="/bin/cat", root=str(tmp_path), access=str(tmp_path / "access.sock"))
    before, handler = signal.set_wakeup_fd(heard[1]), signal.signal(signal.SIGTERM, no_action)
    worker = start_worker(options, [])
    try:
        assert os.read(waiting[0], 1) == b"x"
        worker.signal(signal.SIGTERM)
        ended, _, _ = select.select([worker.pidfd, heard[0]], [], [], 30)
        assert ended == [worker.pidfd]
    finally:
        worker.signal(signal.SIGKILL)
        how = worker.reap()
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(before)
        for fd in (*heard, *waiting):
            os.close(fd)
    assert how == "SIGTERM"
