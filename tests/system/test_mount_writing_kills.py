"""What was synced or closed in a mount is on the disk, whether the mount is killed or the gateway."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.system.clients import curl
from tests.system.mounted import (
    digest,
    filesystem,
    leases,
    mounted,
    needs_fuse,
    needs_loops,
    run,
    wait_until_free,
)
from tests.system.site import MIB, Site, assert_whole, stored_content, wait_until
from tests.system.test_mount_tools import make_chain, stored_chain

pytestmark = needs_fuse

WRITE_UNTIL_KILLED = """
import os, random, sys
path, seed = sys.argv[1:]
rng = random.Random(int(seed))
file = os.open(path, os.O_RDWR)
size = os.fstat(file).st_size
while True:
    number = rng.randrange(size // 4096)
    data = rng.randbytes(4096)
    assert os.pwrite(file, data, number * 4096) == 4096
    if rng.randrange(8) == 0:
        os.fsync(file)
        # Only what is said to be durable is told.
        print("synced", flush=True)
    print(number, data.hex(), flush=True)
"""


@pytest.mark.parametrize("victim", ["mount", "gateway"])
def test_what_was_synced_survives_kill_9(request: pytest.FixtureRequest, tmp_path: Path, victim: str) -> None:
    site: Site = request.getfixturevalue("own_site" if victim == "gateway" else "site")
    vdi = make_chain(site, tmp_path, seed=8, levels=2, size=6 * MIB)
    before = stored_chain(site, vdi)
    with mounted(site.gateway, tmp_path / "mount", "--writable") as mount:
        with subprocess.Popen(
            [sys.executable, "-c", WRITE_UNTIL_KILLED, str(mount.of(vdi, "disk.raw")), "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(150)]
            if victim == "mount":
                mount.kill()
                lines += writer.stdout.readlines()
            else:
                site.gateway.kill()
                lines += [writer.stdout.readline() for _ in range(150)]
                site.gateway.start()
                wait_until(lambda: leases(site.gateway, vdi) == ["write"], "the writer to be known again")
                lines += [writer.stdout.readline() for _ in range(150)]
                writer.send_signal(signal.SIGKILL)
                lines += writer.stdout.readlines()
                mount.stop()
        assert writer.returncode != 0
        wait_until_free(site.gateway, vdi)
    possible: dict[int, set[bytes]] = {
        number: {before[number * 4096 : (number + 1) * 4096]} for number in range(vdi.size // 4096)
    }
    latest: dict[int, bytes] = {}
    syncs = 0
    for line in lines:
        if line == "synced\n":
            syncs += 1
            for number, data in latest.items():
                possible[number] = {data}
            latest = {}
        elif line.endswith("\n"):
            number, data = int(line.split()[0]), bytes.fromhex(line.split()[1])
            possible[number].add(data)
            latest[number] = data
    assert syncs > 3
    found = stored_chain(site, vdi)
    # One write may have been under way of which nobody was told.
    wrong = [n for n, held in possible.items() if found[n * 4096 : (n + 1) * 4096] not in held]
    assert len(wrong) <= 1
    assert_whole(site, vdi)


@needs_loops
def test_files_that_were_synced_survive_kill_9_of_the_mount(site: Site, tmp_path: Path) -> None:
    vdi = site.create_vdi(32 * MIB)
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(3 * MIB))
    with mounted(site.gateway, tmp_path / "mount", "--writable") as mount:
        disk = mount.of(vdi, "disk.raw")
        run("mkfs.ext4", "-q", "-F", disk)
        with filesystem(disk, tmp_path / "files", kind="ext4") as files:
            run("cp", source, files / "synced")
            run("sync", files / "synced")
            run("cp", source, files / "not synced")
            mount.kill()
        mount.start()
        wait_until_free(site.gateway, vdi)
        checked = subprocess.run(["e2fsck", "-fy", str(disk)], capture_output=True, text=True, check=False)
        assert checked.returncode in (0, 1), checked.stdout  # nothing is left that could not be repaired
        wait_until_free(site.gateway, vdi)
        with filesystem(disk, tmp_path / "files", kind="ext4") as files:
            assert digest(files / "synced") == digest(source)
    wait_until_free(site.gateway, vdi)
    assert_whole(site, vdi)


def test_a_close_makes_what_was_written_durable(site: Site, tmp_path: Path) -> None:
    vdi = site.create_vdi(2 * MIB)
    content = random.Random(1).randbytes(vdi.size)
    with mounted(site.gateway, tmp_path / "mount", "--writable") as mount:
        (tmp_path / "content").write_bytes(content)
        run("dd", f"if={tmp_path / 'content'}", f"of={mount.of(vdi, 'disk.raw')}", "bs=64k")
        mount.kill()
    wait_until_free(site.gateway, vdi)
    assert stored_content(vdi) == content
    assert_whole(site, vdi)


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_a_write_of_a_file_that_is_open_with_o_sync_is_durable_when_it_returns(
    site: Site, tmp_path: Path, flag: int
) -> None:
    vdi = site.create_vdi(2 * MIB)
    content = random.Random(flag).randbytes(vdi.size)
    with mounted(site.gateway, tmp_path / "mount", "--writable") as mount:
        fd = os.open(mount.of(vdi, "disk.raw"), os.O_WRONLY | flag)
        for offset in range(0, vdi.size, 256 << 10):
            os.pwrite(fd, content[offset : offset + (256 << 10)], offset)
        mount.kill()
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.close(fd)
    wait_until_free(site.gateway, vdi)
    assert stored_content(vdi) == content
    assert_whole(site, vdi)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_writers_lose_nothing_while_the_gateway_is_killed_and_snapshots_are_taken(
    own_site: Site, tmp_path: Path, seed: int
) -> None:
    """Each disk has one writer, who opens it again and again and compares it with a plain file."""
    gateway, ending = own_site.gateway, threading.Event()
    disks = [own_site.create_vdi(6 * MIB, kind) for kind in ("vhd", "vhd", "raw")]
    turns, failures = [0] * len(disks), list[BaseException]()

    def write(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        disk, model = mount.of(disks[number], "disk.raw"), tmp_path / f"model-{number}"
        model.write_bytes(bytes(disks[number].size))
        try:
            while not ending.is_set():
                try:
                    file = os.open(disk, os.O_RDWR)
                except OSError as error:
                    assert error.errno in (errno.EBUSY, errno.EHOSTDOWN)
                    continue
                with os.fdopen(file, "r+b", buffering=0) as ours, model.open("r+b", buffering=0) as plain:
                    for _ in range(60):
                        offset = rng.randrange(disks[number].size)
                        data = rng.randbytes(rng.choice((1, 512, 4096, 100_000)))
                        for each in (ours, plain):
                            os.pwrite(each.fileno(), data[: disks[number].size - offset], offset)
                    os.fsync(ours.fileno())
                    assert digest(disk) == digest(model)
                turns[number] += 1
        except BaseException as error:  # noqa: BLE001 - the test raises it
            failures.append(error)

    with mounted(gateway, tmp_path / "mount", "--writable") as mount:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(len(disks))]
        for thread in threads:
            thread.start()
        try:
            for _ in range(8):
                goal = [times + 3 for times in turns]
                wait_until(
                    partial(lambda goal: bool(failures) or all(map(int.__ge__, turns, goal)), goal),
                    "all to write on",
                    120,
                )
                if failures:
                    raise failures[0]
                gateway.kill()
                gateway.start()
                for vdi in disks[:2]:
                    # While somebody writes, which is nearly always, it is refused.
                    with suppress(AssertionError):
                        gateway.call("VDI.snapshot", vdi.ref, {})
        finally:
            ending.set()
            for thread in threads:
                thread.join(60)
        for number, vdi in enumerate(disks):
            wait_until_free(gateway, vdi)
            found = curl("--fail", own_site.export_url(vdi)).stdout
            assert found == (tmp_path / f"model-{number}").read_bytes()
    assert failures == []
