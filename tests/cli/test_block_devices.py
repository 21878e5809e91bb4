"""vdi-import and vdi-export with real block devices: loop devices, which take root."""

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.slow_proxy import Proxy
from tests.conftest import RunningGateway, clean_environment, program

MIB = 1 << 20
DISK_BYTES = 16 * MIB

LoopDevice = Callable[[Path], Path]


def content(size: int = DISK_BYTES) -> bytes:
    """Data at both ends and in the middle, zeroes between."""
    data = bytearray(size)
    for offset in (0, size // 2 + 4096, size - 64 * 1024):
        data[offset : offset + 64 * 1024] = os.urandom(64 * 1024)
    return bytes(data)


@pytest.fixture
def loop_device() -> Iterator[LoopDevice]:
    """Makes a file a block device; at the end all of them are given back."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    with contextlib.ExitStack() as devices:

        def attach(file: Path) -> Path:
            command = ["losetup", "--find", "--show", "--nooverlap", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this machine makes no loop device: {done.stderr.strip()}")
            device = done.stdout.strip()
            devices.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return Path(device)

        yield attach


@pytest.fixture
def ram_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system without holes: a loop device on it can't give space back, like many a plain disk."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    place = tmp_path / "ram"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "ramfs", "ramfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this machine mounts no ramfs: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def disk(house: RunningGateway, request: pytest.FixtureRequest) -> str:
    """The uuid of a new disk."""
    done = house.run("vdi-create", request.node.name[:100], str(DISK_BYTES))
    assert done.returncode == 0, done
    return done.stdout.strip()


def filled(house: RunningGateway, disk: str, data: bytes) -> None:
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    subprocess.run([program(), "vdi-import", disk, "-", "--quiet"], input=data, env=environment, check=True)


def exported(house: RunningGateway, disk: str) -> bytes:
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    command = [program(), "vdi-export", disk, "-", "--quiet"]
    return subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout


def test_a_device_is_imported(
    house: RunningGateway, disk: str, loop_device: LoopDevice, tmp_path: Path
) -> None:
    data = content()
    (tmp_path / "backing").write_bytes(data)
    device = loop_device(tmp_path / "backing")
    done = house.run("vdi-import", f"uuid={disk}", f"filename={device}", "--quiet")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert exported(house, disk) == data


def test_a_device_that_is_stdin_is_imported(
    house: RunningGateway, disk: str, loop_device: LoopDevice, tmp_path: Path
) -> None:
    data = content()
    (tmp_path / "backing").write_bytes(data)
    with loop_device(tmp_path / "backing").open("rb") as device:
        done = house.command("vdi-import", disk, "-", "--quiet", stdin=device)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert exported(house, disk) == data


def test_a_device_of_another_size_is_imported_only_where_it_fits(
    house: RunningGateway, disk: str, loop_device: LoopDevice, tmp_path: Path
) -> None:
    old, new = content(), content(DISK_BYTES // 2)
    filled(house, disk, old)
    (tmp_path / "larger").write_bytes(bytes(DISK_BYTES + 512))
    done = house.run("vdi-import", disk, str(loop_device(tmp_path / "larger")), "--quiet")
    assert done.returncode == 1
    assert f"has {DISK_BYTES + 512} bytes, the disk {DISK_BYTES}; make the disk larger" in done.stderr
    assert exported(house, disk) == old
    (tmp_path / "smaller").write_bytes(new)
    done = house.run("vdi-import", disk, str(loop_device(tmp_path / "smaller")))
    assert (done.returncode, "the rest of the disk stays as it is" in done.stderr) == (0, True), done
    assert exported(house, disk) == new + old[len(new) :]


def test_a_disk_goes_onto_a_larger_device_whose_rest_stays(
    house: RunningGateway, disk: str, loop_device: LoopDevice, tmp_path: Path
) -> None:
    data = content()
    filled(house, disk, data)
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xa5" * (DISK_BYTES + MIB))
    device = loop_device(backing)
    done = house.run("vdi-export", f"uuid={disk}", f"filename={device}", "--quiet")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert backing.read_bytes() == data + b"\xa5" * MIB
    assert backing.stat().st_blocks * 512 <= 2 * MIB  # zeroes were given back
    assert not device.with_name(device.name + ".part").exists()


def test_zeroes_reach_a_device_that_cannot_give_space_back(
    house: RunningGateway, disk: str, loop_device: LoopDevice, ram_file_system: Path
) -> None:
    data = content()
    filled(house, disk, data)
    backing = ram_file_system / "backing"
    backing.write_bytes(b"\xa5" * DISK_BYTES)
    done = house.run("vdi-export", disk, str(loop_device(backing)), "--quiet")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert backing.read_bytes() == data


def test_a_broken_export_goes_on_inside_a_device(
    house: RunningGateway, disk: str, loop_device: LoopDevice, tmp_path: Path
) -> None:
    data = content()
    filled(house, disk, data)
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xa5" * DISK_BYTES)
    with Proxy(house.url, cut_after=5 * MIB + 77, reset=False) as proxy:
        password = ("--password-file", str(house.state_dir / "admin-password"))
        done = house.run("vdi-export", disk, str(loop_device(backing)), "--url", proxy.url, *password)
    assert (done.returncode, proxy.cut) == (0, 1), done
    again = re.search(r"trying again in 0\.5 s at (\d+) bytes", done.stderr)
    assert again is not None, done
    assert int(again[1]) % 512  # between two sectors, where the device can't give space back
    assert backing.read_bytes() == data
    assert backing.stat().st_blocks * 512 <= 2 * MIB


def test_a_device_that_is_too_small_or_in_use_is_refused_and_stays_as_it_was(
    house: RunningGateway, disk: str, loop_device: LoopDevice, tmp_path: Path
) -> None:
    filled(house, disk, content())
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xa5" * (DISK_BYTES - 512))
    device = loop_device(backing)
    done = house.run("vdi-export", disk, str(device), "--quiet")
    assert done.returncode == 1
    assert f"{device} has {DISK_BYTES - 512} bytes, the disk {DISK_BYTES}; give a larger" in done.stderr
    holder = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mounted file system has it
    try:
        done = house.run("vdi-export", disk, str(device), "--quiet")
    finally:
        os.close(holder)
    assert (done.returncode, done.stderr) == (
        1,
        f"vdi-gateway vdi-export: {device}: Device or resource busy\n",
    )
    assert backing.read_bytes() == b"\xa5" * (DISK_BYTES - 512)
