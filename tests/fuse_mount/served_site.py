"""A gateway as its own process for tests of the mount's data, and disks with known content on it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuse_mount.disks import Disks
from gateway.access.client import open_vdi
from tests.conftest import RunningGateway
from tests.system.site import MIB, Site, Vdi


@contextmanager
def served_site(directory: Path) -> Iterator[Site]:
    gateway = RunningGateway(directory)
    gateway.state_dir.mkdir(mode=0o700)
    (gateway.state_dir / "config.toml").write_text('[limits]\nlease_wait = "300ms"\n')
    gateway.start()
    try:
        yield Site(gateway, directory / "sr")
    finally:
        if gateway.running:
            gateway.stop()
        gateway.kill()
    assert "Traceback" not in gateway.log(), gateway.log()


def control_socket(site: Site) -> str:
    return str(site.gateway.state_dir / "access.sock")


def operations(site: Site, vdi: Vdi) -> list[str]:
    return sorted(site.gateway.call("VDI.get_current_operations", vdi.ref).values())


def disks_of(site: Site, *, wait_seconds: float = 0.3) -> Disks:
    return Disks(control_socket(site), lambda: None, wait_seconds=wait_seconds)


def write(site: Site, vdi: Vdi, offset: int, data: bytes) -> None:
    disk = open_vdi(control_socket(site), vdi.uuid, write=True, purpose="test")
    disk.pwrite(data, offset)
    disk.close()


def content(site: Site, vdi: Vdi) -> bytes:
    disk = open_vdi(control_socket(site), vdi.uuid, purpose="test")
    try:
        data = bytearray(disk.size)
        disk.pread_into(data, 0)
        return bytes(data)
    finally:
        disk.close()


def chained_vdi(site: Site, size: int = 9 * MIB + 512, image_format: str = "vhd") -> Vdi:
    """A VDI whose chain has three images, each with pieces of the disk that begin and end anywhere."""
    vdi = site.create_vdi(size, image_format)
    choose = random.Random(size)
    for level in range(3):
        for _ in range(5):
            offset = choose.randrange(vdi.size - 1)
            length = min(choose.randrange(1, 300_000), vdi.size - offset)
            write(site, vdi, offset, choose.randbytes(length))
        if level < 2 and image_format == "vhd":
            site.gateway.call("VDI.snapshot", vdi.ref)
    return vdi
