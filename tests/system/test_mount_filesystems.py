"""Partitions of disks in a mount are mounted through loop devices, read-only and without replaying a journal,
and every file of ext4, XFS, FAT and NTFS is what the guest has written."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.system.guests import GPT, Disk, Guest, make_disk, make_guests, missing_programs, readers
from tests.system.mounted import (
    Mounted,
    digest,
    digests,
    filesystem,
    loop_device,
    mounted,
    needs_loops,
    run,
    wait_until_free,
)
from tests.system.site import Site

pytestmark = [
    needs_loops,
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> list[Guest]:
    return make_guests(tmp_path_factory.mktemp("guests"), seed=1)


def test_files_are_what_the_guests_have_written(
    site: Site, mount: Mounted, disk: Disk, tmp_path: Path
) -> None:
    folder = mount.of(disk.vdi, "partitions")
    # An extended partition has a file, too, as it has a device.
    assert {path.name for path in folder.iterdir()} == {f"{number}.raw" for number in disk.table}
    for number, guest in disk.partitions.items():
        partition = folder / f"{number}.raw"
        assert partition.stat().st_size == guest.kind.size
        assert run("blkid", "-o", "value", "-s", "TYPE", partition).strip() == guest.kind.name
        for name, looked_at in readers(guest).items():
            with looked_at(partition, tmp_path / f"{number} {name}") as files:
                assert digests(files) == guest.files, name
    wait_until_free(site.gateway, disk.vdi)


def test_sfdisk_finds_the_same_partitions_on_a_loop_device(mount: Mounted, disk: Disk) -> None:
    whole = mount.of(disk.vdi, "disk.raw")
    folder = mount.of(disk.vdi, "partitions")
    told = json.loads(run("sfdisk", "--json", disk.image))["partitiontable"]
    assert run("blkid", "-p", "-o", "value", "-s", "PTTYPE", whole).strip() == told["label"]
    with loop_device(whole) as device:
        found = json.loads(run("sfdisk", "--json", device))["partitiontable"]
    assert found["id"] == told["id"]
    assert [(each["start"], each["size"], each["type"]) for each in found["partitions"]] == [
        (each["start"], each["size"], each["type"]) for each in told["partitions"]
    ]
    for number in disk.partitions:
        start, length = disk.table[number]
        with disk.image.open("rb") as file:
            file.seek(start)
            assert (folder / f"{number}.raw").read_bytes() == file.read(length)


def test_every_snapshot_has_the_files_of_its_time(
    site: Site, mount: Mounted, disk: Disk, tmp_path: Path
) -> None:
    """The snapshots are of before the second and third step; partition 1 has an ext4."""
    folder = mount.of(disk.vdi, "snapshots")
    found = []
    for number, snapshot in enumerate(sorted(folder.iterdir())):
        record = json.loads((snapshot / "record.json").read_text())
        assert record["is_a_snapshot"] is True
        with filesystem(
            snapshot / "partitions" / "1.raw", tmp_path / str(number), "ro", "noload", kind="ext4"
        ) as files:
            found.append(sorted(path.name for path in files.iterdir() if path.name != "lost+found"))
    assert sorted(found) == [["step 0"], ["step 0", "step 1"]]


def test_many_partitions_are_mounted_at_the_same_time(
    site: Site, mount: Mounted, disk: Disk, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        shown = []
        for number, guest in disk.partitions.items():
            partition = mount.of(disk.vdi, "partitions", f"{number}.raw")
            for name, looked_at in readers(guest).items():
                if name != "mtools":
                    place = tmp_path / f"{number} {name}"
                    shown.append((guest, stack.enter_context(looked_at(partition, place))))
        assert len(shown) >= 3
        for guest, files in shown:
            assert digests(files) == guest.files


@contextmanager
def busy_partition(site: Site, guests: list[Guest], directory: Path) -> Iterator[tuple[Mounted, Path, Guest]]:
    """An ext4 of a disk of its own in a mount of its own, mounted through a loop device."""
    disk = make_disk(site, directory, guests[:1], GPT)
    [guest] = disk.partitions.values()
    with mounted(site.gateway, directory / "mount") as mount:
        partition = mount.of(disk.vdi, "partitions", "1.raw")
        with filesystem(partition, directory / "files", "ro", "noload", kind="ext4") as files:
            yield mount, files, guest


def test_a_file_system_stays_mounted_while_the_gateway_restarts(
    own_site: Site, guests: list[Guest], tmp_path: Path
) -> None:
    gateway = own_site.gateway
    with busy_partition(own_site, guests, tmp_path) as (mount, files, guest):
        # What was read once is the kernel's.
        without, again = sorted(guest.files)[::2], sorted(guest.files)[1::2]
        gateway.kill()
        assert [digest(files / name) for name in without] == [guest.files[name] for name in without]
        gateway.start()
        assert [digest(files / name) for name in again] == [guest.files[name] for name in again]
        assert mount.running


def test_a_file_system_on_a_mount_that_is_killed_gives_errors_and_can_be_unmounted(
    site: Site, guests: list[Guest], tmp_path: Path
) -> None:
    with busy_partition(site, guests, tmp_path) as (mount, files, _):
        mount.kill()
        with pytest.raises(OSError, match=r"Input/output error"):
            digests(files)
