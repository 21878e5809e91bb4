from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RunningGateway


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands remember about gateways stays in the test."""
    directory = tmp_path / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(directory))
    return directory / "vdi-gateway"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway with one SR, called disks, for all tests of a module."""
    directory = tmp_path_factory.mktemp("house")
    running = RunningGateway(directory)
    running.start()
    try:
        assert running.command("sr-create", str(directory / "disks")).returncode == 0
        yield running
    finally:
        try:
            running.stop()
        finally:
            running.kill()
    assert "Traceback" not in running.log()
