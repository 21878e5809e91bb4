"""One gateway with one SR per worker process for the tests that leave it running; a fresh one for others."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import RunningGateway
from tests.system.guests import GPT, MBR, Disk, Guest, make_disk
from tests.system.mounted import NO_FUSE, Mounted, mounted
from tests.system.site import MIB, Site, depth


def stop(gateway: RunningGateway) -> None:
    if gateway.running:
        try:
            gateway.stop()
        finally:
            gateway.kill()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture(scope="session")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    gateway = RunningGateway(directory)
    gateway.start()
    try:
        yield Site(gateway, directory / "sr")
    finally:
        stop(gateway)


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """The shared gateway; the test must leave no staging file behind."""
    yield shared_site
    assert shared_site.gateway.running
    assert shared_site.staged_files() == []


@pytest.fixture(scope="module", params=[GPT, MBR])
def disk(
    request: pytest.FixtureRequest,
    shared_site: Site,
    guests: list[Guest],
    tmp_path_factory: pytest.TempPathFactory,
) -> Disk:
    """A disk with the module's `guests` in its partitions, as a chain of three levels."""
    made = make_disk(shared_site, tmp_path_factory.mktemp("disk"), guests, request.param)
    assert depth(shared_site, made.vdi) == 3
    return made


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    """A gateway of the test's own, to be killed and restarted."""
    gateway = RunningGateway(tmp_path)
    gateway.start()
    try:
        yield Site(gateway, tmp_path / "sr")
    finally:
        stop(gateway)


@pytest.fixture(scope="session")
def shared_mount(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    if NO_FUSE:
        pytest.skip(NO_FUSE)
    with mounted(shared_site.gateway, tmp_path_factory.mktemp("mount") / "disks") as mount:
        yield mount


@pytest.fixture
def mount(site: Site, shared_mount: Mounted) -> Iterator[Mounted]:
    """The disks of the shared gateway, read-only; no test may leave one open."""
    yield shared_mount
    assert shared_mount.running, shared_mount.log()


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 40 MiB on a loop device."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    image, place = tmp_path / "ext4", tmp_path / "mounted"
    place.mkdir()
    image.touch()
    os.truncate(image, 40 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    mounted = subprocess.run(
        ["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this machine mounts no loop device: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def random_file(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a file of that many random bytes."""

    def make(size: int) -> Path:
        path = tmp_path / f"random-{os.urandom(4).hex()}"
        path.write_bytes(os.urandom(size))
        return path

    return make
