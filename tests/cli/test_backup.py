"""vdi-backup and vdi-restore as people use them."""

import json
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from gateway.access.client import open_vdi
from tests.cli.backups import MIB, BackedUpDisk
from tests.cli.test_transfers import error
from tests.conftest import RunningGateway


@pytest.fixture
def disk(house: RunningGateway, tmp_path: Path) -> BackedUpDisk:
    return BackedUpDisk(house, tmp_path)


def exported(disk: BackedUpDisk, uuid: str, out: Path) -> bytes:
    assert disk.command("vdi-export", uuid, str(out), "--quiet", "--force").returncode == 0
    return out.read_bytes()


def test_each_generation_is_what_the_disk_was_for_qemu_too(disk: BackedUpDisk) -> None:
    assert disk.backed_up() == 1
    disk.write()
    assert disk.backed_up() == 2
    assert disk.backed_up() == 3
    disk.write()
    assert disk.backed_up() == 4
    disk.assert_right()
    sizes = [each["file_size"] for each in disk.manifest["generations"]]
    assert sizes[0] > 5 * MIB > MIB > sizes[2]
    assert sizes[1] > MIB
    checked = subprocess.run(
        ["qemu-img", "info", "--backing-chain", "--output=json", str(disk.file(4))],
        capture_output=True,
        check=True,
    )
    assert [Path(each["filename"]) for each in json.loads(checked.stdout)] == [
        disk.file(number) for number in (4, 3, 2, 1)
    ]


def test_the_checksums_are_those_of_the_files_and_of_what_the_gateway_sends(disk: BackedUpDisk) -> None:
    disk.backed_up()
    disk.write()
    disk.backed_up()
    told = [(each["sha256"], disk.directory / each["file"]) for each in disk.manifest["generations"]]
    done = subprocess.run(
        ["sha256sum", *[path for _, path in told]], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [digest for digest, _ in told]
    assert disk.restore("--verify").returncode == 0


def test_a_disk_is_restored_as_a_new_one_or_over_another(disk: BackedUpDisk, tmp_path: Path) -> None:
    disk.backed_up()
    disk.write()
    disk.backed_up()
    done = disk.restore("sr=disks", "name=again")
    made = done.stdout.strip()
    [row] = json.loads(disk.command("vdi-list", "--json", f"uuid={made}").stdout)
    assert (row["name_label"], row["virtual_size"]) == ("again", len(disk.plain))
    assert exported(disk, made, tmp_path / "out") == disk.plain
    larger = disk.command("vdi-create", "larger", str(20 * MIB)).stdout.strip()
    filled = tmp_path / "filled"
    filled.write_bytes(b"x" * 20 * MIB)
    assert disk.command("vdi-import", larger, str(filled)).returncode == 0
    assert disk.restore("generation=1", f"vdi={larger}", "--quiet").stderr == ""
    assert exported(disk, larger, tmp_path / "out") == disk.kept[1] + bytes(4 * MIB)
    smaller = disk.command("vdi-create", "smaller", str(4 * MIB)).stdout.strip()
    assert "vdi-resize" in error(disk.restore(f"vdi={smaller}"))


def test_a_disk_that_grew_goes_on(disk: BackedUpDisk) -> None:
    disk.backed_up()
    assert disk.command("vdi-resize", disk.uuid, str(22 * MIB)).returncode == 0
    disk.plain += bytes(6 * MIB)
    disk.backed_up()
    disk.plain[21 * MIB : 22 * MIB] = b"y" * MIB
    disk.put(bytes(disk.plain))
    disk.backed_up("--full")
    disk.write()
    disk.backed_up()
    disk.assert_right()


def test_snapshots_of_other_people_stay(disk: BackedUpDisk) -> None:
    disk.backed_up()
    disk.write()
    mine = disk.command("vdi-snapshot", disk.uuid).stdout.strip()
    disk.write()
    disk.backed_up()
    disk.write()
    disk.backed_up()
    disk.assert_snapshots(mine)
    assert disk.command("vdi-revert", mine).returncode == 0
    before = disk.kept[1]
    disk.plain[:] = exported(disk, disk.uuid, disk.tmp_path / "reverted")
    assert before != disk.plain != disk.kept[2]
    disk.backed_up()
    for number, plain in disk.kept.items():
        assert disk.restored(number) == plain


def test_a_new_chain_begins_when_it_is_wanted_and_old_ones_go_when_enough_is_kept(disk: BackedUpDisk) -> None:
    for _ in range(4):
        disk.backed_up("keep=2")
        disk.write()
    bases = {each["number"]: each["base"] for each in disk.manifest["generations"]}
    assert bases == {3: None, 4: 3}
    disk.kept = {number: plain for number, plain in disk.kept.items() if number in bases}
    disk.assert_right()
    disk.backed_up("keep=2")
    assert sorted(each["number"] for each in disk.manifest["generations"]) == [3, 4, 5]
    disk.backed_up("--full")
    bases = {each["number"]: each["base"] for each in disk.manifest["generations"]}
    assert bases == {3: None, 4: 3, 5: None, 6: None}
    disk.assert_right()


def test_what_there_is_can_be_listed(disk: BackedUpDisk) -> None:
    disk.backed_up()
    disk.backed_up()
    shown = disk.restore("--list").stdout.splitlines()
    assert [line.split("\t")[0] for line in shown] == ["Generation", "1", "2"]
    assert shown[2].split("\t")[2] == "since 1"
    told = json.loads(disk.restore("--list", "--json").stdout)
    assert told["generations"] == disk.manifest["generations"]
    made = json.loads(disk.backup("--json").stdout)
    assert made == disk.manifest["generations"][2:]


def test_an_empty_disk_of_2_tib_is_backed_up_and_restored(house: RunningGateway, tmp_path: Path) -> None:
    disk = BackedUpDisk(house, tmp_path)
    disk.uuid = disk.command("vdi-create", "huge", "2040GiB").stdout.strip()
    assert disk.backup().returncode == 0
    assert disk.backup().returncode == 0
    assert disk.restore("--to", str(tmp_path / "out")).returncode == 0
    status = (tmp_path / "out").stat()
    assert (status.st_size, status.st_blocks) == (2040 << 30, 0)
    assert disk.restore("sr=disks").returncode == 0
    assert sum(each["file_size"] for each in disk.manifest["generations"]) < 2 * MIB


def test_wrong_arguments_are_told(disk: BackedUpDisk, tmp_path: Path) -> None:
    disk.backed_up()
    other = disk.command("vdi-create", "other", "4MiB").stdout.strip()
    snapshot = disk.command("vdi-snapshot", other).stdout.strip()
    raw = disk.command("vdi-create", "raw", "4MiB", "sm-config:image-format=raw").stdout.strip()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "file").write_text("")
    cases: list[tuple[list[str], str, int]] = [
        (["vdi-backup", other, str(disk.directory)], "give each disk a directory of its own", 1),
        (["vdi-backup", other, str(tmp_path / "mine")], "holds letter but no manifest.json", 1),
        (["vdi-backup", other, str(tmp_path / "file")], "is no directory", 1),
        (["vdi-backup", other, str(tmp_path / "not" / "there")], "make it, or mount", 1),
        (["vdi-backup", other, str(tmp_path / "new"), "keep=0"], "--keep", 2),
        (["vdi-backup", "nobody", str(tmp_path / "new")], "nobody", 1),
        (["vdi-backup", snapshot, str(tmp_path / "new")], "is a snapshot", 1),
        (["vdi-backup", raw, str(tmp_path / "new")], "Raw VDI", 1),
        (["vdi-backup", other], "DIRECTORY", 2),
        (["vdi-restore", str(tmp_path / "not")], "give one of --sr", 2),
        (["vdi-restore", str(tmp_path / "not"), "--list"], "there is no directory", 1),
        (["vdi-restore", str(tmp_path / "mine"), "--list"], "holds no backups", 1),
        (["vdi-restore", str(disk.directory), "--list", "--verify"], "--list and --verify", 2),
        (["vdi-restore", str(disk.directory), "generation=7", "--verify"], "there are: 1", 1),
        (["vdi-restore", str(disk.directory), f"vdi={other}", "name=x"], "--name", 2),
        (["vdi-restore", str(disk.directory), "sr=nobody"], "nobody", 1),
        (["vdi-restore", str(disk.directory), "--to", str(tmp_path / "x.qcow2")], "raw disk", 2),
        (["vdi-restore", str(disk.directory), "--to", str(tmp_path / "file")], "--force", 1),
        (["vdi-restore", str(disk.directory), "--to", str(tmp_path / "no" / "x")], "No such file", 1),
    ]
    for arguments, words, code in cases:
        assert words in error(disk.command(*arguments), code), arguments
    assert disk.restored(1) == disk.plain


def test_a_raw_disk_goes_into_a_pipe(disk: BackedUpDisk) -> None:
    disk.backed_up()
    command = ["vdi-restore", str(disk.directory), "--to", str(disk.tmp_path / "pipe"), "--quiet"]
    subprocess.run(["mkfifo", disk.tmp_path / "pipe"], check=True)
    reader = subprocess.Popen(["sha256sum", disk.tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert disk.command(*command).returncode == 0
    told, _ = reader.communicate(timeout=30)
    (disk.tmp_path / "expected").write_bytes(disk.plain)
    done = subprocess.run(["sha256sum", disk.tmp_path / "expected"], capture_output=True, check=True)
    assert told.split()[0] == done.stdout.split()[0]


def test_a_disk_may_be_backed_up_into_several_directories(disk: BackedUpDisk) -> None:
    one, other = disk.directory, disk.tmp_path / "other"
    kept: dict[Path, dict[int, bytes]] = {one: {}, other: {}}
    for directory in (one, other, one, one, other, one, other):
        disk.directory, disk.kept = directory, kept[directory]
        disk.write()
        disk.backed_up()
    for directory in (one, other):
        disk.directory = directory
        for number, plain in kept[directory].items():
            assert disk.restored(number) == plain
    kinds = sorted(disk.snapshots().values())
    assert kinds == ["cbt_metadata", "cbt_metadata", "user", "user"]


def test_a_disk_that_somebody_writes_to_is_not_backed_up(disk: BackedUpDisk) -> None:
    disk.backed_up()
    with closing(open_vdi(str(disk.house.state_dir / "access.sock"), disk.uuid, write=True)):
        said = error(disk.backup())
        assert "VDI_IN_USE" in said or "OTHER_OPERATION" in said, said
    assert disk.manifest["attempt"] is None
    disk.backed_up()
    disk.assert_right()


def test_a_snapshot_has_its_marks_from_the_beginning(house: RunningGateway, disk: BackedUpDisk) -> None:
    ref = house.call("VDI.get_by_uuid", disk.uuid)
    house.call("VDI.add_to_other_config", ref, "owner", "me")
    taken = house.call("VDI.snapshot", ref, {"mine": "yes"})
    assert house.call("VDI.get_other_config", taken) == {"owner": "me", "mine": "yes"}
    assert house.call("VDI.get_other_config", ref) == {"owner": "me"}
