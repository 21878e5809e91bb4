import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.nbd_plugin.conftest import Nbd, run
from tests.system.site import MIB, stored_content, wait_until

SIZE = 24 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, a hole, zeroes that are written, data up to the last byte."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(os.urandom(5 * MIB + 4096))
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


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
def test_maps_tell_the_holes_of_a_disk(nbd: Nbd, image: Path, image_format: str) -> None:
    vdi = nbd.site.create_vdi(SIZE, image_format)
    run("nbdcopy", "--flush", "--destination-is-zero", image, nbd.uri(vdi, write=True))
    content = image.read_bytes()
    stop = 0
    for extent in json.loads(run("nbdinfo", "--map", "--json", nbd.uri(vdi))):
        assert extent["offset"] == stop
        stop += extent["length"]
        if extent["type"] & 2:
            assert not any(content[extent["offset"] : stop])
    assert stop == SIZE
    mapped = json.loads(run("qemu-img", "map", "--output=json", nbd.uri(vdi)))
    data = sum(extent["length"] for extent in mapped if extent["data"])
    zeroes = sum(extent["length"] for extent in mapped if extent["zero"])
    assert data + zeroes == SIZE
    assert zeroes >= 6 * MIB


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
