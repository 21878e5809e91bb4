"""Ending `vdi-gateway serve` while it is only starting: no process of NBD is left."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import clean_environment, program
from tests.nbd_plugin.supervised import ended, eventually

pytestmark = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")


@contextmanager
def starting(state: Path) -> Iterator["subprocess.Popen[str]"]:
    """A gateway, from its very beginning on; its supervisor is killed at the end."""
    command = [program(), "serve", "--state-dir", str(state), "--http", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--nbd", "127.0.0.1:0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            for each in (supervisor(state), *workers(state)):
                if each is not None and not ended(each):
                    with suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)


def supervisor(state: Path) -> int | None:
    try:
        return int((state / "nbd.lock").read_text())
    except (OSError, ValueError):
        return None


def workers(state: Path) -> list[int]:
    try:
        return [int(each) for each in (state / "nbd-workers").read_text().split()[::2]]
    except OSError:
        return []


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the supervisor": lambda state: supervisor(state) is not None,
    "its control socket": lambda state: (state / "nbd-control.sock").exists(),
    "a worker": lambda state: bool(workers(state)),
}


@pytest.mark.parametrize(
    ("moment", "number"), [*((each, signal.SIGTERM) for each in MOMENTS), ("a worker", signal.SIGINT)]
)
def test_being_told_to_stop_while_it_starts_ends_all(
    tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    state = tmp_path / "state"
    with starting(state) as process:
        eventually(lambda: MOMENTS[moment](state), moment)
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
        assert re.search(r"\bstopped\b", log)
        assert "Traceback" not in log, log
        found = supervisor(state)
        assert found is not None
        eventually(lambda: ended(found), "the supervisor to end")
        assert all(ended(each) for each in workers(state))


def test_a_gateway_that_is_killed_while_it_starts_leaves_nothing_for_long(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with starting(state) as process:
        eventually(lambda: supervisor(state) is not None, "the supervisor")
        process.kill()
        process.wait()
        found = supervisor(state)
        assert found is not None
        eventually(lambda: ended(found), "the supervisor to end")
        assert all(ended(each) for each in workers(state))
