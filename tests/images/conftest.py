"""What the tests of the images share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.images.vhd.create import create_differencing, create_dynamic, create_fixed
from tests.images.damaged import BLOCK, SIZE, Vhd
from tests.images.disks import put


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory that no disk has to be waited for: crashes are replayed, so nothing real is lost there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A dynamic VHD of four blocks of 2 MiB, none of which is there yet."""
    path = tmp_path / "a.vhd"
    create_dynamic(str(path), 8 << 20)
    return path


@pytest.fixture
def dynamic(tmp_path: Path) -> Vhd:
    """The first of three blocks of 2 MiB is full, the second holds some data, the third is not there."""
    path = tmp_path / "dynamic.vhd"
    create_dynamic(str(path), SIZE)
    put(path, (0, b"\x11" * BLOCK))
    put(path, (BLOCK + 4096, b"\x22" * 65536))
    return Vhd(path)


@pytest.fixture
def fixed(tmp_path: Path) -> Vhd:
    """A fixed disk of 6 MiB with some data."""
    path = tmp_path / "fixed.vhd"
    create_fixed(str(path), SIZE)
    put(path, (4096, b"\x33" * 65536))
    return Vhd(path)


@pytest.fixture
def child(tmp_path: Path, dynamic: Vhd) -> Vhd:
    """Stands on `dynamic` and holds some of the third block."""
    path = tmp_path / "child.vhd"
    create_differencing(str(path), str(dynamic.path), dynamic.image())
    put(path, (2 * BLOCK, b"\x44" * 4096))
    return Vhd(path)
