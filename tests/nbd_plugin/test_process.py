import contextlib
import os
import select
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.nbd_plugin.conftest import Nbd
from tests.system.site import MIB, Vdi, stored_content, wait_until

GIB = 1 << 30


def status(nbd: Nbd, field: str) -> int:
    """A figure of the kernel about nbdkit: VmRSS in KiB, Threads."""
    for line in Path(f"/proc/{nbd.process.pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError(field)


def free(nbd: Nbd, vdi: Vdi) -> bool:
    return not nbd.site.gateway.call("VDI.get_current_operations", vdi.ref)


# With one thread nbdkit serves requests in that of the connection.
@pytest.mark.parametrize(
    ("threads", "number"), [("1", signal.SIGTERM), ("4", signal.SIGTERM), ("4", signal.SIGINT)]
)
def test_nbdkit_ends_at_once_beside_idle_clients_and_leaves_whole_images(
    nbd: Nbd, libnbd: Any, tmp_path: Path, threads: str, number: signal.Signals
) -> None:
    own = Nbd(nbd.site, tmp_path, options=("-t", threads))
    vdi, other = nbd.site.create_vdi(8 * MIB), nbd.site.create_vdi(8 * MIB)
    try:
        writer = own.connect(libnbd, vdi, write=True)
        writer.pwrite(b"w" * MIB, MIB)
        readers = [own.connect(libnbd, other) for _ in range(3)]
        for reader in readers:
            reader.pread(512, 0)
        own.process.send_signal(number)
        assert own.process.wait(10) == 0, own.log()
    finally:
        own.stop()
    assert "Traceback" not in own.log(), own.log()
    # What was written is there without a flush, because the image was closed.
    assert stored_content(vdi) == bytes(MIB) + b"w" * MIB + bytes(6 * MIB)
    wait_until(lambda: free(nbd, vdi) and free(nbd, other), "the leases to end")
    with pytest.raises(libnbd.Error):
        writer.pread(512, 0)


def test_a_request_in_flight_is_answered_before_nbdkit_ends(nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    own = Nbd(nbd.site, tmp_path)
    vdi = nbd.site.create_vdi(32 * MIB)
    content = os.urandom(32 * MIB)
    try:
        writer = nbd.connect(libnbd, vdi, write=True)
        writer.pwrite(content, 0)
        writer.shutdown()
        reader = own.connect(libnbd, vdi)
        buffer = libnbd.Buffer(len(content))
        cookie = reader.aio_pread(buffer, 0)
        # The answer has begun, and it is longer than what the socket takes.
        assert select.select([reader.aio_get_fd()], [], [], 20)[0]
        own.process.send_signal(signal.SIGTERM)
        while not reader.aio_command_completed(cookie):
            reader.poll(-1)
        assert buffer.to_bytearray() == content
        assert own.process.wait(10) == 0
    finally:
        own.stop()


def test_killing_nbdkit_frees_its_leases(nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    own = Nbd(nbd.site, tmp_path)
    vdi = nbd.site.create_vdi()
    writer = own.connect(libnbd, vdi, write=True)
    assert not free(nbd, vdi)
    own.process.kill()
    own.process.wait()
    wait_until(lambda: free(nbd, vdi), "the lease to end")
    nbd.connect(libnbd, vdi, write=True).shutdown()
    with contextlib.suppress(libnbd.Error):
        writer.shutdown()


def test_a_client_that_is_cut_off_frees_its_lease(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi()
    client = nbd.connect(libnbd, vdi, write=True)
    client.pwrite(b"1" * 512, 0)
    del client  # closes the socket without a word
    wait_until(lambda: free(nbd, vdi), "the lease to end")


def test_a_client_that_goes_while_it_is_owed_answers_ends_nobody_else(
    nbd: Nbd, libnbd: Any, tmp_path: Path
) -> None:
    own = Nbd(nbd.site, tmp_path, parallel=False)
    vdi = nbd.site.create_vdi(16 * MIB)
    try:
        other = own.connect(libnbd, vdi)
        for _ in range(20):
            client = own.connect(libnbd, vdi)
            for number in range(8):
                client.aio_pread(libnbd.Buffer(MIB), number * MIB)
            # An answer has begun, and together they are longer than what the socket takes.
            assert select.select([client.aio_get_fd()], [], [], 20)[0]
            del client
            assert other.pread(512, 0) == bytes(512)
        other.shutdown()
        assert own.process.poll() is None
    finally:
        assert own.stop() == 0, own.log()


def test_a_read_goes_on_while_the_gateway_is_killed_and_back(own_nbd: Nbd, libnbd: Any) -> None:
    vdi = own_nbd.site.create_vdi(8 * MIB)
    writer = own_nbd.connect(libnbd, vdi, write=True)
    writer.pwrite(b"1" * MIB, 0)
    own_nbd.site.gateway.kill()
    writer.pwrite(b"2" * MIB, MIB)
    assert writer.pread(2 * MIB, 0) == b"1" * MIB + b"2" * MIB
    writer.flush()
    own_nbd.site.gateway.start()
    wait_until(lambda: not free(own_nbd, vdi), "the lease to be announced")
    writer.shutdown()
    wait_until(lambda: free(own_nbd, vdi), "the lease to end")
    assert stored_content(vdi) == b"1" * MIB + b"2" * MIB + bytes(6 * MIB)


def test_an_open_waits_for_a_gateway_that_restarts(own_nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    patient = tmp_path / "patient"
    patient.mkdir()
    own = Nbd(own_nbd.site, patient, "wait=60")
    vdi = own_nbd.site.create_vdi()
    idle = status(own, "Threads")
    own_nbd.site.gateway.kill()
    client = libnbd.NBD()
    client.aio_connect_uri(own.uri(vdi))
    try:
        wait_until(lambda: status(own, "Threads") > idle, "nbdkit to accept the client")
        own_nbd.site.gateway.start()
        while client.aio_is_connecting():
            client.poll(-1)
        assert client.pread(512, 0) == bytes(512)
    finally:
        assert own.stop() == 0, own.log()


def test_filters_of_nbdkit_stand_in_front(nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    own = Nbd(
        nbd.site, tmp_path, "error=ENOSPC", "error-pwrite-rate=40%", "wdelay=1ms", filters=["error", "delay"]
    )
    vdi = nbd.site.create_vdi(8 * MIB)
    try:
        writer = own.connect(libnbd, vdi, write=True)
        failed = 0
        for number in range(64):
            while True:
                try:
                    writer.pwrite(bytes([number + 1]) * 4096, number * 100_000)
                    break
                except libnbd.Error as error:
                    assert error.errno == "ENOSPC"
                    failed += 1
        assert failed > 0
        for number in range(64):
            assert writer.pread(4096, number * 100_000) == bytes([number + 1]) * 4096
        writer.shutdown()
    finally:
        assert own.stop() == 0


def come_and_go(nbd: Nbd, libnbd: Any, vdi: Vdi, times: int) -> None:
    """Short connections, each of which has all of nbdkit's threads at work."""
    for _ in range(times):
        reader = nbd.connect(libnbd, vdi)
        buffer = libnbd.Buffer(4096)
        for number in range(16):
            reader.aio_pread(buffer, number * 4096)
        while reader.aio_in_flight():
            reader.poll(-1)
        reader.shutdown()


@pytest.mark.parametrize(("threads", "times"), [("1", 20), ("4", 200)])
def test_short_connections_leave_no_memory_and_no_thread_behind(
    nbd: Nbd, libnbd: Any, tmp_path: Path, threads: str, times: int
) -> None:
    own = Nbd(nbd.site, tmp_path, options=("-t", threads))
    vdi = nbd.site.create_vdi()
    try:
        idle = status(own, "Threads")
        come_and_go(own, libnbd, vdi, 20)
        wait_until(lambda: status(own, "Threads") == idle, "the threads to end")
        before = status(own, "VmRSS")
        come_and_go(own, libnbd, vdi, times)
        wait_until(lambda: status(own, "Threads") == idle, "the threads to end")
        # Of four threads each, 800 states that leaked would be 8 MiB and more.
        assert status(own, "VmRSS") - before < 6 << 10
        come_and_go(own, libnbd, vdi, 5)
        # Some of whose threads are ending now.
    finally:
        assert own.stop() == 0, own.log()


def test_what_is_known_of_large_disks_leaves_memory_when_they_are_closed(
    nbd: Nbd, libnbd: Any, tmp_path: Path
) -> None:
    own = Nbd(nbd.site, tmp_path)
    large = nbd.site.create_vdi(2040 * GIB)
    places = range(0, large.size, 32 * GIB)  # each of which takes another piece of the table of blocks
    writer = nbd.connect(libnbd, large, write=True)
    for place in places:
        writer.pwrite(b"w" * 512, place)
    writer.shutdown()
    try:
        before = status(own, "VmRSS")
        for _ in range(4):
            readers = [own.connect(libnbd, large) for _ in range(8)]
            for reader in readers:
                for place in places:
                    reader.aio_pread(libnbd.Buffer(512), place)
            for reader in readers:
                while reader.aio_in_flight():
                    reader.poll(-1)
            # Otherwise there is nothing to give back.
            assert status(own, "VmRSS") - before > 8 * (4 << 10)
            for reader in readers:
                reader.shutdown()
            wait_until(lambda: free(nbd, large), "the leases to end")
        wait_until(lambda: status(own, "VmRSS") - before < 6 << 10, "the memory to be given back", 10)
    finally:
        assert own.stop() == 0, own.log()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_thousand_short_connections_leave_a_worker_small(own_nbd: Nbd, libnbd: Any) -> None:
    vdi = own_nbd.site.create_vdi()
    idle = status(own_nbd, "Threads")
    for _ in range(20):
        come_and_go(own_nbd, libnbd, vdi, 1000)
        wait_until(lambda: status(own_nbd, "Threads") == idle, "the threads to end", 120)
        assert status(own_nbd, "VmRSS") < 60 << 10
