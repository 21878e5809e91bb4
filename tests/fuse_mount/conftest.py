"""A gateway as its own process, with a disk and with mounts: one of a test's own, one that lasts.

Tests of what is read without a mount have a `site` of their own, with a shorter wait for leases; tests of
the handlers alone have a `house`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.conftest import RunningGateway
from tests.fuse_mount.operations_house import House
from tests.fuse_mount.served_site import operations
from tests.system.mounted import Mounted, mounted
from tests.system.site import MIB, Site, Vdi, wait_until


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A gateway whose mounts don't end it; its SR is called disks."""
    directory = tmp_path_factory.mktemp("site")
    gateway = RunningGateway(directory)
    gateway.start()
    try:
        site = Site(gateway, directory / "sr")
        gateway.call("SR.set_name_label", site.repository, "disks")
        yield site
    finally:
        if gateway.running:
            gateway.stop()
        gateway.kill()
    assert "Traceback" not in gateway.log()


@pytest.fixture
def vdi(site: Site) -> Iterator[Vdi]:
    vdi = site.create_vdi(4 * MIB, "raw")
    with vdi.file.open("r+b") as file:  # never shorter, since the gateway may look at it
        file.write(os.urandom(vdi.size))
    yield vdi
    wait_until(lambda: not operations(site, vdi), "the leases to end")
    site.gateway.call("VDI.destroy", vdi.ref)


@pytest.fixture
def mount(site: Site, tmp_path: Path) -> Iterator[Mounted]:
    """One that the test may end."""
    with mounted(site.gateway, tmp_path / "mnt") as mount:
        yield mount


@pytest.fixture(scope="module")
def lasting(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """One for all tests that leave it as it is."""
    with mounted(site.gateway, tmp_path_factory.mktemp("lasting") / "mnt") as mount:
        yield mount


@pytest.fixture
async def house() -> House:
    return House()


@pytest.fixture
async def writable() -> House:
    return House(writable=True)


@pytest.fixture
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield
