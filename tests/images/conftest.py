"""What the tests of the images share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.images.vhd.create import create_dynamic


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
