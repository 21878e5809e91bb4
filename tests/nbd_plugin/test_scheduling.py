"""How the kernel schedules nbdkit's threads, and what it costs nobody who has one connection."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nbd_plugin import scheduling
from nbd_plugin.proc import running_threads
from tests.nbd_plugin.conftest import Nbd
from tests.system.site import MIB, Vdi, wait_until

CONTENT: Final = os.urandom(8 * MIB)


# nbdkit's threads


@pytest.fixture(params=["1", "4"])
def threads(request: pytest.FixtureRequest) -> int:
    """For each connection. With one nbdkit serves requests in that of the connection."""
    return int(request.param)


@pytest.fixture
def own(nbd: Nbd, tmp_path: Path, threads: int) -> Iterator[Nbd]:
    own = Nbd(nbd.site, tmp_path, options=("-t", str(threads)))
    try:
        yield own
    finally:
        assert own.stop() == 0, own.log()
    assert "Traceback" not in own.log(), own.log()


def written(nbd: Nbd, libnbd: Any) -> Vdi:
    vdi = nbd.site.create_vdi(len(CONTENT))
    writer = nbd.connect(libnbd, vdi, write=True)
    writer.pwrite(CONTENT, 0)
    writer.shutdown()
    return vdi


def interrupting_nobody(nbd: Nbd) -> set[int]:
    return under(nbd, os.SCHED_BATCH)


def under(nbd: Nbd, policy: int) -> set[int]:
    """The threads of nbdkit that the kernel schedules by this policy."""
    found = set()
    for name in os.listdir(f"/proc/{nbd.process.pid}/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            if os.sched_getscheduler(int(name)) == policy:
                found.add(int(name))
    return found


class Requests:
    """As many requests as nbdkit has threads for a connection, each longer than what the socket takes.

    No thread is done with its own, and so each has one, before the answers are read.
    """

    def __init__(self, libnbd: Any, reader: Any, number: int) -> None:
        self._reader = reader
        self._buffers = [libnbd.Buffer(4 * MIB) for _ in range(number)]
        for place, buffer in enumerate(self._buffers):
            reader.aio_pread(buffer, place * MIB)

    def all_answered(self) -> bool:
        """Waits for the answers; whether they are right."""
        while self._reader.aio_in_flight():
            self._reader.poll(-1)
        return all(
            buffer.to_bytearray() == CONTENT[place * MIB :][: 4 * MIB]
            for place, buffer in enumerate(self._buffers)
        )


def test_one_connection_keeps_its_policy(own: Nbd, libnbd: Any, threads: int) -> None:
    vdi = written(own, libnbd)
    for _ in range(3):  # one after the other
        reader = own.connect(libnbd, vdi)
        assert Requests(libnbd, reader, threads).all_answered()
        assert interrupting_nobody(own) == set()
        reader.shutdown()
        wait_until(lambda: not own.site.gateway.call("VDI.get_current_operations", vdi.ref), "the end")


def test_who_runs_nbdkit_under_a_policy_keeps_it(own: Nbd, libnbd: Any, threads: int) -> None:
    os.sched_setscheduler(own.process.pid, os.SCHED_IDLE, os.sched_param(0))
    vdi = written(own, libnbd)
    first, second = own.connect(libnbd, vdi), own.connect(libnbd, vdi)
    for reader in (first, second):
        assert Requests(libnbd, reader, threads).all_answered()
    assert interrupting_nobody(own) == set()
    before = len(under(own, os.SCHED_IDLE))
    second.shutdown()
    wait_until(lambda: len(under(own, os.SCHED_IDLE)) < before, "the threads of the second to end")
    assert Requests(libnbd, first, threads).all_answered()
    assert len(under(own, os.SCHED_IDLE)) > threads  # the main thread, and all that read
    first.shutdown()


def test_a_connection_that_asks_about_the_disk_first_is_one(own: Nbd, libnbd: Any, threads: int) -> None:
    vdi = written(own, libnbd)
    reader = libnbd.NBD()
    reader.set_opt_mode(True)
    reader.connect_uri(own.uri(vdi))
    reader.opt_info()
    reader.opt_go()
    assert Requests(libnbd, reader, threads).all_answered()
    assert interrupting_nobody(own) == set()
    reader.shutdown()


def test_all_threads_of_a_disk_with_two_connections_interrupt_nobody(
    own: Nbd, libnbd: Any, threads: int
) -> None:
    vdi = written(own, libnbd)
    first, second = own.connect(libnbd, vdi), own.connect(libnbd, vdi)
    requests = [Requests(libnbd, reader, threads) for reader in (first, second)]
    wait_until(lambda: len(interrupting_nobody(own)) == 2 * threads, "the threads of both to read")
    assert all(each.all_answered() for each in requests)

    second.shutdown()
    wait_until(lambda: not interrupting_nobody(own), "the threads of the first to be as before")
    assert Requests(libnbd, first, threads).all_answered()
    assert interrupting_nobody(own) == set()

    # All threads of the first have read by now.
    second = own.connect(libnbd, vdi)
    assert len(interrupting_nobody(own)) == threads
    third = own.connect(libnbd, vdi)
    second.shutdown()
    third.pread(512, 0)
    assert len(interrupting_nobody(own)) == threads + 1
    third.shutdown()
    wait_until(lambda: not interrupting_nobody(own), "the threads of the first to be as before")
    assert Requests(libnbd, first, threads).all_answered()
    first.shutdown()


def test_connections_to_different_disks_keep_their_policy(own: Nbd, libnbd: Any, threads: int) -> None:
    readers = [own.connect(libnbd, written(own, libnbd)) for _ in range(2)]
    requests = [Requests(libnbd, reader, threads) for reader in readers]
    assert all(each.all_answered() for each in requests)
    assert interrupting_nobody(own) == set()
    for reader in readers:
        reader.shutdown()


# The module alone


class Reader:
    """A thread that reads once, and runs on until it is told to end."""

    def __init__(self, connection: object) -> None:
        self._has_read, self._may_end = threading.Event(), threading.Event()
        self._connection = connection
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._thread.native_id is not None
        self.number: int = self._thread.native_id
        assert self._has_read.wait(30)

    def _run(self) -> None:
        scheduling.reads(self._connection)
        self._has_read.set()
        self._may_end.wait(60)

    @property
    def policy(self) -> int:
        return os.sched_getscheduler(self.number)

    def end(self) -> None:
        self._may_end.set()
        self._thread.join()
        wait_until(lambda: self.number not in running_threads(), "the thread to end")


@pytest.fixture
def readers() -> Iterator[list[Reader]]:
    """To be filled; ended afterwards, when nothing may be known of any connection."""
    readers: list[Reader] = []
    yield readers
    for reader in readers:
        reader.end()
    try:
        assert not scheduling._readers
        assert not scheduling._disks
    finally:  # the next test fails for reasons of its own
        scheduling._readers.clear()
        scheduling._disks.clear()


def test_who_closes_twice_counts_once(readers: list[Reader]) -> None:
    for connection in "abc":
        scheduling.opened("disk", connection)
    readers.append(Reader("a"))
    scheduling.closed("b")
    scheduling.closed("b")
    assert readers[0].policy == os.SCHED_BATCH  # beside c
    scheduling.closed("c")
    assert readers[0].policy == os.SCHED_OTHER
    scheduling.closed("a")
    scheduling.closed("a")
    scheduling.closed("unheard of")


def test_a_connection_that_is_closed_reads_nothing(readers: list[Reader]) -> None:
    for connection in "abc":
        scheduling.opened("disk", connection)
    scheduling.closed("c")
    readers.append(Reader("c"))
    assert readers[0].policy == os.SCHED_OTHER  # beside a and b
    scheduling.closed("b")
    scheduling.closed("a")
    readers.append(Reader("a"))
    assert readers[1].policy == os.SCHED_OTHER


def test_where_policies_are_forbidden_nothing_else_changes(
    readers: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def refuse(thread: int, policy: int, _parameters: os.sched_param) -> None:
        refused.append((thread, policy))
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as sandbox:
        sandbox.setattr(os, "sched_setscheduler", refuse)
        scheduling.opened("disk", "a")
        readers.append(Reader("a"))
        scheduling.opened("disk", "b")
        readers.append(Reader("b"))
        scheduling.closed("b")
    a = readers[0].number
    assert refused == [(a, os.SCHED_BATCH), (0, os.SCHED_BATCH), (a, os.SCHED_OTHER)]
    assert [reader.policy for reader in readers] == [os.SCHED_OTHER] * 2
    # Who is there was kept count of.
    scheduling.opened("disk", "c")
    assert [reader.policy for reader in readers] == [os.SCHED_BATCH, os.SCHED_OTHER]
    scheduling.closed("a")
    scheduling.closed("c")


def test_disks_are_opened_and_closed_where_nobody_can_look_which_threads_there_are(
    readers: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> set[int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    scheduling.opened("disk", "a")
    readers.append(Reader("a"))
    with monkeypatch.context() as crowded:
        crowded.setattr(scheduling, "running_threads", fail)
        scheduling.opened("disk", "b")
        scheduling.closed("b")
    scheduling.opened("disk", "c")
    assert readers[0].policy == os.SCHED_BATCH
    scheduling.closed("c")
    scheduling.closed("a")


def test_a_thread_that_has_ended_is_left_alone(
    readers: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduling.opened("disk", "a")
    readers += [Reader("a"), Reader("a")]
    readers[0].end()
    touched = []
    with monkeypatch.context() as recorded:
        recorded.setattr(os, "sched_setscheduler", lambda thread, *_: touched.append(thread))
        scheduling.opened("disk", "b")
        scheduling.closed("b")
    assert touched == [readers[1].number] * 2
    scheduling.closed("a")
