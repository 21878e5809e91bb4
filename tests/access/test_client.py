import errno
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.access.client import AccessDisk, AccessRefused, list_vdis, open_vdi
from gateway.images.allocation import stored_blocks
from tests.conftest import RunningGateway
from tests.system.site import MIB, Site, Vdi, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    gateway = RunningGateway(tmp_path_factory.mktemp("gateway"))
    gateway.state_dir.mkdir(mode=0o700)
    (gateway.state_dir / "config.toml").write_text('[limits]\nlease_wait = "300ms"\n')
    gateway.start()
    try:
        yield gateway
    finally:
        if gateway.running:
            gateway.stop()
        gateway.kill()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def site(gateway: RunningGateway, tmp_path: Path) -> Iterator[Site]:
    """With an SR of the test's own."""
    yield Site(gateway, tmp_path / "sr")
    gateway.clear()


def socket_of(site: Site) -> str:
    return str(site.gateway.state_dir / "access.sock")


def opened(site: Site, vdi: Vdi, *, write: bool = False) -> AccessDisk:
    return open_vdi(socket_of(site), vdi.uuid, write=write, purpose="test")


def read(disk: AccessDisk, offset: int = 0, length: int = 512) -> bytes:
    buffer = bytearray(length)
    disk.pread_into(buffer, offset)
    return bytes(buffer)


def operations(site: Site, vdi: Vdi) -> dict[str, str]:
    found: dict[str, str] = site.gateway.call("VDI.get_current_operations", vdi.ref)
    return found


def refusal(site: Site, method: str, *arguments: object) -> str:
    with pytest.raises(AssertionError) as failed:
        site.gateway.call(method, *arguments)
    return str(failed.value)


def qemu_io(vdi: Vdi, command: str, *options: str) -> "subprocess.CompletedProcess[str]":
    image_format = "vpc" if vdi.file.suffix == ".vhd" else "raw"
    return subprocess.run(
        ["qemu-io", *options, "-f", image_format, "-c", command, str(vdi.file)],
        capture_output=True,
        text=True,
        check=False,
    )


class OtherProcess:
    """A disk held by Debian's interpreter without our packages; it reads or writes on until it is ended."""

    SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from gateway.access.client import open_vdi
write = sys.argv[4] == "write"
disk = open_vdi(sys.argv[2], sys.argv[3], write=write, purpose="loop")
print("held", flush=True)
buffer, turns = bytearray(b"o" * 512), 0
for line in sys.stdin:
    try:
        disk.pwrite(buffer, 0) if write else disk.pread_into(buffer, 0)
        print("moved", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
disk.close()
print("closed", flush=True)
"""

    def __init__(self, site: Site, vdi: Vdi, what: str) -> None:
        self.process = subprocess.Popen(
            ["/usr/bin/python3", "-I", "-S", "-c", self.SCRIPT, str(ROOT), socket_of(site), vdi.uuid, what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "held"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def move(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.line()

    def stop(self) -> None:
        """Until all of its threads have stopped, they may still hear what is asked of them."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def close(self) -> None:
        output, _ = self.process.communicate()
        assert output.strip() == "closed"


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
def test_what_is_written_is_read_by_the_next_who_opens(site: Site, image_format: str) -> None:
    vdi = site.create_vdi(image_format=image_format)
    with_writer = opened(site, vdi, write=True)
    content = os.urandom(3 * MIB)
    with_writer.pwrite(content, 12345)
    with_writer.zero(20000, 5000, trim=True)
    with_writer.flush()
    with_writer.close()
    with_writer.close()
    reader = opened(site, vdi)
    expected = bytearray(content)
    expected[20000 - 12345 : 25000 - 12345] = bytes(5000)
    assert (reader.size, reader.read_only) == (vdi.size, True)
    assert read(reader, 12345, len(content)) == expected
    with pytest.raises(OSError, match="reading only"):
        reader.pwrite(b"x", 0)
    assert sum(extent.length for extent in reader.extents(0, reader.size)) == reader.size
    reader.close()
    assert operations(site, vdi) == {}
    assert site.gateway.call("VDI.get_record", vdi.ref)["physical_utilisation"] != "0"


def test_others_in_the_gateway_and_outside_are_locked_out(site: Site) -> None:
    vdi = site.create_vdi()
    writer = opened(site, vdi, write=True)
    for write in (False, True):
        with pytest.raises(AccessRefused, match="VDI_IN_USE") as refused:
            opened(site, vdi, write=write)
        assert refused.value.errno == errno.EBUSY
        assert f"write by root (test, process {os.getpid()})" in refused.value.message
    assert "lock" in qemu_io(vdi, "read 0 512", "-r").stderr
    writer.close()
    reader = opened(site, vdi)
    assert qemu_io(vdi, "read 0 512", "-r").returncode == 0
    assert "lock" in qemu_io(vdi, "write 0 512").stderr
    opened(site, vdi).close()
    assert "VDI_IN_USE" in refusal(site, "VDI.destroy", vdi.ref)
    reader.close()
    assert qemu_io(vdi, "write 0 512").returncode == 0


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_disk_outlives_the_gateway_and_is_known_to_the_next_one(site: Site, what: str) -> None:
    vdi = site.create_vdi()
    client = OtherProcess(site, vdi, what)
    assert client.move() == "moved"
    wait_until(
        lambda: any(task.startswith("OpaqueRef:") for task in operations(site, vdi)), "the task of the bytes"
    )
    [task] = operations(site, vdi)
    site.gateway.kill()
    assert client.move() == "moved"
    assert "lock" in qemu_io(vdi, "write 0 512").stderr
    site.gateway.start()
    wait_until(lambda: operations(site, vdi) == {task: what}, "the lease to be announced")
    assert client.move() == "moved"
    destroyed = refusal(site, "VDI.destroy", vdi.ref)
    assert "VDI_IN_USE" in destroyed
    assert f"{what} by root (loop, process {client.process.pid}), task {task}" in destroyed
    if what == "write":
        with pytest.raises(AccessRefused, match="VDI_IN_USE"):
            opened(site, vdi)
        upload = subprocess.run(
            ["curl", "-s", "-X", "PUT", "--data-binary", "@-", site.import_url(vdi)],
            input=b"x" * 512,
            capture_output=True,
            check=True,
        )
        assert b"VDI_IN_USE" in upload.stdout
    assert site.task(task)["status"] == "pending"
    site.gateway.call("task.cancel", task)
    assert site.finished_task(task)["status"] == "cancelled"
    assert client.move() == str(errno.ESHUTDOWN)
    assert operations(site, vdi) == {}
    client.close()
    site.gateway.call("VDI.destroy", vdi.ref)


@pytest.mark.parametrize("what", ["read", "write"])
def test_the_death_of_a_client_frees_its_disk_at_once(site: Site, what: str) -> None:
    vdi = site.create_vdi()
    client = OtherProcess(site, vdi, what)
    assert client.move() == "moved"
    client.kill()
    writer = opened(site, vdi, write=True)
    writer.close()
    assert operations(site, vdi) == {}


def test_a_client_that_dies_while_the_gateway_is_down_holds_nothing_afterwards(site: Site) -> None:
    vdi = site.create_vdi()
    client = OtherProcess(site, vdi, "write")
    site.gateway.kill()
    client.kill()
    site.gateway.start()
    opened(site, vdi, write=True).close()


def test_until_a_disk_is_announced_the_kernel_keeps_others_away(site: Site) -> None:
    vdi = site.create_vdi()
    client = OtherProcess(site, vdi, "read")
    site.gateway.kill()
    client.stop()
    site.gateway.start()
    destroyed = refusal(site, "VDI.destroy", vdi.ref)
    assert "VDI_IN_USE" in destroyed
    assert operations(site, vdi) == {}
    client.process.send_signal(signal.SIGCONT)
    wait_until(lambda: list(operations(site, vdi).values()) == ["read"], "the lease to be announced")
    client.close()


def test_a_planned_restart_is_survived_too(site: Site) -> None:
    vdi = site.create_vdi()
    reader = opened(site, vdi)
    read(reader)
    site.gateway.restart()
    read(reader)
    wait_until(lambda: list(operations(site, vdi).values()) == ["read"], "the lease to be announced")
    reader.close()
    assert operations(site, vdi) == {}


def test_logging_out_ends_the_sessions_disks_at_once(site: Site) -> None:
    vdi = site.create_vdi()
    session = site.gateway.session
    told: list[str] = []
    revoked = threading.Event()

    def on_revoke(reason: str) -> None:
        told.append(reason)
        revoked.set()

    disk = open_vdi(socket_of(site), vdi.uuid, session=session, on_revoke=on_revoke)
    fds = set(os.listdir("/proc/self/fd"))
    site.gateway.call("session.logout")
    site.gateway._session = None
    assert revoked.wait(20)
    assert told == ["its session has ended"] == [disk.revoked]
    with pytest.raises(OSError, match="the lease has ended") as ended:
        read(disk)
    assert ended.value.errno == errno.ESHUTDOWN
    site.gateway.call("VDI.destroy", vdi.ref)
    disk.close()
    assert len(os.listdir("/proc/self/fd")) < len(fds)


def test_a_revocation_takes_the_files_away_from_requests_in_other_threads(site: Site) -> None:
    vdi = site.create_vdi()
    writer = opened(site, vdi, write=True)
    ends: list[int | None] = []

    def write_on(offset: int) -> None:
        try:
            while True:
                writer.pwrite(b"x" * 4096, offset)
        except OSError as error:
            ends.append(error.errno)

    threads = [threading.Thread(target=write_on, args=(number * MIB,)) for number in range(3)]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: any(task.startswith("OpaqueRef:") for task in operations(site, vdi)), "the task of the bytes"
    )
    [task] = operations(site, vdi)
    site.gateway.call("task.cancel", task)
    for thread in threads:
        thread.join()
    assert ends == [errno.ESHUTDOWN] * 3
    opened(site, vdi, write=True).close()
    writer.close()
    assert qemu_io(vdi, "read 0 4M", "-r").returncode == 0


def test_the_vdis_that_could_be_opened_are_listed(site: Site) -> None:
    vdis = [site.create_vdi() for _ in range(3)]
    for vdi, name in zip(vdis, "bca", strict=True):
        site.gateway.call("VDI.set_name_label", vdi.ref, name)
    expected = [(vdis[2].uuid, "a"), (vdis[0].uuid, "b"), (vdis[1].uuid, "c")]
    assert list_vdis(socket_of(site)) == expected
    assert list_vdis(socket_of(site), site.gateway.session) == expected
    with pytest.raises(AccessRefused, match="SESSION_INVALID"):
        list_vdis(socket_of(site), "OpaqueRef:no-session")


def test_a_disk_is_taken_away_from_all_who_hold_it(site: Site) -> None:
    vdi = site.create_vdi()
    client, idle = OtherProcess(site, vdi, "read"), opened(site, vdi)
    site.gateway.call("VDI.force_unlock", vdi.ref)
    wait_until(lambda: operations(site, vdi) == {}, "both to give it up")
    assert client.move() == str(errno.ESHUTDOWN)
    assert idle.revoked is not None and "took the disk away" in idle.revoked
    idle.close()
    client.close()
    opened(site, vdi, write=True).close()


def test_a_stopped_process_keeps_a_revoked_disk_until_it_goes_on_and_the_log_says_so(site: Site) -> None:
    vdi = site.create_vdi()
    client = OtherProcess(site, vdi, "write")
    client.stop()
    site.gateway.call("VDI.force_unlock", vdi.ref)
    wait_until(lambda: "it is stopped, and goes on with SIGCONT" in site.gateway.log(), "the log to say so")
    with pytest.raises(AccessRefused, match="VDI_IN_USE"):
        opened(site, vdi)
    last = site.gateway.call("VDI.get_sm_config", vdi.ref)["last-refusal"]
    assert f"write by root (loop, process {client.process.pid})" in last
    client.process.send_signal(signal.SIGCONT)
    wait_until(lambda: operations(site, vdi) == {}, "the disk to be given up")
    assert client.move() == str(errno.ESHUTDOWN)
    client.close()


def test_without_a_gateway_opening_fails(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No such file|refused"):
        open_vdi(str(tmp_path / "access.sock"), "00000000-0000-4000-8000-000000000000")


def test_the_files_of_a_disk_can_be_looked_at_until_they_are_taken_away(site: Site) -> None:
    vdi = site.create_vdi()
    disk = opened(site, vdi)
    assert disk.look(lambda chain: [node.path for node in chain.nodes]) == [str(vdi.file)]
    assert list(disk.look(stored_blocks)) == []
    with pytest.raises(ZeroDivisionError):
        disk.look(lambda _: 1 // 0)
    site.gateway.call("VDI.force_unlock", vdi.ref)
    wait_until(lambda: disk.revoked is not None, "the disk to be taken away")
    with pytest.raises(OSError, match="lease has ended"):
        disk.look(stored_blocks)
    with pytest.raises(OSError, match="lease has ended"):
        disk.reader(nowait=True)(bytearray(512), 0)
    disk.close()


def test_a_reader_that_does_not_wait_counts_what_it_has_read(site: Site) -> None:
    vdi = site.create_vdi()
    with_data = opened(site, vdi, write=True)
    with_data.pwrite(b"d" * MIB, 0)
    with_data.close()
    disk = opened(site, vdi)
    now = disk.reader(nowait=True)
    with pytest.raises(BlockingIOError):
        now(bytearray(4096), 0)
    assert disk.bytes_read == 0
    disk.pread_into(bytearray(4096), 0)
    buffer = bytearray(4096)
    now(buffer, 0)
    assert buffer == b"d" * 4096
    assert disk.bytes_read == 8192
    disk.close()
