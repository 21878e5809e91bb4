"""What the tests of the core share."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.core.lease_files import make_image, open_images
from tests.core.session_gate import Gate
from tests.core.task_board import Board


@pytest.fixture
async def board(tmp_path: Path) -> AsyncIterator[Board]:
    board = await Board(str(tmp_path / "gateway.sqlite3")).open()
    yield board
    await board.database.aclose()


@pytest.fixture
def image(tmp_path: Path) -> str:
    """A raw image that begins with "old"."""
    return make_image(tmp_path / "disk.raw", b"old")


@pytest.fixture
def no_descriptor_stays_open() -> Iterator[None]:
    """No image is open after the test that was not open before it."""
    before = open_images()
    yield
    assert open_images() == before


@pytest.fixture
async def gate(tmp_path: Path) -> AsyncIterator[Gate]:
    gate = await Gate(str(tmp_path / "gateway.sqlite3")).open()
    yield gate
    await gate.database.aclose()
