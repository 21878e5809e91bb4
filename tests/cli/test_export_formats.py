"""vdi-export in formats other than raw, and as deltas."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.slow_proxy import Proxy
from tests.cli.test_transfers import MIB, error, lines, remote
from tests.conftest import RunningGateway
from tests.images.disks import libvhdi_reads, qemu_compare

QEMU = {"vhd": "vpc", "qcow2": "qcow2"}


@pytest.fixture
def disk(house: RunningGateway, tmp_path: Path) -> str:
    """The uuid of a new disk of 32 MiB with 13 MiB of data, which `tmp_path` has as `raw`."""
    uuid = house.run("vdi-create", tmp_path.name, "32MiB").stdout.strip()
    (tmp_path / "raw").write_bytes(
        os.urandom(10 * MIB) + bytes(10 * MIB) + os.urandom(3 * MIB) + bytes(9 * MIB)
    )
    assert house.run("vdi-import", uuid, str(tmp_path / "raw")).returncode == 0
    return uuid


@pytest.mark.parametrize("image_format", ["vhd", "qcow2"])
def test_a_disk_as_an_image(house: RunningGateway, disk: str, tmp_path: Path, image_format: str) -> None:
    out = tmp_path / f"out.{image_format}"
    done = house.run("vdi-export", f"uuid={disk}", f"filename={out}", f"format={image_format}")
    assert done.returncode == 0, done
    assert lines(done)[-1]["total"] == out.stat().st_size
    qemu_compare(out, QEMU[image_format], tmp_path / "raw", "raw")


@pytest.mark.parametrize("image_format", ["vhd", "qcow2"])
def test_a_delta_beside_its_base(house: RunningGateway, disk: str, tmp_path: Path, image_format: str) -> None:
    snapshot = house.run("vdi-snapshot", disk).stdout.strip()
    command = ["vdi-import", disk, str(tmp_path / "head")]
    (tmp_path / "head").write_bytes(b"new" * 10_000)
    assert house.run(*command).returncode == 0
    full, delta = (tmp_path / f"{uuid}.{image_format}" for uuid in (snapshot, disk))
    assert house.run("vdi-export", snapshot, str(full), "--format", image_format).returncode == 0
    done = house.run("vdi-export", disk, str(delta), f"format={image_format}", f"base={snapshot}")
    assert done.returncode == 0, done
    assert any(f"it stands on {full.name}" in line.get("note", "") for line in lines(done))
    assert delta.stat().st_size < 4 * MIB < full.stat().st_size
    expected = b"new" * 10_000 + (tmp_path / "raw").read_bytes()[30_000:]
    if image_format == "vhd":
        assert libvhdi_reads([delta, full]) == expected
    else:
        (tmp_path / "expected").write_bytes(expected)
        qemu_compare(delta, "qcow2", tmp_path / "expected", "raw")


def test_a_broken_export_of_an_image_goes_on(house: RunningGateway, disk: str, tmp_path: Path) -> None:
    with Proxy(house.url, cut_after=5 * MIB, cuts=2) as proxy:
        where = remote(house, proxy.url)
        done = house.run("vdi-export", disk, str(tmp_path / "out.vhd"), "format=vhd", *where)
    assert (done.returncode, proxy.cut) == (0, 2), done
    qemu_compare(tmp_path / "out.vhd", "vpc", tmp_path / "raw", "raw")
    whole = subprocess.run(["sha256sum", str(tmp_path / "out.vhd")], capture_output=True, check=True).stdout
    assert house.run("vdi-export", disk, str(tmp_path / "out.vhd"), "format=vhd", "--force").returncode == 0
    again = subprocess.run(["sha256sum", str(tmp_path / "out.vhd")], capture_output=True, check=True).stdout
    assert whole == again


def test_what_does_not_go_together_is_told(house: RunningGateway, disk: str, tmp_path: Path) -> None:
    cases: list[tuple[list[str], str, int]] = [
        (["out.vhd"], "give format=vhd", 2),
        (["out.QCOW2", "format=vhd"], "named like a qcow2 image", 2),
        (["out.raw", "base=x"], "give format=vhd or format=qcow2", 2),
        (["out.vhd", "format=vhd", "base=nobody"], "nobody", 1),
        (["out", "format=vmdk"], "vmdk", 2),
        ([".", "format=qcow2"], ".qcow2", 1),
    ]
    for (name, *arguments), words, code in cases:
        done = house.run("vdi-export", disk, str(tmp_path / name), *arguments)
        assert words in error(done, code)
    assert sorted(path.name for path in tmp_path.glob("out*")) == []


def test_a_raw_disk_may_have_any_name_and_an_unrelated_base_is_told(
    house: RunningGateway, disk: str, tmp_path: Path
) -> None:
    assert house.run("vdi-export", disk, str(tmp_path / "out.vhd"), "format=raw").returncode == 0
    assert (tmp_path / "out.vhd").read_bytes() == (tmp_path / "raw").read_bytes()
    other = house.run("vdi-create", "another", "32MiB").stdout.strip()
    said = error(house.run("vdi-export", disk, str(tmp_path / "x.vhd"), "format=vhd", f"base={other}"))
    assert "no file is part of both their chains" in said
