from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .estate_for_tests import Site, open_site, with_inventory


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as opened:
        yield opened


@pytest.fixture
async def live(site: Site) -> AsyncIterator[Site]:
    """The site with a real inventory."""
    async with with_inventory(site) as opened:
        yield opened
