"""A gate for each test; the certificates of the test's own authority."""

import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trustme

from gateway.repository.coalescer import PAUSED_KEY
from tests.http.gate import Gate, open_gate


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
async def gate(tmp_path: Path, authority: trustme.CA) -> AsyncIterator[Gate]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    async with open_gate(tmp_path, context) as opened:
        yield opened


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory that no disk has to be waited for."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
async def coalescing(memory: Path) -> AsyncIterator[Gate]:
    """A gate whose SR is coalesced when a test says so."""
    async with open_gate(memory, coalesces=True) as opened:
        await opened.inventory.records.srs.change(opened.sr, other_config={PAUSED_KEY: "true"})
        yield opened
