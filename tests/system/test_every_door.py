"""Disks that are written at one door and read at another, while whoever serves them is killed."""

import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.nbd_plugin.served import serving
from tests.system.conftest import stop
from tests.system.crew import Crew
from tests.system.doors import Disk, Doors, open_descriptors, second_gateway
from tests.system.mounted import leases, mounted, needs_fuse
from tests.system.site import assert_whole, nodes, stored_content, wait_until

pytestmark = [
    needs_fuse,
    pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="libnbd-bin is not installed"),
]


def kill(doors: Doors, victim: str) -> None:
    """Without a warning; then it is started again, if nobody else does that."""
    gateway = doors.site.gateway
    match victim:
        case "worker":
            for process in doors.site.workers():
                os.kill(process, signal.SIGKILL)
        case "mount":
            doors.mount.kill()
            doors.mount.start()
        case "gateway":
            gateway.kill()
            gateway.start()
        case "other gateway":
            doors.other.kill()
            doors.other.start()


def soak(directory: Path, seed: int, victims: list[str], turns: int) -> None:
    rng = random.Random(seed)
    rng.shuffle(victims)
    with (
        serving(directory, "--nbd", "127.0.0.1:0") as site,
        mounted(site.gateway, directory / "disks", "--writable") as mount,
    ):
        other = second_gateway(directory / "other", site)
        doors = Doors(site, mount, other, directory)
        disks = [Disk(doors, "vhd"), Disk(doors, "raw")]
        other.start()
        try:
            assert other.run("sr-attach", str(site.directory)).returncode == 0
            play(doors, rng, disks, victims, turns)
        finally:
            stop(other)
        assert site.gateway.stop() == 0
    assert "Traceback" not in site.gateway.log()


def play(doors: Doors, rng: random.Random, disks: list[Disk], victims: list[str], turns: int) -> None:
    gateway, tracked = doors.site.gateway, disks[0]
    gateway.call("VDI.enable_cbt", tracked.vdi.ref)
    tracked.write(rng)
    since = gateway.call("VDI.get_uuid", gateway.call("VDI.snapshot", tracked.vdi.ref, {}))
    before = tracked.content

    def write(rng: random.Random, disk: Disk) -> None:
        if disk is tracked and rng.randrange(4) == 0:
            disk.take_snapshot(rng)
        disk.write(rng)

    crew = Crew(rng)
    for number, disk in enumerate(disks):
        crew.start(f"writer {number}", write, disk)
        crew.start(f"reader {number}", lambda rng, disk: disk.read(rng), disk)
    crew.go()
    try:
        for victim in victims:
            crew.everybody_has_had(turns)
            kill(doors, victim)
        crew.everybody_has_had(turns)
    finally:
        crew.end()
    crew.check()
    for disk in disks:
        wait_until(partial(lambda vdi: leases(gateway, vdi) == [], disk.vdi), "the leases to end")
        disk.assert_read_everywhere()
    tracked.assert_told_as_changed(since, before)
    assert doors.site.staged_files() == []
    # Of a gateway that was killed nobody has heard which snapshots it had taken.
    for ref, record in gateway.call("VDI.get_all_records").items():
        if record["is_a_snapshot"]:
            gateway.call("VDI.destroy", ref)
    gateway.call("SR.coalesce", doors.site.repository)
    # What was written to while it was merged rests before it is merged again, which isn't waited for.
    alone: dict[str, str | None] = {disk.vdi.uuid: None for disk in disks}
    wait_until(lambda: nodes(doors.site) == alone, "the chains to become short", 60)
    for disk in disks:
        assert stored_content(disk.vdi) == disk.content
    assert_whole(doors.site, tracked.vdi)
    # What one transfer takes it gives back; the number of sockets and files doesn't follow that of the turns.
    assert open_descriptors(gateway) < 64


def test_what_is_written_at_one_door_is_read_at_each_other_whoever_is_killed(tmp_path: Path) -> None:
    soak(tmp_path, 1, ["worker", "mount", "gateway"], turns=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3])
def test_what_is_written_at_one_door_is_read_at_each_other_for_minutes(tmp_path: Path, seed: int) -> None:
    soak(tmp_path, seed, ["worker", "mount", "gateway", "other gateway"] * 6, turns=6)
