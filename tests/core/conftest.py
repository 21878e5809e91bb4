"""What the tests of the core share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.core.task_board import Board


@pytest.fixture
async def board(tmp_path: Path) -> AsyncIterator[Board]:
    board = await Board(str(tmp_path / "gateway.sqlite3")).open()
    yield board
    await board.database.aclose()
