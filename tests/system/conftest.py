"""One gateway with one SR per worker process for the tests that leave it running; a fresh one for others."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import RunningGateway
from tests.system.site import Site


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


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    """A gateway of the test's own, to be killed and restarted."""
    gateway = RunningGateway(tmp_path)
    gateway.start()
    try:
        yield Site(gateway, tmp_path / "sr")
    finally:
        stop(gateway)


@pytest.fixture
def random_file(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a file of that many random bytes."""

    def make(size: int) -> Path:
        path = tmp_path / f"random-{os.urandom(4).hex()}"
        path.write_bytes(os.urandom(size))
        return path

    return make
