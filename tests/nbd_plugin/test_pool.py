"""When workers are started, with a clock and workers of the test's own."""

import os
from collections.abc import Sequence
from dataclasses import replace
from socket import socket

import pytest

from nbd_plugin.pool import Pool
from nbd_plugin.worker import Worker, WorkerOptions

OPTIONS = WorkerOptions("/usr/bin/nbdkit", "/", "/access.sock", private=False, clients=0, handshake=0)


class Workers:
    """Starts workers that are none, and hears what they are told."""

    def __init__(self) -> None:
        self.started: list[WorkerOptions] = []
        self.fails = False

    def start(self, options: WorkerOptions, sockets: Sequence[socket]) -> Worker:
        if self.fails:
            raise OSError("no more processes")
        self.started.append(options)
        return Worker(pid=len(self.started), pidfd=os.pidfd_open(os.getpid()), started=0.0)


def test_pauses_before_restarts_double_up_to_half_a_minute_and_are_forgotten_after_a_sound_minute() -> None:
    workers = Workers()
    pool = Pool([], OPTIONS, 1, start=workers.start)
    now, pauses = 0.0, []
    for _ in range(11):
        (worker,) = pool.fill(now)
        os.close(worker.pidfd)
        worker.started = now
        assert pool.ended(worker, now)
        assert pool.again_at is not None
        pauses.append(pool.again_at - now)
        assert pool.fill(pool.again_at - 0.01) == []
        now = pool.again_at
    expected = [0.1 * 2**n for n in range(9)] + [30.0, 30.0]
    assert pauses == pytest.approx(expected)
    (worker,) = pool.fill(now)
    os.close(worker.pidfd)
    worker.started = now
    assert pool.ended(worker, now + 60)
    assert pool.again_at == pytest.approx(now + 60.1)


def test_a_worker_that_cannot_be_started_is_tried_again() -> None:
    workers = Workers()
    workers.fails = True
    pool = Pool([], OPTIONS, 1, start=workers.start)
    with pytest.raises(OSError, match="no more processes"):
        pool.fill(0.0)
    workers.fails = False
    assert pool.fill(0.05) == []
    (worker,) = pool.fill(0.2)
    os.close(worker.pidfd)


def test_a_new_generation_that_fails_leaves_the_present_one_in_charge() -> None:
    workers = Workers()
    pool = Pool([], OPTIONS, 1, start=workers.start)
    (present,) = pool.fill(0.0)
    present.ready = True
    (new,) = pool.replace_by(replace(OPTIONS, tls="/wrong"))
    assert not pool.look()
    assert pool.ended(new, 1.0)
    assert not pool.is_being_replaced
    assert pool.is_ready
    assert (pool.present, pool.options, pool.again_at) == ({present}, OPTIONS, None)
    (newer,) = pool.replace_by(replace(OPTIONS, tls="/right"))
    newer.ready = True
    assert pool.look()
    assert (pool.present, pool.leaving, pool.options.tls) == ({newer}, {present}, "/right")
    for each in (present, new, newer):
        os.close(each.pidfd)
