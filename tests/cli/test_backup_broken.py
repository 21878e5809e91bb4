"""Chains of backups that can't be gone on with, and files that were altered: told, never used."""

import fcntl
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gateway.cli.backup_directory import read_manifest
from gateway.cli.backup_image import BackedUpChain, DamagedError
from tests.cli.backups import MIB, BackedUpDisk
from tests.cli.test_transfers import error
from tests.conftest import RunningGateway

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def disk(house: RunningGateway, tmp_path: Path) -> BackedUpDisk:
    """A disk with two generations, and changes since."""
    disk = BackedUpDisk(house, tmp_path)
    disk.backed_up()
    disk.write()
    disk.backed_up()
    disk.write()
    return disk


def newest_snapshot(disk: BackedUpDisk) -> str:
    return str(disk.manifest["generations"][-1]["snapshot"])


def newest(disk: BackedUpDisk) -> int:
    return max(disk.kept)


def run(disk: BackedUpDisk, *arguments: str) -> None:
    done = disk.command(*arguments)
    assert done.returncode == 0, done


def destroyed(disk: BackedUpDisk) -> str:
    run(disk, "vdi-destroy", newest_snapshot(disk))
    return "is no longer on the gateway"


def data_destroyed(disk: BackedUpDisk) -> str:
    run(disk, "vdi-data-destroy", newest_snapshot(disk))
    return "was destroyed"


def untracked(disk: BackedUpDisk) -> str:
    run(disk, "vdi-disable-cbt", disk.uuid)
    return f"no longer tracked after generation {newest(disk)}"


def untracked_for_a_while(disk: BackedUpDisk) -> str:
    run(disk, "vdi-disable-cbt", disk.uuid)
    run(disk, "vdi-enable-cbt", disk.uuid)
    return f"not tracked all the time since generation {newest(disk)}"


def imported_over(disk: BackedUpDisk) -> str:
    disk.plain[:] = random.Random(7).randbytes(5 * MIB) + bytes(11 * MIB)
    disk.put(bytes(disk.plain))
    return f"the whole disk was replaced after generation {newest(disk)}"


def missing(disk: BackedUpDisk) -> str:
    disk.file(newest(disk) - 1).unlink()
    return "is missing"


def truncated(disk: BackedUpDisk) -> str:
    path = disk.file(newest(disk))
    os.truncate(path, path.stat().st_size - 512)
    return f"{path} has"


def altered(disk: BackedUpDisk) -> str:
    path = disk.file(newest(disk) - 1)
    alter(path, path.stat().st_size - 5)
    return f"its checksum isn't that of generation {newest(disk) - 1}"


def alter(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


BREAKS = [
    destroyed,
    data_destroyed,
    untracked,
    untracked_for_a_while,
    imported_over,
    missing,
    truncated,
    altered,
]


def test_a_broken_chain_is_told_and_a_new_one_begins(disk: BackedUpDisk) -> None:
    for breaks in BREAKS:
        words = breaks(disk)
        before, snapshots = disk.manifest, disk.snapshots()
        said = error(disk.backup())
        assert words in said, breaks
        assert said.endswith("begin a new chain with --full")
        assert disk.manifest["generations"] == before["generations"]
        assert disk.snapshots() == snapshots
        done = disk.backup("--full-if-broken", "--quiet")
        assert (done.returncode, int(done.stdout)) == (0, newest(disk) + 1), done
        assert words in done.stderr
        disk.kept[newest(disk) + 1] = bytes(disk.plain)
        disk.write()
        disk.backed_up()
        disk.write()
    damaged = range(11, 17)  # the chains of two that the last three of BREAKS were done to
    for number in disk.kept.keys() - set(damaged):
        assert disk.restored(number) == disk.kept[number]


def test_a_disk_that_was_smaller_is_told(house: RunningGateway, tmp_path: Path) -> None:
    disk = BackedUpDisk(house, tmp_path)
    mine = disk.command("vdi-snapshot", disk.uuid).stdout.strip()
    run(disk, "vdi-resize", disk.uuid, str(20 * MIB))
    disk.plain += bytes(4 * MIB)
    disk.backed_up()
    run(disk, "vdi-revert", mine)
    assert "smaller than in generation 1" in error(disk.backup())
    run(disk, "vdi-resize", disk.uuid, str(20 * MIB))
    disk.plain[16 * MIB :] = bytes(4 * MIB)
    disk.kept[1] = disk.restored(1)
    number = disk.backed_up("--full-if-broken")
    assert disk.restored(number) == disk.plain


def test_a_file_that_was_only_copied_is_read_once_more_and_goes_on(disk: BackedUpDisk) -> None:
    for number in (1, 2):
        os.utime(disk.file(number), (1, 1))
    before = disk.manifest["generations"]
    disk.backed_up()
    after = disk.manifest["generations"]
    assert [each["modified_ns"] for each in after[:2]] == [10**9, 10**9]
    assert [each["sha256"] for each in after[:2]] == [each["sha256"] for each in before]
    disk.assert_right()


@pytest.mark.parametrize("number", [1, 2])
def test_nothing_is_restored_from_a_file_that_is_damaged(
    disk: BackedUpDisk, number: int, tmp_path: Path
) -> None:
    path = disk.file(number)
    good = path.read_bytes()
    damages: dict[str, Callable[[], None]] = {
        "header": lambda: alter(path, 30),
        "tables": lambda: alter(path, 4 * (64 << 10) + 1000),
        "data": lambda: alter(path, len(good) - 2 * MIB),
        "end": lambda: alter(path, len(good) - 1),
        "cut": lambda: os.truncate(path, len(good) - 70_000),
        "longer": lambda: os.truncate(path, len(good) + 7),
        "gone": path.unlink,
    }
    vdis = disk.command("vdi-list", "--minimal", "managed=true").stdout
    for name, damage in damages.items():
        damage()
        assert str(path) in error(disk.restore("--verify")), name
        assert str(path) in error(disk.restore("--to", str(tmp_path / "out"))), name
        assert list(tmp_path.glob("out*")) == []
        assert str(path) in error(disk.restore("sr=disks")), name
        path.write_bytes(good)
    assert disk.command("vdi-list", "--minimal", "managed=true").stdout == vdis
    alter(path, len(good) - 1)
    if number == 2:
        assert disk.restored(1) == disk.kept[1]
        assert disk.restore("--verify", "generation=1").returncode == 0


def test_each_altered_byte_is_one_known_error(house: RunningGateway, tmp_path: Path) -> None:
    disk = BackedUpDisk(house, tmp_path, size=4 * MIB, data=MIB)
    disk.backed_up()
    disk.write(300_000, 512, 70_000)
    disk.backed_up()
    manifest = read_manifest(str(disk.directory))
    path = disk.file(2)
    good, rng = path.read_bytes(), random.Random(5)
    tables = [*range(0, 104, 2), *(rng.randrange(5 * (64 << 10)) for _ in range(40))]
    for offset in (*tables, *(rng.randrange(len(good)) for _ in range(15))):
        changed = bytearray(good)
        changed[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match=r"was altered|stands on|is of a disk of|ends at byte"):
            with BackedUpChain(str(disk.directory), manifest.chain(2)) as chain:
                for _ in chain.read():
                    pass


def test_a_disk_that_a_damaged_backup_was_to_replace_stays_as_it_was(
    disk: BackedUpDisk, tmp_path: Path
) -> None:
    alter(disk.file(1), disk.file(1).stat().st_size - 1)
    assert "nothing was changed" in error(disk.restore(f"vdi={disk.uuid}"))
    assert disk.command("vdi-export", disk.uuid, str(tmp_path / "out"), "--quiet").returncode == 0
    assert (tmp_path / "out").read_bytes() == disk.plain


def manglings(document: dict[str, Any]) -> dict[str, bytes]:
    """Manifests that must not be believed."""
    generations = document["generations"]

    def with_generation(**changes: Any) -> bytes:
        return json.dumps(
            {**document, "generations": [generations[0], {**generations[1], **changes}]}
        ).encode()

    return {
        "cut": json.dumps(document).encode()[:-40],
        "empty": b"",
        "a list": b"[]",
        "another format": json.dumps({**document, "format": "other"}).encode(),
        "of the future": json.dumps({**document, "version": 2}).encode(),
        "a path": with_generation(file="../x.qcow2"),
        "a name": with_generation(snapshot="../x", file="../x.qcow2"),
        "another base": with_generation(base=2),
        "a loop": with_generation(base=5),
        "a number twice": with_generation(number=1),
        "a smaller disk": with_generation(virtual_size=4096),
        "no checksum": with_generation(sha256="x"),
        "a text": with_generation(file_size="many"),
        "a path to remove": json.dumps({**document, "discarded": ["../x"]}).encode(),
        "a generation to remove": json.dumps(
            {**document, "discarded": [document["generations"][0]["snapshot"]]}
        ).encode(),
    }


def test_a_manifest_that_can_not_be_believed_is_told(disk: BackedUpDisk) -> None:
    path = disk.directory / "manifest.json"
    good = path.read_bytes()
    for name, content in manglings(disk.manifest).items():
        path.write_bytes(content)
        for done in (disk.restore("--list"), disk.backup()):
            said = error(done)
            assert "manifest.json" in said, name
        assert path.read_bytes() == content
    path.write_bytes(good)
    disk.backed_up()
    disk.assert_right()


def test_only_snapshots_of_backups_are_destroyed_whatever_the_manifest_says(disk: BackedUpDisk) -> None:
    mine = disk.command("vdi-snapshot", disk.uuid, "name=mine").stdout.strip()
    another = disk.command("vdi-create", "another", "4MiB").stdout.strip()
    path = disk.directory / "manifest.json"
    path.write_text(json.dumps({**disk.manifest, "discarded": [mine, another]}))
    disk.backed_up()
    listed = disk.command("vdi-list", "--minimal").stdout
    assert mine in listed
    assert another in listed
    assert disk.manifest["discarded"] == []


def test_a_second_backup_into_the_same_directory_is_refused(disk: BackedUpDisk) -> None:
    with (disk.directory / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another vdi-backup is writing" in error(disk.backup())
        assert disk.restored(2) == disk.kept[2]
    disk.backed_up()
    disk.assert_right()
