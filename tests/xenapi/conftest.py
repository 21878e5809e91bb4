from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .estate_for_tests import Site, open_site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as opened:
        yield opened
