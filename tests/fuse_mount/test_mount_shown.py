"""What a mount shows of the gateway's disks, whatever they are called, as they come and go, and to whom."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse_mount.mount_files import names, reading
from tests.fuse_mount.served_site import operations
from tests.system.mounted import Mounted, mounted, needs_fuse, run
from tests.system.site import MIB, Site, Vdi, unplugged, wait_until

ROOT = Path(__file__).parent.parent.parent


# Listing


@contextmanager
def generated(directory: Path, count: int) -> Iterator[Path]:
    directory.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuse_mount.generated", str(directory), str(count)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{count} VDIs are mounted on {directory}\n"
        yield directory
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        subprocess.run(["fusermount3", "-uz", "-q", str(directory)], check=False, capture_output=True)
        if process.stdout is not None:
            process.stdout.close()


@needs_fuse
@pytest.mark.parametrize("count", [3000, pytest.param(20_000, marks=pytest.mark.long)])
def test_thousands_of_disks_are_listed_each_once(tmp_path: Path, count: int) -> None:
    with generated(tmp_path / "mnt", count) as directory:
        snapshots = (count - 1) // 5
        for _ in range(2):
            assert len(set(os.listdir(directory / "disks"))) == count - snapshots
        assert len(set(os.listdir(directory / "disks" / "disk 0" / "snapshots"))) == snapshots
        with os.scandir(directory / "by-uuid") as entries:
            assert len({os.stat(entry).st_ino for entry in entries}) == count
        # What stat says is what the listing has said.
        with os.scandir(directory / "disks") as entries:
            for entry in entries:
                assert entry.inode() == os.stat(entry.path).st_ino


@needs_fuse
def test_a_listing_that_has_begun_and_one_that_is_rewound_are_whole(
    site: Site, lasting: Mounted, vdi: Vdi
) -> None:
    lasting.of(vdi)
    listing = os.scandir(lasting.directory / "disks")
    first = next(listing)
    more = site.create_vdi(2 * MIB)
    lasting.of(more)
    rest = {entry.name for entry in listing}
    assert {first.name, *rest} == set(os.listdir(lasting.directory / "disks")) - {name_of(lasting, more)}
    site.gateway.call("VDI.destroy", more.ref)


def name_of(mount: Mounted, vdi: Vdi) -> str:
    return mount.of(vdi).resolve().name


@needs_fuse
def test_any_label_is_a_name_that_can_be_opened(site: Site, lasting: Mounted) -> None:
    labels = ["", ".", "..", "a/b", "/", "line\nbreak", "tab\t", "x" * 300, "盤" * 100, " ", "-rf", "*", "~"]
    vdis = [site.create_vdi(2 * MIB) for _ in range(2 * len(labels))]
    for made, label in zip(vdis, labels * 2, strict=True):
        site.gateway.call("VDI.set_name_label", made.ref, label)
    for made, label in zip(vdis, labels * 2, strict=True):
        record = lasting.of(made, "record.json")
        wait_until(
            lambda record=record, label=label: json.loads(record.read_text())["name_label"] == label,  # type: ignore[misc]
            f"the name {label!r}",
        )
        assert record.resolve().parent.parent == lasting.directory / "disks"
        site.gateway.call("VDI.destroy", made.ref)
    wait_until(lambda: names(lasting.directory / "disks") == [], "them to go")


# What comes and goes


@needs_fuse
def test_disks_and_snapshots_appear_are_renamed_and_disappear(site: Site, lasting: Mounted) -> None:
    made = site.create_vdi(2 * MIB)
    site.gateway.call("VDI.set_name_label", made.ref, "web")
    disk = lasting.directory / "disks" / "web"
    wait_until(disk.exists, "the disk")
    assert not (disk / "snapshots").exists()
    snapshot = site.gateway.call("VDI.snapshot", made.ref, {})
    wait_until((disk / "snapshots" / "web" / "disk.raw").exists, "the snapshot")
    site.gateway.call("VDI.set_name_label", made.ref, "shop")
    renamed = lasting.directory / "disks" / "shop"
    wait_until(lambda: renamed.exists() and not disk.exists(), "the new name")
    site.gateway.call("VDI.destroy", made.ref)
    wait_until(lambda: names(lasting.directory / "disks") == ["web"], "the snapshot to stand alone")
    site.gateway.call("VDI.destroy", snapshot)
    wait_until(lambda: names(lasting.directory / "disks") == [], "the snapshot to go")
    assert names(lasting.directory / "by-uuid") == []


@needs_fuse
def test_an_sr_that_is_unplugged_takes_its_disks_along(site: Site, lasting: Mounted, vdi: Vdi) -> None:
    lasting.of(vdi)
    [pbd] = site.gateway.call("SR.get_PBDs", site.repository)
    wait_until(lambda: unplugged(site.gateway, pbd), "nobody to use the SR")
    wait_until(lambda: names(lasting.directory) == ["by-uuid"], "the SR to go")
    assert names(lasting.directory / "by-uuid") == []
    site.gateway.call("PBD.plug", pbd)
    assert lasting.of(vdi, "disk.raw").read_bytes() == vdi.file.read_bytes()


@needs_fuse
def test_the_record_is_that_of_the_gateway(site: Site, lasting: Mounted, vdi: Vdi) -> None:
    shown = json.loads(lasting.of(vdi, "record.json").read_text())
    record = site.gateway.call("VDI.get_record", vdi.ref)
    assert shown.pop("ref") == vdi.ref
    # In XML numbers are texts, and dates a type of their own.
    shown.update({name: str(value) for name, value in shown.items() if type(value) is int})
    record["snapshot_time"] = str(record["snapshot_time"])
    assert {name: shown[name] for name in shown if "operations" not in name} == {
        name: record[name] for name in record if "operations" not in name
    }


@needs_fuse
def test_to_read_a_disk_is_no_change_of_its_files_and_to_write_to_it_is(
    site: Site, tmp_path: Path, vdi: Vdi
) -> None:
    with mounted(site.gateway, tmp_path / "mnt", "--writable") as mount:
        folder = mount.of(vdi)
        began = (folder / "disk.raw").stat()
        with reading(folder / "disk.raw"):
            assert operations(site, vdi) == ["read"]
            later = site.create_vdi(2 * MIB)
            mount.of(later)  # so the mount has also heard of what came before
            # The kernel has not seen these yet.
            for name in ("disk.vhd", "partitions", "record.json"):
                assert (folder / name).stat().st_ctime_ns == began.st_ctime_ns
        archive = tmp_path / "archive.tar"
        run("tar", "--create", "--file", archive, "--directory", folder, ".")
        with open(folder / "disk.raw", "r+b", buffering=0) as file:
            file.write(b"x")
        wait_until(lambda: (folder / "disk.raw").stat().st_mtime_ns > began.st_mtime_ns, "another time")
    site.gateway.call("VDI.destroy", later.ref)


@needs_fuse
def test_a_file_that_is_open_has_its_size_though_another_was_told_just_before(
    site: Site, lasting: Mounted
) -> None:
    made = site.create_vdi(2 * MIB)
    disk = lasting.of(made, "disk.raw")
    for size in range(4 * MIB, 20 * MIB, 4 * MIB):
        disk.stat()
        site.gateway.call("VDI.resize", made.ref, str(size))
        with disk.open("rb") as file:
            assert (os.fstat(file.fileno()).st_size, file.seek(0, os.SEEK_END)) == (size, size)
        wait_until(lambda: not operations(site, made), "the lease to end")
    site.gateway.call("VDI.destroy", made.ref)


@needs_fuse
def test_only_the_disks_that_are_named_are_shown(site: Site, tmp_path: Path, vdi: Vdi) -> None:
    other = site.create_vdi(2 * MIB)
    with mounted(site.gateway, tmp_path / "mnt", "--only", vdi.uuid) as mount:
        assert names(mount.directory / "by-uuid") == [vdi.uuid]
        assert len(names(mount.directory / "disks")) == 1
    site.gateway.call("VDI.destroy", other.ref)


@needs_fuse
def test_what_is_not_writable_can_not_be_changed(lasting: Mounted, vdi: Vdi) -> None:
    file = lasting.of(vdi, "disk.raw")
    for change in (
        lambda: file.open("r+b"),
        (file.parent / "new").touch,
        file.unlink,
        lambda: os.truncate(file, 0),
        lambda: file.chmod(0o777),
        (file.parent.parent / "new").mkdir,
        lambda: file.rename(file.parent / "new"),
    ):
        with pytest.raises(OSError, match="Read-only file system"):
            change()


# As somebody who may not


@needs_fuse
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv (util-linux) isn't there")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_others_are_kept_out_unless_they_are_let_in(site: Site, tmp_path: Path, vdi: Vdi) -> None:
    # A way for nobody: pytest's directories are the owner's alone.
    directory = Path("/run") / f"vdi-gateway-test-{os.getpid()}"
    as_nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    look = [*as_nobody, "cat", str(directory / "by-uuid" / vdi.uuid / "record.json")]
    try:
        with mounted(site.gateway, directory) as mount:
            mount.of(vdi)
            assert subprocess.run(look, capture_output=True, check=False).returncode == 1
        with mounted(site.gateway, directory, "--allow-other") as mount:
            mount.of(vdi)
            assert (
                json.loads(subprocess.run(look, capture_output=True, check=True).stdout)["uuid"] == vdi.uuid
            )
    finally:
        directory.rmdir()
        directory.with_suffix(".log").unlink(missing_ok=True)
