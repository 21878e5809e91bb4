"""`vdi-gateway inspect` on disks in chains: what it tells is what their makers were told, and what it mounts
goes away however it ends."""

import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gateway.access.client import open_vdi
from tests.conftest import STOP_SECONDS, clean_environment, program
from tests.system.guests import GPT, MBR, Disk, Guest, make_guests, missing_programs
from tests.system.inspecting import Inspecting, is_mounted, left_behind
from tests.system.mounted import digests, filesystem, needs_fuse, needs_loops, run, wait_until_free
from tests.system.site import MIB, Site, Vdi, wait_until

# Each guest has a file of at least so many bytes.
LARGE = 700_000
# Not every kernel has vfat.
MOUNTED = {".gpt": ("ext4", "ntfs"), ".dos": ("xfs",)}
LABEL, UUID = "system disk", "5eed5eed-1234-4321-8888-0123456789ab"

pytestmark = [
    needs_fuse,
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """One of these tests at a time on this machine, whichever process runs it.

    What an inspection has left is looked for in all of the machine, and each start takes away what any killed
    one has left.
    """
    with (Path(tempfile.gettempdir()) / "vdi-gateway-inspect-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> list[Guest]:
    made = make_guests(tmp_path_factory.mktemp("guests"), seed=2)
    run("e2fsck", "-f", "-p", made[0].images[-1])
    run("tune2fs", "-L", LABEL, "-U", UUID, "-f", made[0].images[-1])
    return made


@pytest.fixture(scope="module")
def ext4(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Vdi:
    """A disk that is one filesystem, with a file that says so."""
    directory = tmp_path_factory.mktemp("ext4")
    (directory / "files").mkdir()
    (directory / "files" / "hello").write_text("world")
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    run("mkfs.ext4", "-q", "-L", LABEL, "-d", directory / "files", image)
    vdi = shared_site.create_vdi(16 * MIB)
    control = str(shared_site.gateway.state_dir / "access.sock")
    with closing(open_vdi(control, vdi.uuid, write=True, purpose="test")) as disk:
        disk.pwrite(image.read_bytes(), 0)
    return vdi


@pytest.fixture
def inspecting(site: Site, ext4: Vdi, tmp_path: Path) -> Iterator[Callable[[], Inspecting]]:
    """Starts an inspection of the disk that is one filesystem."""
    started: list[Inspecting] = []

    def start() -> Inspecting:
        started.append(Inspecting(site, tmp_path / f"files {len(started)}", ext4.uuid))
        return started[-1]

    yield start
    for each in started:
        each.end()


def inspected(site: Site, vdi: Vdi, *arguments: str) -> dict[str, Any]:
    before = left_behind()
    done = site.gateway.run("inspect", vdi.uuid, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    assert left_behind() <= before
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_partitions_and_filesystems_of_a_chain_are_told(site: Site, disk: Disk) -> None:
    told = inspected(site, disk.vdi)
    table = json.loads(run("sfdisk", "--json", disk.image))["partitiontable"]
    assert (told["uuid"], told["virtual_size"]) == (disk.vdi.uuid, disk.vdi.size)
    assert (told["partition_table"], told["sector_size"]) == (table["label"], 512)
    volumes = {each["number"]: each for each in told["volumes"]}
    assert {number: (each["start"], each["size"]) for number, each in volumes.items()} == disk.table
    assert [each["type"] for each in told["volumes"]] == [each["type"] for each in table["partitions"]]
    for number, guest in disk.partitions.items():
        filesystem = volumes[number]["filesystem"]
        assert filesystem["type"] == guest.kind.name
        image = guest.images[-1]
        for key, tag in (("label", "LABEL"), ("uuid", "UUID")):
            # 2 is blkid's code for a tag that isn't there.
            found = subprocess.run(
                ["blkid", "-p", "-o", "value", "-s", tag, image], capture_output=True, text=True, check=False
            )
            assert filesystem[key] == found.stdout.rstrip("\n")
        assert filesystem["used"] is None
    first = volumes[1]["filesystem"]
    assert (first["label"], first["uuid"]) == (LABEL, UUID)
    wait_until_free(site.gateway, disk.vdi)


@needs_loops
@pytest.mark.parametrize("disk", [MBR], indirect=True)
def test_used_space_is_what_the_makers_tools_count(site: Site, disk: Disk) -> None:
    told = inspected(site, disk.vdi, "--used")
    spaces = {
        each["filesystem"]["type"]: each["filesystem"] for each in told["volumes"] if each["filesystem"]
    }
    guests = {guest.kind.name: guest for guest in disk.partitions.values()}
    lines = run("dumpe2fs", "-h", guests["ext4"].images[-1]).splitlines()
    counts = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    block = int(counts["Block size"])
    free = (int(counts["Free blocks"]) - int(counts["Reserved block count"])) * block
    # The kernel keeps a fiftieth for itself (s_resv_clusters).
    assert free - int(counts["Block count"]) * block // 50 <= spaces["ext4"]["free"] <= free
    assert spaces["ext4"]["used"] >= LARGE
    assert spaces["ext4"]["size"] <= guests["ext4"].kind.size
    database = run(
        "xfs_db", "-r", "-f", "-c", "sb 0", "-c", "print fdblocks blocksize", guests["xfs"].images[-1]
    )
    blocks, size = (int(line.rpartition("=")[2]) for line in database.splitlines())
    # The kernel keeps some for itself.
    assert blocks * size * 0.5 <= spaces["xfs"]["free"] <= blocks * size
    assert spaces["xfs"]["used"] >= LARGE
    # ntfs-3g mounts also where the kernel knows no NTFS.
    assert LARGE <= spaces["ntfs"]["used"] < guests["ntfs"].kind.size
    wait_until_free(site.gateway, disk.vdi)


@needs_loops
def test_a_filesystem_of_a_chain_is_mounted_read_only_and_its_files_are_those_of_the_guest(
    site: Site, disk: Disk, tmp_path: Path
) -> None:
    for number, guest in disk.partitions.items():
        if guest.kind.name not in MOUNTED[disk.image.suffix]:
            continue
        inspecting = Inspecting(site, tmp_path / guest.kind.name, disk.vdi.uuid, "--partition", str(number))
        try:
            directory = inspecting.directory
            words = f"partition {number} is mounted on {directory}, read-only ({guest.kind.name});"
            assert inspecting.said == f"{words} Ctrl-C unmounts it\n"
            assert digests(directory) == guest.files
            [options] = run("findmnt", "--noheadings", "--output", "OPTIONS", directory).split()
            assert {"ro", "nosuid", "nodev", "noexec"} <= set(options.split(","))
            with pytest.raises(OSError, match="Read-only"):
                (directory / "new").touch()
            inspecting.process.send_signal(signal.SIGINT)
            assert inspecting.ended() == 0
        finally:
            inspecting.end()
    wait_until_free(site.gateway, disk.vdi)


@needs_loops
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_filesystem_that_was_never_unmounted_is_mounted_without_its_journal(
    site: Site, guests: list[Guest], tmp_path: Path, kind: str
) -> None:
    [guest] = [each for each in guests if each.kind.name == kind]
    image, dirty = tmp_path / "image", tmp_path / "dirty"
    run("cp", guest.images[-1], image)
    with filesystem(image, tmp_path / "guest", kind=kind) as files:
        (files / "new").write_bytes(b"new" * MIB)
        run("sync", "--file-system", files)
        run("cp", image, dirty)
    # As it is, it can't be mounted from what can't be written to.
    dirty.chmod(0o400)
    run("mount", "-t", kind, "-o", "loop,ro", dirty, tmp_path / "guest", code=32)
    vdi = site.create_vdi(guest.kind.size)
    control = str(site.gateway.state_dir / "access.sock")
    with closing(open_vdi(control, vdi.uuid, write=True, purpose="test")) as disk:
        disk.pwrite(dirty.read_bytes(), 0)
    running = Inspecting(site, tmp_path / "files", vdi.uuid)
    try:
        assert {path.name for path in running.directory.iterdir()} >= {"step 0", "step 1"}
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0
    finally:
        running.end()


@pytest.mark.parametrize("disk", [GPT], indirect=True)
def test_which_filesystems_there_are_is_told_when_none_is_named(
    site: Site, disk: Disk, tmp_path: Path
) -> None:
    done = site.gateway.run("inspect", disk.vdi.uuid, "--mount", str(tmp_path))
    assert done.returncode == 1
    assert f"give --partition N for one of: 1 (ext4, {LABEL}, 16 MiB)" in done.stderr
    assert not is_mounted(tmp_path)


@needs_loops
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)]
)
def test_a_signal_unmounts(
    site: Site, ext4: Vdi, inspecting: Callable[[], Inspecting], number: signal.Signals
) -> None:
    running = inspecting()
    assert running.said.startswith("the disk is mounted on ")
    assert (running.directory / "hello").read_text() == "world"
    running.process.send_signal(number)
    assert running.ended() == 0
    assert running.errors() == ""
    wait_until_free(site.gateway, ext4)


@needs_loops
def test_umount_ends_it(inspecting: Callable[[], Inspecting]) -> None:
    running = inspecting()
    run("umount", running.directory)
    assert running.ended() == 0


@needs_loops
def test_who_is_in_the_directory_is_told_and_waited_for(inspecting: Callable[[], Inspecting]) -> None:
    running = inspecting()
    with subprocess.Popen(["sleep", "600"], cwd=running.directory) as sleeper:
        try:
            running.process.send_signal(signal.SIGINT)
            wait_until(lambda: f"in use by sleep ({sleeper.pid})" in running.errors(), "the user to be told")
            assert is_mounted(running.directory)
            assert running.process.poll() is None
        finally:
            sleeper.kill()
    assert running.ended() == 0


@needs_loops
def test_a_second_signal_takes_the_directory_away(inspecting: Callable[[], Inspecting]) -> None:
    running = inspecting()
    with subprocess.Popen(["sleep", "600"], cwd=running.directory) as sleeper:
        try:
            running.process.send_signal(signal.SIGINT)
            wait_until(lambda: "in use by" in running.errors(), "the user to be told")
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(STOP_SECONDS) == 128 + signal.SIGTERM
            assert not is_mounted(running.directory)
        finally:
            sleeper.kill()
    wait_until(lambda: left_behind() <= running.before, "the loop device to go")


@needs_loops
def test_what_a_kill_leaves_the_next_start_cleans(
    site: Site, ext4: Vdi, inspecting: Callable[[], Inspecting]
) -> None:
    running = inspecting()
    child = running.mount_process()
    running.process.kill()
    running.process.wait()
    # The files go at once, and with them the lease.
    wait_until(lambda: not os.path.exists(f"/proc/{child}"), "the mount to end")
    wait_until_free(site.gateway, ext4)
    assert is_mounted(running.directory)
    again = Inspecting(site, running.directory, ext4.uuid)
    try:
        assert (running.directory / "hello").read_text() == "world"
        again.process.send_signal(signal.SIGTERM)
        again.process.wait(STOP_SECONDS)
        assert not is_mounted(running.directory)
        assert left_behind() <= running.before
    finally:
        again.end()


@needs_loops
def test_when_the_files_go_it_ends_and_says_so(inspecting: Callable[[], Inspecting]) -> None:
    running = inspecting()
    os.kill(running.mount_process(), signal.SIGKILL)
    assert running.ended() == 1
    assert "the files of the disk are gone" in running.errors()


@needs_loops
@pytest.mark.long
def test_files_that_hang_are_ended(inspecting: Callable[[], Inspecting]) -> None:
    running = inspecting()
    os.kill(running.mount_process(), signal.SIGSTOP)
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(90)
    assert not is_mounted(running.directory)
    assert left_behind() <= running.before


@needs_loops
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_at_any_moment_leaves_nothing(
    site: Site, ext4: Vdi, tmp_path: Path, number: signal.Signals
) -> None:
    """After SIGKILL it is the next start that cleans up."""
    before = left_behind()
    command = [program(), "inspect", "--state-dir", str(site.gateway.state_dir), ext4.uuid, "--used"]

    def run_for(seconds: float | None) -> int:
        with (tmp_path / "errors").open("wb") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=clean_environment()
            )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            return process.wait(STOP_SECONDS)

    started = time.monotonic()
    assert run_for(None) == 0
    whole = time.monotonic() - started
    for part in range(20):
        run_for(whole * (part + 0.5) / 20)
        # While Python itself begins, Ctrl-C is shown where it came.
        assert "gateway/cli/inspect" not in (tmp_path / "errors").read_text()
        if number is not signal.SIGKILL:
            assert left_behind() <= before
    assert run_for(None) == 0
    # A mount that was killed a moment ago may still be on its way out.
    wait_until(lambda: run_for(None) == 0 and left_behind() <= before, "everything to go")
    wait_until_free(site.gateway, ext4)


def test_a_disk_that_is_written_is_busy(site: Site, ext4: Vdi) -> None:
    control = str(site.gateway.state_dir / "access.sock")
    with closing(open_vdi(control, ext4.uuid, write=True, purpose="test")):
        done = site.gateway.run("inspect", ext4.uuid)
    assert done.returncode == 1
    assert (
        done.stderr
        == "vdi-gateway inspect: the disk is being written, or replaced; vdi-chain tells by whom\n"
    )


def test_a_snapshot_is_inspected(site: Site, ext4: Vdi) -> None:
    reference = site.gateway.call("VDI.snapshot", ext4.ref, {})
    uuid = site.gateway.call("VDI.get_uuid", reference)
    [volume] = inspected(site, Vdi(reference, uuid, ext4.size, ext4.file))["volumes"]
    assert volume["number"] is None
    assert (volume["filesystem"]["type"], volume["filesystem"]["label"]) == ("ext4", LABEL)
    site.gateway.call("VDI.destroy", reference)
