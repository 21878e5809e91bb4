"""vdi-backup ended at any moment: what was backed up before stays good, and the next one tidies up."""

import json
import os
import resource
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.backup_run import MARK_KEY
from gateway.cli.connection import Connection
from tests.cli import killed_backup
from tests.cli.backups import MIB, BackedUpDisk
from tests.cli.slow_proxy import Proxy
from tests.cli.test_transfers import error, lines, remote
from tests.conftest import RunningGateway, clean_environment, program
from tests.system.site import wait_until


@pytest.fixture
def disk(house: RunningGateway, tmp_path: Path) -> BackedUpDisk:
    """A disk with a generation, and 12 MiB of changes since."""
    disk = BackedUpDisk(house, tmp_path)
    disk.backed_up()
    disk.write(12 * MIB)
    return disk


@pytest.fixture
def small_change(house: RunningGateway, tmp_path: Path) -> BackedUpDisk:
    """A disk with a generation, and less that has changed since, for what doesn't stop in a download."""
    disk = BackedUpDisk(house, tmp_path)
    disk.backed_up()
    disk.write()
    return disk


@contextmanager
def held_backup(disk: BackedUpDisk, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A backup in the middle of its download."""
    with Proxy(disk.house.url, hold_after=8 * MIB) as proxy:
        command = [program(), "vdi-backup", disk.uuid, str(disk.directory), *arguments]
        process = subprocess.Popen(
            [*command, *remote(disk.house, proxy.url)],
            env=clean_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert proxy.held.wait(30)
            wait_until(lambda: has_begun(disk.directory), "the first megabytes to be written")
            yield process
        finally:
            process.kill()
            process.communicate(timeout=30)


def has_begun(directory: Path) -> bool:
    return any(part.stat().st_blocks * 512 >= 6 * MIB for part in directory.glob("*.part"))


@pytest.mark.parametrize("arguments", [(), ("--full",)], ids=["delta", "full"])
def test_the_next_backup_goes_on_with_a_download_that_was_interrupted(
    disk: BackedUpDisk, arguments: tuple[str, ...]
) -> None:
    with held_backup(disk, *arguments) as process:
        assert "another vdi-backup is writing" in error(disk.backup())
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "bytes are kept in" in said
    disk.kept[2] = bytes(disk.plain)
    disk.write()
    done = disk.backup(*arguments)
    assert (done.returncode, done.stdout) == (0, "3\n"), done
    notes = [line["note"] for line in lines(done) if "note" in line]
    assert "which was interrupted" in notes[0]
    assert "going on with" in notes[1]
    disk.kept[3] = bytes(disk.plain)
    assert [each["base"] for each in disk.manifest["generations"]] == [None, None if arguments else 1, 2]
    disk.assert_right()


def test_a_backup_that_was_killed_leaves_nothing_that_the_next_one_does_not_put_right(
    disk: BackedUpDisk,
) -> None:
    with held_backup(disk) as process:
        process.kill()
        process.communicate(timeout=30)
    assert disk.restored(1) == disk.kept[1]
    assert len(disk.snapshots()) == 2
    disk.backed_up()
    disk.assert_right()


def test_what_was_begun_is_dropped_when_it_does_not_fit_any_more(disk: BackedUpDisk) -> None:
    with held_backup(disk) as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert list(disk.directory.glob("*.part")) != []
    disk.backed_up("--full")
    disk.assert_right()
    disk.write(12 * MIB)
    with held_backup(disk) as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    [begun] = [uuid for uuid, kind in disk.snapshots().items() if kind == "user" and uuid not in known(disk)]
    assert disk.command("vdi-destroy", begun).returncode == 0
    disk.backed_up()
    disk.assert_right()


def known(disk: BackedUpDisk) -> set[str]:
    return {each["snapshot"] for each in disk.manifest["generations"]}


def test_a_broken_connection_is_gone_on_with_in_the_same_backup(disk: BackedUpDisk) -> None:
    with Proxy(disk.house.url, cut_after=4 * MIB, cuts=2) as proxy:
        disk.backed_up(*remote(disk.house, proxy.url))
    assert proxy.cut == 2
    disk.assert_right()


def test_a_file_that_can_not_grow_ends_a_backup_with_one_sentence(disk: BackedUpDisk) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))

    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(disk.house.state_dir)}
    done = subprocess.run(
        [program(), "vdi-backup", disk.uuid, str(disk.directory)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert "File too large" in error(done)
    assert disk.restored(1) == disk.kept[1]
    disk.backed_up()
    disk.assert_right()


def test_a_full_disk_ends_a_backup_with_one_sentence_and_is_not_full_afterwards(
    disk: BackedUpDisk, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        disk.directory = small / "backups"
        disk.put(bytes(disk.plain))
        (small / "others").write_bytes(bytes(8 * MIB))
        assert "No space left on device" in error(disk.backup())
        assert {path.name for path in disk.directory.iterdir()} == {"lock", "manifest.json"}
        (small / "others").unlink()
        disk.kept = {}
        disk.backed_up()
        assert disk.restored(1) == disk.plain
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_image_that_leaves_no_room_for_the_manifest_goes_with_the_next_backup(
    disk: BackedUpDisk, tmp_path: Path
) -> None:
    image = disk.file(disk.backed_up("--full")).stat().st_blocks * 512
    small = tmp_path / "small"
    small.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(small)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        disk.directory = small / "backups"
        disk.directory.mkdir()
        free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        # One page is for the manifest; the one for a new manifest is the image's last.
        (small / "others").write_bytes(bytes(free - image - 4096))
        said = error(disk.backup())
        assert "manifest.json can't be written: No space left on device" in said
        assert len(list(disk.directory.glob("*.qcow2"))) == 1
        disk.plain[MIB:] = bytes(len(disk.plain) - MIB)
        disk.put(bytes(disk.plain))
        disk.kept = {}
        disk.backed_up()
        assert disk.restored(1) == disk.plain
        assert len(list(disk.directory.iterdir())) == 3
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_snapshot_that_comes_after_its_backup_was_killed_goes_with_the_next_one(
    small_change: BackedUpDisk,
) -> None:
    disk = small_change
    late = disk.directory / "manifest.json"
    document = disk.manifest
    mark = str(uuid.uuid4())
    late.write_text(json.dumps({**document, "attempt": {"mark": mark, "base": 1}}))
    vdi = disk.house.call("VDI.get_by_uuid", disk.uuid)

    # The gateway lets the snapshot be made just before that of the next backup.
    def snapshot_comes(self: Connection, method: str, *parameters: Any) -> Any:
        if method == "VDI.snapshot":
            disk.house.call("VDI.snapshot", vdi, {MARK_KEY: mark})
        return call(self, method, *parameters)

    call = Connection.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "call", snapshot_comes)
        disk.backed_up()
    disk.assert_right()
    assert disk.manifest["discarded"] == []


def killed_at(step: int, disk: BackedUpDisk, *arguments: str) -> bool:
    """Whether a backup that was to be killed at this step came to it."""
    environment = {**os.environ, "VDI_GATEWAY_STATE_DIR": str(disk.house.state_dir)}
    done = subprocess.run(
        [
            *[sys.executable, killed_backup.__file__, str(step)],
            *["vdi-backup", disk.uuid, str(disk.directory), "--quiet", *arguments],
        ],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, killed_backup.CODE), done
    return done.returncode == killed_backup.CODE


def kill_and_go_on(disk: BackedUpDisk, step: int, *arguments: str) -> bool:
    was_killed = killed_at(step, disk, *arguments)
    for number in disk.kept:
        assert disk.restored(number) == disk.kept[number]
    disk.backed_up()
    for each in disk.manifest["generations"]:
        disk.kept.setdefault(each["number"], bytes(disk.plain))
    disk.assert_right()
    disk.write(512)
    return was_killed


@pytest.mark.parametrize("step", [9, 17, 24, 31])
def test_a_backup_killed_at_a_step_is_put_right_by_the_next_one(
    small_change: BackedUpDisk, step: int
) -> None:
    assert kill_and_go_on(small_change, step)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arguments", [(), ("--full",), ("keep=1",)], ids=["delta", "full", "keep"])
def test_a_backup_killed_at_each_step_is_put_right_by_the_next_one(
    house: RunningGateway, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    step, killed = 1, True
    while killed:
        (tmp_path / str(step)).mkdir()
        disk = BackedUpDisk(house, tmp_path / str(step), seed=step)
        disk.backed_up()
        disk.write()
        disk.backed_up()
        disk.write()
        killed = killed_at(step, disk, *arguments)
        numbers = [each["number"] for each in disk.manifest["generations"]]
        for number in set(numbers) & disk.kept.keys():
            assert disk.restored(number) == disk.kept[number]
        number = disk.backed_up(*arguments)
        numbers = [each["number"] for each in disk.manifest["generations"]]
        disk.kept = {each: disk.kept.get(each, bytes(disk.plain)) for each in numbers}
        assert numbers[-1] == number
        disk.assert_right()
        assert disk.command("vdi-destroy", disk.uuid).returncode == 0
        step += 1
    assert step > 30
