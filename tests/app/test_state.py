import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.state import RunningGateway, StateDirectory, StateError

RUNNING = RunningGateway(
    pid=17, http=("http://127.0.0.1:8080",), https=("https://127.0.0.1:8443",), authority="/x/ca.pem"
)


def test_a_second_gateway_is_refused_and_told_which_process_has_the_directory(tmp_path: Path) -> None:
    first = StateDirectory.take(str(tmp_path))
    with pytest.raises(StateError, match=rf"already \(process {os.getpid()}\)"):
        StateDirectory.take(str(tmp_path))
    first.release()
    StateDirectory.take(str(tmp_path)).release()


def test_a_process_that_died_locks_nobody_out(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from gateway.state import RunningGateway, StateDirectory\n"
        "state = StateDirectory.take(sys.argv[1])\n"
        "state.announce(RunningGateway(1, ('http://127.0.0.1:1',), (), None))\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 9
    with pytest.raises(StateError, match="no gateway runs on"):
        StateDirectory(str(tmp_path)).running()
    StateDirectory.take(str(tmp_path)).release()


def test_a_full_disk_keeps_nobody_from_the_lock_and_the_process_is_named_again_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lock").write_text("123456789\n")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        StateDirectory.take(str(tmp_path)).release()
    state = StateDirectory.take(str(tmp_path))
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    state.release()


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    StateDirectory.take(str(tmp_path / "a" / "b")).release()
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_a_directory_that_cannot_be_made_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="Not a directory; give a directory that this user may write"):
        StateDirectory.take(str(tmp_path / "file" / "state"))


def test_the_password_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    state = StateDirectory.take(str(tmp_path))
    password = state.ensure_password()
    assert len(password) >= 24
    assert state.ensure_password() == password == StateDirectory(str(tmp_path)).read_password()
    assert stat.S_IMODE((tmp_path / "admin-password").stat().st_mode) == 0o600
    state.release()


def test_a_password_that_the_operator_wrote_is_kept(tmp_path: Path) -> None:
    (tmp_path / "admin-password").write_text("chosen by hand\nanother line\n")
    state = StateDirectory.take(str(tmp_path))
    assert state.ensure_password() == "chosen by hand"
    state.release()


def test_an_empty_password_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "admin-password").write_text("\n")
    state = StateDirectory.take(str(tmp_path))
    with pytest.raises(StateError, match="is empty"):
        state.ensure_password()
    state.release()


def test_commands_find_a_running_gateway_and_only_a_running_one(tmp_path: Path) -> None:
    state = StateDirectory.take(str(tmp_path))
    with pytest.raises(StateError, match="vdi-gateway serve --state-dir"):
        StateDirectory(str(tmp_path)).running()
    state.announce(RUNNING)
    assert StateDirectory(str(tmp_path)).running() == RUNNING
    state.release()
    with pytest.raises(StateError, match="no gateway runs on"):
        StateDirectory(str(tmp_path)).running()
