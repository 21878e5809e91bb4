"""The loop of backups over many generations, while all else that people do to a disk is done to it."""

import random
import subprocess
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from gateway.access.client import open_vdi
from tests.cli.backups import MIB, BackedUpDisk
from tests.conftest import RunningGateway, clean_environment, program
from tests.system.site import Site

SIZE = 24 * MIB
GRAIN = 512


class Life:
    """What happens to a disk between two backups, chosen by a seed."""

    def __init__(self, site: Site, tmp_path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.gateway = site.gateway
        self.socket = str(site.gateway.state_dir / "access.sock")
        self.repository = site.gateway.call("SR.get_uuid", site.repository)
        self.disk = BackedUpDisk(site.gateway, tmp_path, size=SIZE, seed=seed)
        self.snapshots: dict[str, bytes] = {}

    def write_in_place(self) -> None:
        """As NBD clients and virtual machines do."""
        with closing(open_vdi(self.socket, self.disk.uuid, write=True)) as opened:
            for _ in range(self.rng.randrange(1, 30)):
                length = self.rng.randrange(1, 200) * GRAIN
                offset = self.rng.randrange((len(self.disk.plain) - length) // GRAIN) * GRAIN
                data = self.rng.randbytes(length)
                opened.pwrite(data, offset)
                self.disk.plain[offset : offset + length] = data

    def write_zeroes(self) -> None:
        with closing(open_vdi(self.socket, self.disk.uuid, write=True)) as opened:
            offset = self.rng.randrange(len(self.disk.plain) // MIB - 4) * MIB
            opened.zero(offset, 3 * MIB, trim=True)
            self.disk.plain[offset : offset + 3 * MIB] = bytes(3 * MIB)

    def upload(self) -> None:
        self.disk.write()

    def snapshot(self) -> None:
        taken = self.run("vdi-snapshot", self.disk.uuid)
        self.snapshots[taken] = bytes(self.disk.plain)

    def destroy(self) -> None:
        if self.snapshots:
            gone = self.rng.choice(sorted(self.snapshots))
            self.run("vdi-destroy", gone)
            del self.snapshots[gone]

    def revert(self) -> None:
        fitting = [uuid for uuid, plain in self.snapshots.items() if len(plain) == len(self.disk.plain)]
        if fitting:
            taken = self.rng.choice(sorted(fitting))
            self.run("vdi-revert", taken)
            self.disk.plain[:] = self.snapshots[taken]

    def grow(self) -> None:
        self.disk.plain += bytes(2 * MIB)
        self.run("vdi-resize", self.disk.uuid, str(len(self.disk.plain)))

    def coalesce(self) -> None:
        self.run("sr-coalesce", self.repository)

    def restart(self) -> None:
        self.gateway.restart()

    def kill(self) -> None:
        self.gateway.kill()
        self.gateway.start()

    def kill_in_a_backup(self) -> None:
        """It may have been too late; then the backup is one like others."""
        command = [program(), "vdi-backup", self.disk.uuid, str(self.disk.directory), "--quiet"]
        environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(self.gateway.state_dir)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            process.wait(self.rng.uniform(0.2, 0.6))
        except subprocess.TimeoutExpired:
            self.gateway.kill()
            self.gateway.start()
        process.communicate(timeout=60)

    def run(self, *arguments: str) -> str:
        done = self.gateway.run(*arguments)
        assert done.returncode == 0, (arguments, done)
        return done.stdout.strip()

    def back_up(self) -> None:
        self.disk.backed_up()
        made = self.disk.manifest["generations"]
        for each in made:
            # What a backup that was interrupted had begun.
            self.disk.kept.setdefault(each["number"], bytes(self.disk.plain))
        taken, out = made[-1]["snapshot"], self.disk.tmp_path / "raw"
        self.run("vdi-export", taken, str(out), "--force", "--quiet")
        assert sha256(out.read_bytes()).digest() == sha256(self.disk.plain).digest()

    def play(self, events: list[Callable[[], None]]) -> None:
        self.back_up()
        for event in events:
            self.rng.choice((self.write_in_place, self.upload))()
            event()
            self.back_up()
            assert self.disk.restored(self.disk.manifest["generations"][-1]["number"]) == self.disk.plain
        for number, plain in self.disk.kept.items():
            assert self.disk.restored(number) == plain
        self.disk.assert_snapshots(*self.snapshots)
        assert self.disk.restore("--verify").returncode == 0


def test_six_generations_over_restarts_and_coalesces(own_site: Site, tmp_path: Path) -> None:
    life = Life(own_site, tmp_path, 1)
    life.play([life.snapshot, life.kill, life.destroy, life.coalesce, life.grow])
    assert len(life.disk.kept) == 6
    restored_elsewhere(life, tmp_path / "elsewhere")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_twenty_generations_over_all_that_happens_to_a_disk(
    own_site: Site, tmp_path: Path, seed: int
) -> None:
    life = Life(own_site, tmp_path, seed)
    events = [
        *[life.write_in_place, life.write_zeroes, life.upload, life.snapshot, life.snapshot, life.destroy],
        *[life.revert, life.revert, life.grow, life.coalesce, life.coalesce, life.restart, life.restart],
        *[life.kill, life.kill, life.kill_in_a_backup, life.kill_in_a_backup, life.kill_in_a_backup],
        life.destroy,
    ]
    life.rng.shuffle(events)
    life.play(events)
    assert len(life.disk.kept) >= 20
    restored_elsewhere(life, tmp_path / "elsewhere")


def restored_elsewhere(life: Life, directory: Path) -> None:
    """Another gateway, which has never seen the disk, has its bytes."""
    directory.mkdir()
    other = RunningGateway(directory)
    other.start()
    try:
        Site(other, directory / "sr")
        done = other.run("vdi-restore", str(life.disk.directory), "--sr", f"SR in {directory / 'sr'}")
        assert done.returncode == 0, done
        out = directory / "out"
        assert other.run("vdi-export", done.stdout.strip(), str(out), "--quiet").returncode == 0
        assert out.read_bytes() == life.disk.plain
    finally:
        other.stop()
