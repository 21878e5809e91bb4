from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import RunningGateway


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands remember about gateways stays in the test."""
    directory = tmp_path / "config"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(directory))
    return directory / "vdi-gateway"


@contextmanager
def house_in(directory: Path, config: str = "") -> Iterator[RunningGateway]:
    """A gateway with one SR, called disks, and this configuration."""
    running = RunningGateway(directory)
    if config:
        running.state_dir.mkdir(parents=True, mode=0o700)
        (running.state_dir / "config.toml").write_text(config)
    running.start()
    try:
        assert running.run("sr-create", str(directory / "disks")).returncode == 0
        yield running
    finally:
        try:
            running.stop()
        finally:
            running.kill()
    assert "Traceback" not in running.log()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """One for all tests of a module."""
    with house_in(tmp_path_factory.mktemp("house")) as running:
        yield running
