import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.nbd_plugin.conftest import Nbd, run
from tests.system.site import MIB, Vdi, stored_content, wait_until

SIZE = 24 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, a hole, zeroes that are written, data up to the last byte."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(os.urandom(5 * MIB + 65536))
        file.seek(12 * MIB)
        file.write(bytes(3 * MIB))
        file.write(os.urandom(SIZE - 15 * MIB))
    return path


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
def test_nbdcopy_writes_and_reads(nbd: Nbd, image: Path, tmp_path: Path, image_format: str) -> None:
    vdi = nbd.site.create_vdi(SIZE, image_format)
    run("nbdcopy", "--flush", image, nbd.uri(vdi, write=True))
    assert stored_content(vdi) == image.read_bytes()
    run("nbdcopy", nbd.uri(vdi), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
def test_qemu_img_converts_and_compares(nbd: Nbd, image: Path, tmp_path: Path, image_format: str) -> None:
    vdi = nbd.site.create_vdi(SIZE, image_format)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, nbd.uri(vdi, write=True))
    assert stored_content(vdi) == image.read_bytes()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, nbd.uri(vdi))
    run("qemu-img", "convert", "-O", "qcow2", nbd.uri(vdi), tmp_path / "back.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, tmp_path / "back.qcow2")
    assert json.loads(run("qemu-img", "info", "--output=json", nbd.uri(vdi)))["virtual-size"] == SIZE


def test_qemu_img_opens_its_target_two_times(nbd: Nbd, image: Path) -> None:
    vdi = nbd.site.create_vdi(SIZE)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", image, nbd.uri(vdi, write=True))
    assert stored_content(vdi) == image.read_bytes()


def test_qemu_io_finds_its_patterns(nbd: Nbd) -> None:
    vdi = nbd.site.create_vdi(SIZE)
    commands = (
        "write -P 1 0 3M",
        "write -P 2 1000 4000",
        "write -z 4M 1M",
        "write -P 3 4M 64k",
        "write -z -u 100k 1M",
        "discard 1M 1M",
        "write -f -P 4 23M 1M",
        "flush",
        "read -P 1 0 1000",
        "read -P 2 1000 4000",
        "read -P 1 5000 97400",
        "read -P 0 100k 1948k",
        "read -P 1 2M 1M",
        "read -P 3 4M 64k",
        "read -P 0 4160k 19392k",
        "read -P 4 23M 1M",
    )
    arguments = [part for command in commands for part in ("-c", command)]
    run("qemu-io", "-f", "raw", *arguments, nbd.uri(vdi, write=True))


def test_nbdinfo_tells_what_an_export_can(nbd: Nbd) -> None:
    vdi = nbd.site.create_vdi(SIZE)

    def info(*, write: bool) -> dict[str, Any]:
        document = json.loads(run("nbdinfo", "--json", "--no-content", nbd.uri(vdi, write=write)))
        [export] = document["exports"]
        assert export["export-size"] == SIZE
        return dict(export)

    reading, writing = info(write=False), info(write=True)
    assert (reading["is_read_only"], reading["can_multi_conn"], reading["can_cache"]) == (True, True, True)
    assert (writing["is_read_only"], writing["can_multi_conn"]) == (False, False)
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero"):
        assert writing[ability] is True, ability


def test_nbdsh_scripts_run(nbd: Nbd) -> None:
    vdi = nbd.site.create_vdi(SIZE)
    script = (
        "assert (h.get_size(), h.can_zero(), h.is_read_only()) == (25165824, True, False)",
        "h.pwrite(b'a' * 4096, 4096)",
        "h.zero(512, 4608)",
        "h.flush()",
        "assert h.pread(2048, 4096) == b'a' * 512 + bytes(512) + b'a' * 1024",
    )
    commands = [part for line in script for part in ("-c", line)]
    # It runs the first python3 of the path, and only Debian's own has the module.
    run("env", "PATH=/usr/bin:/bin", "nbdsh", "-u", nbd.uri(vdi, write=True), *commands)
    assert stored_content(vdi)[4096:5632] == b"a" * 512 + bytes(512) + b"a" * 512


def test_fio_verifies_what_it_has_written(nbd: Nbd, tmp_path: Path) -> None:
    if shutil.which("fio") is None or "nbd" not in run("fio", "--enghelp"):
        pytest.skip("fio with its engine nbd is not installed")
    vdi = nbd.site.create_vdi(SIZE)
    job = ["--name=verify", f"--aux-path={tmp_path}", "--ioengine=nbd", f"--uri={nbd.uri(vdi, write=True)}"]
    work = ["--rw=randwrite", "--bsrange=512-64k", f"--size={SIZE}", "--iodepth=16", "--fsync=64"]
    told = run("fio", *job, *work, "--verify=crc32c", "--verify_fatal=1", "--output-format=json")
    [result] = json.loads(told[told.index("{") :])["jobs"]
    assert result["error"] == 0
    assert result["read"]["io_bytes"] == result["write"]["io_bytes"] >= SIZE // 2


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
def test_maps_tell_the_holes_of_a_disk(nbd: Nbd, image: Path, image_format: str) -> None:
    vdi = nbd.site.create_vdi(SIZE, image_format)
    # Zeroes that are written become holes as well.
    run("nbdcopy", "--flush", "--destination-is-zero", image, nbd.uri(vdi, write=True))
    data = [(0, 5 * MIB + 65536), (15 * MIB, SIZE)]
    assert data_by_nbdinfo(nbd, vdi) == data_by_qemu(nbd, vdi) == data


def test_maps_of_a_chain_tell_what_a_child_hides_and_adds_and_it_converts_to_qcow2(
    nbd: Nbd, libnbd: Any, image: Path, tmp_path: Path
) -> None:
    vdi = nbd.site.create_vdi(SIZE)
    run("nbdcopy", "--flush", "--destination-is-zero", image, nbd.uri(vdi, write=True))
    content = bytearray(image.read_bytes())
    for level in (1, 2):
        nbd.site.gateway.call("VDI.snapshot", vdi.ref)
        writer = nbd.connect(libnbd, vdi, write=True)
        place = level * MIB
        writer.trim(512 * 1024, place)
        content[place : place + 512 * 1024] = bytes(512 * 1024)
        place = (7 + 3 * level) * MIB + 65536  # where no level below has anything
        writer.pwrite(b"c" * 65536, place)
        content[place : place + 65536] = b"c" * 65536
        writer.shutdown()
    kib = 1024
    data = [
        (0, MIB),
        (MIB + 512 * kib, 2 * MIB),
        (2 * MIB + 512 * kib, 5 * MIB + 65536),
        (10 * MIB + 64 * kib, 10 * MIB + 128 * kib),
        (13 * MIB + 64 * kib, 13 * MIB + 128 * kib),
        (15 * MIB, SIZE),
    ]
    assert data_by_nbdinfo(nbd, vdi) == data_by_qemu(nbd, vdi) == data
    flat = tmp_path / "flat.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", nbd.uri(vdi), flat)
    truth = tmp_path / "truth.raw"
    truth.write_bytes(content)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", truth, flat)
    # Holes take no space there either.
    assert flat.stat().st_size < sum(stop - start for start, stop in data) + MIB


def data_by_nbdinfo(nbd: Nbd, vdi: Vdi) -> list[tuple[int, int]]:
    told = json.loads(run("nbdinfo", "--map", "--json", nbd.uri(vdi)))
    return joined([(each["offset"], each["length"], not each["type"] & 2) for each in told])


def data_by_qemu(nbd: Nbd, vdi: Vdi) -> list[tuple[int, int]]:
    told = json.loads(run("qemu-img", "map", "--output=json", nbd.uri(vdi)))
    return joined([(each["start"], each["length"], each["data"] and not each["zero"]) for each in told])


def joined(told: list[tuple[int, int, bool]]) -> list[tuple[int, int]]:
    """Where a map sees data, from and to; it has to tell of every byte of the disk, once and in order."""
    found: list[tuple[int, int]] = []
    position = 0
    for offset, length, is_data in told:
        assert offset == position
        position += length
        if is_data and found and found[-1][1] == offset:
            found[-1] = (found[-1][0], position)
        elif is_data:
            found.append((offset, position))
    assert position == SIZE
    return found


def test_nbdfuse_mounts_a_disk_and_qemu_nbd_exports_it_again(nbd: Nbd, image: Path, tmp_path: Path) -> None:
    vdi = nbd.site.create_vdi(SIZE)
    run("nbdcopy", image, nbd.uri(vdi, write=True))
    again = tmp_path / "again.sock"
    pid_file = tmp_path / "again.pid"
    run(
        "qemu-nbd",
        "--fork",
        "--read-only",
        "--format=raw",
        f"--socket={again}",
        f"--pid-file={pid_file}",
        nbd.uri(vdi),
    )
    try:
        run("nbdcopy", f"nbd+unix:///?socket={again}", tmp_path / "back")
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    assert (tmp_path / "back").read_bytes() == image.read_bytes()
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("nbdfuse needs /dev/fuse")
    mounted, ready = tmp_path / "mounted", tmp_path / "fuse.pid"
    mounted.touch()
    with subprocess.Popen(["nbdfuse", "--readonly", "-P", str(ready), str(mounted), nbd.uri(vdi)]) as process:
        try:
            wait_until(ready.exists, "nbdfuse")
            assert mounted.read_bytes() == image.read_bytes()
        finally:
            process.terminate()  # which unmounts it
