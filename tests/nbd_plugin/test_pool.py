"""When workers are started, with a clock and workers of the test's own."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest

from nbd_plugin.pool import Pool
from nbd_plugin.worker import Worker, WorkerOptions

OPTIONS = WorkerOptions("/usr/bin/nbdkit", "/", "/access.sock", private=False, clients=0, handshake=0)


class Workers:
    """Starts workers that are none, and hears what they are told."""

    def __init__(self) -> None:
        self.started: list[WorkerOptions] = []
        self.fails_after = 1000
        self._leashes: dict[int, tuple[Worker, socket.socket]] = {}

    def start(self, options: WorkerOptions, sockets: Sequence[socket.socket]) -> Worker:
        if len(self.started) >= self.fails_after:
            raise OSError("no more processes")
        self.started.append(options)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        worker = Worker(len(self.started), os.pidfd_open(os.getpid()), leash=ours, started=0.0)
        self._leashes[worker.pid] = (worker, theirs)
        return worker

    def told(self, worker: Worker) -> list[str]:
        """What it was told since it was asked the last time."""
        orders = []
        with suppress(BlockingIOError):
            while True:
                orders.append(self._leashes[worker.pid][1].recv(64).decode())
        return orders

    def close(self) -> None:
        for worker, theirs in self._leashes.values():
            os.close(worker.pidfd)
            assert worker.leash is not None
            worker.leash.close()
            theirs.close()


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.close()


def test_pauses_before_restarts_double_up_to_half_a_minute_and_are_forgotten_after_a_sound_minute(
    workers: Workers,
) -> None:
    pool = Pool([], OPTIONS, 1, start=workers.start)
    now, pauses = 0.0, []
    for _ in range(11):
        (worker,) = pool.fill(now)
        worker.started = now
        assert pool.ended(worker, now)
        assert pool.again_at is not None
        pauses.append(pool.again_at - now)
        assert pool.fill(pool.again_at - 0.01) == []
        now = pool.again_at
    expected = [0.1 * 2**n for n in range(9)] + [30.0, 30.0]
    assert pauses == pytest.approx(expected)
    (worker,) = pool.fill(now)
    worker.started = now
    assert pool.ended(worker, now + 60)
    assert pool.again_at == pytest.approx(now + 60.1)


def test_a_worker_that_cannot_be_started_is_tried_again(workers: Workers) -> None:
    workers.fails_after = 1
    pool = Pool([], OPTIONS, 2, start=workers.start)
    with pytest.raises(OSError, match="no more processes"):
        pool.fill(0.0)
    assert len(pool.present) == 1
    workers.fails_after = 2
    assert pool.fill(0.05) == []
    (_,) = pool.fill(0.2)
    assert len(pool.present) == 2
    assert pool.again_at is None  # or the supervisor would not rest


def test_a_client_is_looked_for_only_while_no_worker_is_there_or_on_its_way(workers: Workers) -> None:
    pool = Pool([], OPTIONS, 1, on_demand=True, start=workers.start)
    assert pool.waits_for_demand
    (worker,) = pool.fill(0.0)
    assert not pool.waits_for_demand
    assert pool.ended(worker, 0.0)
    assert not pool.waits_for_demand  # it would be told of the same client until the pause is over
    pool.again_at = None
    assert pool.waits_for_demand
    pool.stop("stop")
    assert not pool.waits_for_demand


def test_a_new_generation_that_fails_leaves_the_present_one_in_charge(workers: Workers) -> None:
    pool = Pool([], OPTIONS, 2, start=workers.start)
    present = pool.fill(0.0)
    for each in present:
        each.ready = True
    failing, other = pool.replace_by(replace(OPTIONS, tls="/wrong"))
    other.ready = True
    assert not pool.look()
    assert pool.ended(failing, 1.0)
    assert workers.told(other) == ["stop"]  # or it would take clients, too
    assert not pool.is_being_replaced
    assert pool.is_ready
    assert (pool.present, pool.options, pool.again_at) == (set(present), OPTIONS, None)
    assert not pool.ended(other, 1.0)
    newer = pool.replace_by(replace(OPTIONS, tls="/right"))
    for each in newer:
        each.ready = True
    assert pool.look()
    assert (pool.present, pool.leaving, pool.options.tls) == (set(newer), set(present), "/right")
    assert [workers.told(each) for each in (*present, *newer)] == [["drain"], ["drain"], [], []]
    assert not pool.ended(present[0], 2.0)
    assert (pool.leaving, pool.again_at) == ({present[1]}, None)


def test_of_a_generation_that_another_overtakes_nobody_stays(workers: Workers) -> None:
    pool = Pool([], OPTIONS, 1, start=workers.start)
    (present,) = pool.fill(0.0)
    (overtaken,) = pool.replace_by(replace(OPTIONS, tls="/first"))
    (newest,) = pool.replace_by(replace(OPTIONS, tls="/second"))
    assert workers.told(overtaken) == ["stop"]
    overtaken.ready = True
    assert not pool.look()
    assert pool.workers == {present, overtaken, newest}
    workers.fails_after = 0
    with pytest.raises(OSError, match="no more processes"):
        pool.replace_by(replace(OPTIONS, tls="/third"))
    assert (workers.told(newest), workers.told(present)) == (["stop"], [])
    assert pool.present == {present}


def test_who_waits_for_a_restart_begins_with_the_newest_certificate(workers: Workers) -> None:
    pool = Pool([], OPTIONS, 1, start=workers.start)
    (worker,) = pool.fill(0.0)
    assert pool.ended(worker, 0.0)
    assert pool.replace_by(replace(OPTIONS, tls="/new")) == []
    pool.fill(1.0)
    assert workers.started[1:] == [replace(OPTIONS, tls="/new")]


@pytest.mark.parametrize("order", ["stop", "drain"])
def test_at_the_end_everybody_is_told_and_nobody_is_started(workers: Workers, order: str) -> None:
    with socket.socket() as listening:
        pool = Pool([listening], OPTIONS, 1, start=workers.start)
        everybody = [*pool.fill(0.0), *pool.replace_by(OPTIONS)]
        pool.stop(order)
        assert listening.fileno() == -1
    assert [workers.told(each) for each in everybody] == [[order], [order]]
    assert (pool.leaving, pool.present) == (set(everybody), set())
    assert not any(pool.ended(each, 1.0) for each in everybody)
    assert pool.fill(1.0) == []
    assert pool.again_at is None
