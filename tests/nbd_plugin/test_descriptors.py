"""Workers whose files have become too many for their limit: what they can't do then, they can later."""

import os
import resource
import signal
import socket
from pathlib import Path

from nbd_plugin.connections import SPARE_DESCRIPTORS
from tests.nbd_plugin.supervised import Supervised, ended, eventually


def allow(process: int, more: int | None) -> None:
    """Let a process have so many more files open than it has; None: as many as it could have."""
    _, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir(f"/proc/{process}/fd")))
    resource.prlimit(process, resource.RLIMIT_NOFILE, (hard if more is None else highest + 1 + more, hard))


def connected(supervisor: Supervised) -> socket.socket:
    return socket.create_connection(("127.0.0.1", supervisor.port), timeout=30)


def test_a_worker_without_any_descriptor_left_obeys_and_disconnects_silent_clients_later(
    tmp_path: Path,
) -> None:
    with Supervised(tmp_path, "--handshake", "1", plugin=None) as supervisor:
        [old] = supervisor.workers()
        with connected(supervisor) as silent:
            assert silent.recv(8) == b"NBDMAGIC"
            allow(old, 0)
            with connected(supervisor):
                eventually(lambda: "accept: Too many open files" in supervisor.log(), "no descriptor left")
                supervisor.signal(signal.SIGHUP)
                eventually(lambda: "new workers have taken over" in supervisor.log(), "new workers")
            allow(old, None)
            while silent.recv(4096):
                pass
        eventually(lambda: ended(old), "the old worker to end")
        assert "Exception in thread" not in supervisor.log()


def test_a_worker_without_any_descriptor_left_ends_in_order(tmp_path: Path) -> None:
    with Supervised(tmp_path, plugin=None) as supervisor:
        [worker] = supervisor.workers()
        with connected(supervisor) as silent:
            assert silent.recv(8) == b"NBDMAGIC"
            allow(worker, 0)
            with connected(supervisor):
                eventually(lambda: "accept: Too many open files" in supervisor.log(), "no descriptor left")
                assert supervisor.stop() == 0
        assert "exit code 0" in supervisor.log()
        assert "Exception in thread" not in supervisor.log()


def test_who_comes_when_descriptors_run_short_is_refused_and_told_why_in_the_log(tmp_path: Path) -> None:
    with Supervised(tmp_path, plugin=None) as supervisor:
        [worker] = supervisor.workers()
        allow(worker, SPARE_DESCRIPTORS)
        with connected(supervisor) as client:
            assert client.recv(8) == b""
        eventually(lambda: "too many files are open in this nbdkit" in supervisor.log(), "the reason")
        allow(worker, None)
        with connected(supervisor) as client:
            assert client.recv(8) == b"NBDMAGIC"
