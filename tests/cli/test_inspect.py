"""What inspect says of files that lie on a disk, without a mount, and how it refuses what it can't do."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fuse_mount.programs import Ended, run_program
from gateway.cli import inspect as command
from gateway.cli import inspect_session, inspect_volumes
from gateway.cli.inspect_volumes import Filesystem, Volume, Volumes, read_volumes
from gateway.cli.output import CommandError, UsageError
from tests.conftest import RunningGateway

MIB = 1 << 20


def sparse(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def run(*arguments: str | Path, given: str = "") -> str:
    done = subprocess.run(
        [str(each) for each in arguments], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files of a disk with three partitions: ext4, LUKS, and nothing."""
    disk = sparse(tmp_path / "files" / "disk.raw", 64 * MIB)
    script = 'label: gpt\nsize=16MiB, name="system"\nsize=8MiB, type=lvm\nsize=4MiB, type=swap\n'
    run("sfdisk", "--quiet", disk, given=script)
    for number, size in ((1, 16), (2, 8), (3, 4)):
        sparse(disk.parent / "partitions" / f"{number}.raw", size * MIB)
    folder = disk.parent / "partitions"
    run("mkfs.ext4", "-q", "-L", 'a "b"\\é', "-U", "11111111-2222-3333-4444-555555555555", folder / "1.raw")
    with (folder / "2.raw").open("r+b") as file:
        file.write(b"LUKS\xba\xbe\x00\x01")
    return disk.parent


def test_partitions_and_what_is_in_them_are_told(files: Path) -> None:
    volumes = read_volumes(str(files), 64 * MIB)
    assert (volumes.label, volumes.sector, volumes.remarks) == ("gpt", 512, ())
    system, luks, empty = volumes.found
    assert (system.number, system.start, system.size, system.name) == (1, MIB, 16 * MIB, "system")
    assert system.type_name == "Linux filesystem"
    assert system.filesystem is not None
    assert system.filesystem.type == "ext4"
    assert system.filesystem.mountable
    assert system.filesystem.label == 'a "b"\\é'
    assert system.filesystem.uuid == "11111111-2222-3333-4444-555555555555"
    assert luks.type_name == "Linux LVM"
    assert luks.filesystem is not None
    assert luks.filesystem.type == "crypto_LUKS"
    assert not luks.filesystem.mountable
    assert (empty.type_name, empty.filesystem) == ("Linux swap", None)


def test_a_filesystem_without_a_table_is_the_disk(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk.raw", 32 * MIB)
    run("mkswap", "--label", "swapper", disk)
    [volume] = read_volumes(str(tmp_path), 32 * MIB).found
    assert (volume.number, volume.start, volume.size, volume.file) == (None, 0, 32 * MIB, "disk.raw")
    assert volume.filesystem is not None
    assert (volume.filesystem.type, volume.filesystem.label) == ("swap", "swapper")
    assert not volume.filesystem.mountable


def test_an_empty_disk_is_one_volume_without_a_filesystem(tmp_path: Path) -> None:
    sparse(tmp_path / "disk.raw", 5 * MIB)
    volumes = read_volumes(str(tmp_path), 5 * MIB)
    assert volumes == Volumes(
        "", 512, (Volume(None, 0, 5 * MIB, "", "", "", "", "disk.raw", None),), volumes.remarks
    )
    assert volumes.remarks == ()


@pytest.mark.parametrize("told", [8, 2])  # by blkid until util-linux 2.40, and of 2.41
def test_where_two_filesystems_could_be_meant_both_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int
) -> None:
    def with_blkid(arguments: Sequence[str], *, seconds: float, memory: int | None = None) -> Ended:
        ended = run_program(arguments, seconds=seconds, memory=memory)
        return replace(ended, code=told) if arguments[0] == "blkid" else ended

    monkeypatch.setattr(inspect_volumes, "run_program", with_blkid)
    disk = sparse(tmp_path / "disk.raw", 400 * MIB)
    run("mkfs.xfs", "-q", disk)
    other = sparse(tmp_path / "other", 400 * MIB)
    run("mkfs.ext4", "-q", "-O", "^metadata_csum", other)
    with disk.open("r+b") as target, other.open("rb") as source:
        source.seek(1024)
        target.seek(1024)
        target.write(source.read(1024))
    [volume] = read_volumes(str(tmp_path), 400 * MIB).found
    assert volume.filesystem is not None
    assert volume.filesystem.type == "ext4, xfs"
    assert not volume.filesystem.mountable


def test_a_file_that_cannot_be_read_is_not_taken_for_an_empty_one(files: Path) -> None:
    (files / "partitions" / "1.raw").unlink()
    volumes = read_volumes(str(files), 64 * MIB)
    assert volumes.found[0].filesystem is None
    assert volumes.remarks == ("partition 1: No such file or directory",)
    assert volumes.found[1].filesystem is not None
    (files / "disk.raw").unlink()
    with pytest.raises(OSError, match="No such file"):
        read_volumes(str(files), 64 * MIB)


def test_an_extended_partition_is_not_looked_into(tmp_path: Path) -> None:
    disk = sparse(tmp_path / "disk.raw", 64 * MIB)
    run("sfdisk", "--quiet", disk, given="label: dos\nsize=8MiB\nsize=40MiB, type=5\n5: size=8MiB\n")
    for number in (1, 5):
        sparse(tmp_path / "partitions" / f"{number}.raw", 8 * MIB)
    volumes = read_volumes(str(tmp_path), 64 * MIB)
    assert volumes.remarks == ()
    assert [(each.number, each.type_name) for each in volumes.found] == [
        (1, "Linux"),
        (2, "Extended"),
        (5, "Linux"),
    ]


def test_files_that_hang_end_the_look(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_volumes, "_SECONDS", 0.2)
    (files / "disk.raw").unlink()
    run("mkfifo", files / "disk.raw")
    with pytest.raises(OSError, match="dd took too long"):
        read_volumes(str(files), 64 * MIB)


def volume(number: int | None, kind: str = "ext4", usage: str = "filesystem") -> Volume:
    file = "disk.raw" if number is None else f"partitions/{number}.raw"
    return Volume(number, 0, MIB, "", "", "", "", file, Filesystem(kind, usage, "", "", None))


def test_the_only_filesystem_is_the_one_to_mount() -> None:
    volumes = Volumes("gpt", 512, (volume(1, "swap", "other"), volume(2)), ())
    assert command._chosen(volumes, None).number == 2
    assert command._chosen(volumes, 2).number == 2
    with pytest.raises(CommandError, match=r"partition 1 has no filesystem .* there is: 2 \(ext4, 1 MiB\)"):
        command._chosen(volumes, 1)
    assert command._chosen(Volumes("", 512, (volume(None),), ()), None).number is None


def test_of_several_filesystems_one_must_be_named() -> None:
    volumes = Volumes("gpt", 512, (volume(1), volume(2, "xfs")), ())
    with pytest.raises(
        CommandError, match=r"give --partition N for one of: 1 \(ext4, 1 MiB\); 2 \(xfs, 1 MiB\)"
    ):
        command._chosen(volumes, None)
    with pytest.raises(CommandError, match="there is no filesystem"):
        command._chosen(Volumes("gpt", 512, (volume(1, "swap", "other"),), ()), None)


def test_without_root_nothing_is_mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(CommandError, match="--mount needs root"):
        command.inspect("disk", mount=str(tmp_path))
    session = inspect_session.Inspection(str(tmp_path), "uuid")
    spaces, remarks = command._spaces(session, Volumes("gpt", 512, (volume(1),), ()))
    assert spaces == {}
    assert remarks == ["what is used can't be told without root, since that takes a loop device"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"partition": 1}, "give --mount DIR as well"),
        ({"mount": "there", "json": True}, "--mount goes without --json"),
        ({"mount": "there", "used": True}, "--mount goes without --used"),
        (
            {"url": "https://elsewhere"},
            "--url: disks are inspected on the gateway's own",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        command.inspect("disk", **arguments)  # type: ignore[arg-type]


def test_a_filesystem_that_no_kernel_is_trusted_with_is_not_mounted(tmp_path: Path) -> None:
    session = inspect_session.Inspection(str(tmp_path), "uuid")
    with pytest.raises(OSError, match="filesystems of type apfs aren't mounted"):
        session.mount("disk.raw", "apfs", str(tmp_path))


def test_who_is_in_a_directory_is_told(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"], cwd=tmp_path) as sleeper:
        try:
            assert inspect_session.users_of(str(tmp_path)) == f"sleep ({sleeper.pid})"
        finally:
            sleeper.kill()
    assert inspect_session.users_of(str(tmp_path)) == "somebody"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setattr(inspect_session, "_base", lambda: str(directory))
    yield directory
    shutil.rmtree(directory)


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_stays(base: Path) -> None:
    used, lock = inspect_session._own_directory()
    left, gone = inspect_session._own_directory()
    os.close(gone)
    for name in ("disks", "filesystem"):
        (Path(left) / name).mkdir()
    (Path(left) / "mounted").write_text(json.dumps([str(base), "/sr/vdi/partitions/1.raw"]) + "\nhalf a li")
    (base / "somebody's").mkdir()
    inspect_session.sweep()
    assert {each.name for each in base.iterdir()} == {Path(used).name, "somebody's"}
    os.close(lock)
    inspect_session.sweep()
    assert [each.name for each in base.iterdir()] == ["somebody's"]


def test_a_disk_that_does_not_exist_is_named(house: RunningGateway) -> None:
    done = house.run("inspect", "no-such-disk")
    assert done.returncode == 1
    assert done.stderr == "vdi-gateway inspect: there is no disk 'no-such-disk'; vdi-list shows them\n"
    done = house.run("inspect", "no-such-disk", "--partition", "one")
    assert done.returncode == 2
    assert "--partition" in done.stderr
