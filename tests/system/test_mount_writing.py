"""With --writable, disks and partitions in the mount are written to as block devices are."""

import errno
import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.system.clients import curl
from tests.system.guests import GPT, KINDS, Kind, make_disk, make_guests, missing_programs
from tests.system.mounted import (
    Mounted,
    digest,
    digests,
    filesystem,
    leases,
    loop_device,
    mounted,
    needs_fuse,
    needs_loops,
    ntfs_3g,
    run,
    wait_until_free,
)
from tests.system.site import MIB, Site, assert_whole, qemu_compare, stored_content, wait_until
from tests.system.test_mount_tools import make_chain

pytestmark = needs_fuse


@pytest.fixture(scope="module")
def writable_mount(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with mounted(shared_site.gateway, tmp_path_factory.mktemp("mount") / "disks", "--writable") as mount:
        yield mount


@pytest.fixture
def writable(site: Site, writable_mount: Mounted) -> Iterator[Mounted]:
    yield writable_mount
    assert writable_mount.running, writable_mount.log()


@pytest.mark.parametrize("kind", ["raw", "vhd", "chain"])
def test_pieces_of_any_length_at_any_place_are_there(
    site: Site, writable: Mounted, tmp_path: Path, kind: str
) -> None:
    """Against a plain file to which the same is done."""
    rng = random.Random(5)
    if kind == "chain":
        vdi = make_chain(site, tmp_path, seed=5, levels=2, size=6 * MIB)
    else:
        vdi = site.create_vdi(6 * MIB, kind)
    disk, model = writable.of(vdi, "disk.raw"), tmp_path / "model"
    model.write_bytes(disk.read_bytes())
    wait_until_free(site.gateway, vdi)
    files = [os.open(path, os.O_RDWR) for path in (disk, model)]
    try:
        assert leases(site.gateway, vdi) == ["write"]
        for _ in range(200):
            offset = rng.randrange(vdi.size)
            length = min(vdi.size - offset, rng.choice((1, 100, 511, 512, 4096, 70_000)))
            if rng.randrange(3):
                data = rng.choice((rng.randbytes(length), bytes(length)))
                assert [os.pwrite(file, data, offset) for file in files] == [length, length]
            else:
                ours, wanted = (os.pread(file, length, offset) for file in files)
                assert ours == wanted
    finally:
        for file in files:
            os.close(file)
    assert digest(disk) == digest(model)
    wait_until_free(site.gateway, vdi)
    # libvhdi reads no chains with blocks that are written in such parts.
    exported = curl("--fail", site.export_url(vdi)).stdout if kind == "chain" else stored_content(vdi)
    assert exported == model.read_bytes()
    if kind != "raw":
        assert_whole(site, vdi)


def test_writes_end_where_the_disk_ends_and_nothing_changes_its_size(site: Site, writable: Mounted) -> None:
    vdi = site.create_vdi(2 * MIB)
    disk = writable.of(vdi, "disk.raw")
    assert stored_content(vdi) == bytes(vdi.size)
    disk.write_bytes(b"")  # O_TRUNC
    with disk.open("r+b", buffering=0) as file:
        file.write(b"first")
        file.truncate(100)
        os.ftruncate(file.fileno(), 0)
        assert os.fstat(file.fileno()).st_size == vdi.size
        assert os.pwrite(file.fileno(), b"end" * 512, vdi.size - 512) == 512
        for offset in (vdi.size, vdi.size + 4096):
            with pytest.raises(OSError, match="No space left on device"):
                os.pwrite(file.fileno(), b"more", offset)
        assert os.pread(file.fileno(), 4096, vdi.size) == b""
    with disk.open("wb", buffering=0) as file:
        file.write(b"First")
    done = subprocess.run(
        ["dd", "if=/dev/zero", f"of={disk}", "bs=1M", "seek=1"], capture_output=True, text=True, check=False
    )
    assert "No space left on device" in done.stderr
    wait_until_free(site.gateway, vdi)
    assert disk.stat().st_size == vdi.size
    assert stored_content(vdi) == b"First".ljust(vdi.size, b"\0")


def test_what_is_not_a_disk_can_not_be_written(site: Site, writable: Mounted) -> None:
    folder = writable.of(site.create_vdi()).resolve()
    disk = folder / "disk.raw"
    for name in ("disk.vhd", "disk.qcow2", "record.json"):
        with pytest.raises(PermissionError):
            os.open(folder / name, os.O_WRONLY)
    for refused in (
        partial((folder / "new").touch),
        partial(disk.unlink),
        partial(disk.rename, folder / "other"),
        partial((folder / "new").mkdir),
        partial(folder.rmdir),
        partial((folder / "new").symlink_to, "disk.raw"),
        partial((folder / "new").hardlink_to, disk),
        partial(disk.chmod, 0o666),
    ):
        with pytest.raises(OSError, match=r"\[Errno") as told:
            refused()
        assert told.value.errno in (errno.EPERM, errno.EACCES, errno.EROFS), told.value


@needs_loops
@pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name != "vfat"], ids=lambda kind: kind.name)
def test_a_file_system_made_on_a_disk_has_its_files_in_the_image(
    site: Site, writable: Mounted, tmp_path: Path, kind: Kind
) -> None:
    vdi = site.create_vdi(kind.size)
    content = tmp_path / "content"
    content.mkdir()
    for number in range(20):
        (content / f"file {number}").write_bytes(random.Random(number).randbytes(number * 9999))
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(writable.of(vdi, "disk.raw"), write=True))
        run(*kind.make, device)
        with (
            ntfs_3g(device, tmp_path / "files")
            if kind.name == "ntfs"
            else filesystem(device, tmp_path / "files", kind=kind.name)
        ) as files:
            run("cp", "-r", f"{content}/.", files)
    wait_until_free(site.gateway, vdi)
    assert_whole(site, vdi)
    raw = tmp_path / "raw"
    raw.write_bytes(stored_content(vdi))
    qemu_compare(raw, vdi)
    with loop_device(raw) as device:
        options = {"ext4": ("noload",), "xfs": ("norecovery",), "ntfs": ("norecover",)}[kind.name]
        looked_at = ntfs_3g if kind.name == "ntfs" else filesystem
        with looked_at(device, tmp_path / "files", "ro", *options) as files:
            assert digests(files) == digests(content)


@needs_loops
@pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")
def test_files_are_written_into_a_partition_and_its_neighbours_stay(
    site: Site, writable: Mounted, tmp_path: Path
) -> None:
    guests = make_guests(tmp_path, seed=3, only=("ext4", "xfs"))
    disk = make_disk(site, tmp_path, guests, GPT)
    partition = writable.of(disk.vdi, "partitions", "1.raw")
    before = disk.image.read_bytes()
    with filesystem(partition, tmp_path / "files", kind="ext4") as files:
        (files / "added").write_bytes(b"added")
        (files / "step 0" / "Ünïcode" / "small-1.txt").unlink(missing_ok=True)
        wanted = digests(files)
    wait_until_free(site.gateway, disk.vdi)
    with filesystem(partition, tmp_path / "files", "ro", "noload", kind="ext4") as files:
        assert digests(files) == wanted
        assert (files / "added").read_bytes() == b"added"
    wait_until_free(site.gateway, disk.vdi)
    start, length = disk.table[1]
    found = writable.of(disk.vdi, "disk.raw").read_bytes()
    assert found[:start] == before[:start]
    assert found[start + length :] == before[start + length :]
    assert found != before
    with partition.open("r+b", buffering=0) as file:
        file.seek(length - 100)
        assert file.write(b"x" * 200) == 100
        with pytest.raises(OSError, match="No space left on device"):
            file.write(b"x")
    wait_until_free(site.gateway, disk.vdi)
    assert_whole(site, disk.vdi)


def test_a_writer_is_alone_but_for_readers_of_his_mount(
    site: Site, writable: Mounted, mount: Mounted
) -> None:
    vdi = site.create_vdi()
    disk = writable.of(vdi, "disk.raw")
    with disk.open("r+b", buffering=0) as writer, disk.open("rb", buffering=0) as reader:
        writer.write(b"seen at once")
        assert reader.read(12) == b"seen at once"
        others = [mount.of(vdi, "disk.raw"), writable.of(vdi, "disk.qcow2")]
        with ThreadPoolExecutor() as pool:  # each waits a while
            refused = [each.exception() for each in [pool.submit(path.read_bytes) for path in others]]
        assert [getattr(error, "errno", None) for error in refused] == [errno.EBUSY] * 2
        assert leases(site.gateway, vdi) == ["write"]
    wait_until_free(site.gateway, vdi)
    assert mount.of(vdi, "disk.raw").read_bytes()[:12] == b"seen at once"


def test_what_a_writer_has_changed_is_shown_when_he_has_gone(site: Site, writable: Mounted) -> None:
    """Also to who has looked while he was there."""
    vdi = site.create_vdi(16 * MIB)
    folder = writable.of(vdi)
    with (folder / "disk.raw").open("r+b", buffering=0) as file:
        file.write(b"x")
        assert os.listdir(folder / "partitions") == []
        empty = (folder / "disk.vhd").stat().st_size
        run("sfdisk", "--quiet", folder / "disk.raw", given="label: gpt\nsize=2M\nsize=3M\n")
        file.seek(8 * MIB)
        file.write(os.urandom(4 * MIB))
    wait_until_free(site.gateway, vdi)
    wait_until(lambda: sorted(os.listdir(folder / "partitions")) == ["1.raw", "2.raw"], "the partitions")
    wait_until(lambda: (folder / "disk.vhd").stat().st_size > empty + 4 * MIB, "the size")
    assert len((folder / "disk.vhd").read_bytes()) == (folder / "disk.vhd").stat().st_size


@pytest.mark.parametrize("name", ["disk.raw", "partitions/1.raw"])
def test_what_is_sent_or_mapped_is_of_the_disk_that_was_opened(
    site: Site, mount: Mounted, tmp_path: Path, name: str
) -> None:
    """By sendfile(2), as shutil.copyfile and web servers do; the kernel keeps what it has sent."""
    vdi = site.create_vdi(8 * MIB)
    sides = []
    for side in (b"1", b"2"):
        disk = tmp_path / "disk"
        disk.write_bytes(side * vdi.size)
        run("sfdisk", "--quiet", disk, given="label: dos\n2048,4096\n")
        curl("--fail", "-T", str(disk), site.import_url(vdi))
        # Each has a file that is open from here on.
        sides.append((side, os.open(mount.of(vdi, name), os.O_RDONLY)))
    try:
        maps = [mmap.mmap(fd, 0, access=mmap.ACCESS_COPY) for _, fd in sides]
        for _ in range(2):
            for (side, fd), memory in zip(sides, maps, strict=True):
                sent = tmp_path / "sent"
                with sent.open("wb") as file:
                    while os.sendfile(file.fileno(), fd, file.tell(), MIB):
                        file.seek(0, os.SEEK_END)
                assert set(sent.read_bytes()[MIB:]) == set(side)
                assert sent.read_bytes() == os.pread(fd, vdi.size, 0) == memory[:]
        for memory in maps:
            memory.close()
    finally:
        for _, fd in sides:
            os.close(fd)


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
def test_a_sparse_archive_of_a_disk_that_was_empty_a_moment_ago_has_its_bytes(
    site: Site, writable: Mounted, tmp_path: Path, image_format: str
) -> None:
    vdi = site.create_vdi(4 * MIB, image_format)
    folder = writable.of(vdi)
    content = bytes(MIB) + os.urandom(MIB) + bytes(2 * MIB)
    run("ls", "-l", folder)
    with (folder / "disk.raw").open("r+b", buffering=0) as file:
        file.write(content)
        run("tar", "--create", "--sparse", "--file", tmp_path / "archive.tar", "-C", folder, "disk.raw")
    run("tar", "--extract", "--file", tmp_path / "archive.tar", "-C", tmp_path)
    assert (tmp_path / "disk.raw").read_bytes() == content


def test_what_is_mapped_into_memory_is_the_disk_of_now_also_when_it_has_grown(
    site: Site, writable: Mounted
) -> None:
    vdi = site.create_vdi(4 * MIB)
    disk = writable.of(vdi, "disk.raw")

    def beginning() -> bytes:
        with disk.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
            return memory[:5]

    assert beginning() == bytes(5)
    with disk.open("r+b", buffering=0) as file:
        file.write(b"bytes")
    assert beginning() == b"bytes"
    wait_until_free(site.gateway, vdi)
    site.gateway.call("VDI.resize", vdi.ref, str(8 * MIB))
    wait_until(lambda: disk.stat().st_size == 8 * MIB, "the size")
    assert disk.read_bytes() == b"bytes".ljust(8 * MIB, b"\0")


@needs_loops
def test_a_full_sr_is_told_and_leaves_a_whole_image(site: Site, writable: Mounted, tmp_path: Path) -> None:
    directory = tmp_path / "full"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=12m", "none", directory)
    try:
        repository = site.create_repository(directory / "sr")
        vdi = site.create_vdi(64 * MIB, repository=(repository, directory / "sr"))
        disk = writable.of(vdi, "disk.raw")
        command = ["dd", "if=/dev/urandom", f"of={disk}", "bs=1M", "count=64", "conv=fsync"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "No space left on device" in done.stderr
        wait_until_free(site.gateway, vdi)
        assert_whole(site, vdi)
        assert disk.read_bytes() == stored_content(vdi)
        wait_until_free(site.gateway, vdi)
        forgot = site.gateway.command("sr-forget", site.gateway.call("SR.get_uuid", repository))
        assert forgot.returncode == 0, forgot.stderr
    finally:
        run("umount", directory)
