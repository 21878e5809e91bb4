"""vdi-copy and vdi-revert against a running gateway; what they leave is looked at by other programs."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gateway.access.client import open_vdi
from tests.cli.conftest import house_in
from tests.cli.test_transfers import error, lines
from tests.conftest import RunningGateway, clean_environment, program
from tests.images.disks import qemu_compare

MIB = 1 << 20
START_SECONDS = 30.0


def source_of(house: RunningGateway, tmp_path: Path, name: str) -> tuple[str, Path]:
    """A disk of 16 MiB with 3 MiB of data, and the file that it came from."""
    path = tmp_path / f"{name}.raw"
    with path.open("wb") as file:
        file.write(os.urandom(MIB))
        file.seek(9 * MIB)
        file.write(os.urandom(2 * MIB))
        file.truncate(16 * MIB)
    uuid = house.run("vdi-create", name, "16MiB", "sr=disks").stdout.strip()
    done = house.run("vdi-import", uuid, str(path), "--quiet")
    assert done.returncode == 0, done
    return uuid, path


def image_of(house: RunningGateway, sr: str, uuid: str) -> Path:
    return house.state_dir.parent / sr / f"{uuid}.vhd"


@pytest.fixture(scope="module")
def two(house: RunningGateway) -> RunningGateway:
    """A gateway with two SRs, disks and more."""
    assert house.run("sr-create", str(house.state_dir.parent / "more")).returncode == 0
    return house


def test_a_copy_is_a_disk_of_its_own_in_another_sr(two: RunningGateway, tmp_path: Path) -> None:
    uuid, path = source_of(two, tmp_path, "alone")
    done = two.run("vdi-copy", "alone", "more", "--name", "copied")
    assert done.returncode == 0, done
    made = done.stdout.strip()
    qemu_compare(image_of(two, "more", made), "vpc", path, "raw")
    last = lines(done)[-1]
    assert (last["operation"], last["vdi"], last["state"]) == ("copy", uuid, "done")
    assert (last["bytes"], last["total"]) == (16 * MIB, 16 * MIB)
    assert 3 * MIB <= last["physical_bytes"] < 5 * MIB
    assert two.call("VDI.get_by_name_label", "copied") == [two.call("VDI.get_by_uuid", made)]


def test_xes_words_copy_a_snapshot_over_its_disk(two: RunningGateway, tmp_path: Path) -> None:
    uuid, path = source_of(two, tmp_path, "over")
    taken = two.run("vdi-snapshot", uuid, "new-name-label=before").stdout.strip()
    (tmp_path / "changed").write_bytes(os.urandom(MIB))
    assert two.run("vdi-import", uuid, str(tmp_path / "changed"), "--quiet").returncode == 0
    done = two.run("vdi-copy", f"uuid={taken}", f"into-vdi-uuid={uuid}", "--quiet", "--json")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert json.loads(done.stdout)["uuid"] == uuid
    qemu_compare(image_of(two, "disks", uuid), "vpc", path, "raw")
    done = two.run("vdi-copy", f"uuid={taken}", f"sr-uuid={sr_uuid(two, 'more')}", "--quiet")
    qemu_compare(image_of(two, "more", done.stdout.strip()), "vpc", path, "raw")


def sr_uuid(house: RunningGateway, name: str) -> str:
    return house.run("sr-list", f"name-label={name}", "--minimal").stdout.strip()


def test_a_revert_brings_back_what_the_snapshot_kept(two: RunningGateway, tmp_path: Path) -> None:
    uuid, path = source_of(two, tmp_path, "reverted")
    two.run("vdi-snapshot", uuid, "new-name-label=kept-for-revert")
    (tmp_path / "changed").write_bytes(os.urandom(MIB))
    assert two.run("vdi-import", uuid, str(tmp_path / "changed"), "--quiet").returncode == 0
    done = two.run("vdi-revert", "snapshot-uuid=kept-for-revert")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
    assert two.run("vdi-export", uuid, str(tmp_path / "back"), "--quiet").returncode == 0
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert "not the snapshot of a VDI" in error(two.run("vdi-revert", uuid))


def test_what_cannot_be_copied_is_told_in_one_line(two: RunningGateway, tmp_path: Path) -> None:
    uuid, _ = source_of(two, tmp_path, "refused")
    small = two.run("vdi-create", "small", "2MiB", "sr=more").stdout.strip()
    assert "several SRs" in error(two.run("vdi-copy", uuid))
    assert "there is no SR 'nowhere'" in error(two.run("vdi-copy", uuid, "nowhere"))
    assert "VDI_TOO_SMALL from VDI.copy" in error(two.run("vdi-copy", uuid, "--into", small))
    assert "keeps its name" in error(
        two.run("vdi-copy", uuid, "--into", small, "--name-label", "other"), code=2
    )


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[RunningGateway]:
    """A gateway that waits long for a disk that is in use."""
    with house_in(tmp_path / "patient", '[limits]\nlease_wait = "5m"\n') as running:
        yield running


def test_an_interrupted_copy_is_cancelled_and_leaves_nothing(patient: RunningGateway, tmp_path: Path) -> None:
    uuid, _ = source_of(patient, tmp_path, "interrupted")
    staging = patient.state_dir.parent / "disks" / ".vdi-gateway" / "staging"
    # As long as somebody writes to the disk, the copy waits.
    with closing(open_vdi(str(patient.state_dir / "access.sock"), uuid, write=True)):
        process = subprocess.Popen(
            [program(), "vdi-copy", uuid, "--quiet"],
            env={**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(patient.state_dir)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while not (tasks := patient.call("task.get_by_name_label", "Async.VDI.copy")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (130, "", "interrupted\n")
    assert patient.call("task.get_status", tasks[0]) == "cancelled"
    assert len(patient.call("VDI.get_all")) == 1
    assert list(staging.iterdir()) == []
