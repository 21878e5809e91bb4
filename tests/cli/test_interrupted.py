"""Ctrl-C while the gateway answers a call: what it has made by then is told, named or gone."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.connection import Connection, DoorHTTPConnection
from gateway.cli.exchange import Exchange
from gateway.cli.main import run
from tests.conftest import RunningGateway


@pytest.fixture
def disk(house: RunningGateway, request: pytest.FixtureRequest) -> str:
    """The uuid of a new disk of 2 MiB."""
    return house.run("vdi-create", request.node.name[:100], "2MiB").stdout.strip()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, interrupted: str) -> None:
    """Ctrl-C comes when this call has been answered, and nobody has the answer yet."""
    call = Connection.call

    def calling(self: Connection, method: str, *parameters: Any) -> Any:
        answer = call(self, method, *parameters)
        if method == interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        return answer

    monkeypatch.setattr(Connection, "call", calling)


def test_no_task_stays_behind(
    house: RunningGateway, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(2 << 20))
    interrupt_at(monkeypatch, "task.create")
    for arguments in (
        ("vdi-import", disk, str(tmp_path / "raw")),
        ("vdi-export", disk, str(tmp_path / "out")),
    ):
        with pytest.raises(KeyboardInterrupt):
            house.run(*arguments)
    tasks = house.call("task.get_all_records").values()
    assert [task for task in tasks if task["status"] == "pending"] == []
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("command", "interrupted"),
    [
        (("vdi-copy", "DISK", "--name"), "VDI.get_physical_utilisation"),
        (("vdi-clone", "DISK", "--name"), "VDI.clone"),
        (("vdi-create", "--size", "2MiB", "--name"), "VDI.create"),
    ],
)
def test_what_is_there_is_told_and_has_its_name(
    house: RunningGateway,
    disk: str,
    *,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    interrupted: str,
) -> None:
    interrupt_at(monkeypatch, interrupted)
    label = f"made by {interrupted}"
    words = [disk if word == "DISK" else word for word in command]
    with pytest.raises(KeyboardInterrupt):
        run((*words, label, "--state-dir", str(house.state_dir)))
    [made] = house.call("VDI.get_by_name_label", label)
    if interrupted != "VDI.get_physical_utilisation":
        assert capsys.readouterr().out.strip() == house.call("VDI.get_uuid", made)


def test_a_session_ends_though_its_call_was_not_answered(
    house: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = DoorHTTPConnection.getresponse

    def receiving(self: DoorHTTPConnection) -> Any:
        answers.append("")
        if len(answers) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return receive(self)

    answers: list[str] = []
    monkeypatch.setattr(DoorHTTPConnection, "getresponse", receiving)
    with pytest.raises(KeyboardInterrupt):
        house.run("vdi-list")
    sessions = house.call("session.get_all_records").values()
    assert [each for each in sessions if each["originator"] == "vdi-gateway"] == []


def test_an_import_that_was_done_already_is_told(
    house: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = Exchange.rest

    def reading(self: Exchange, limit: int) -> bytes:
        line = rest(self, limit)
        os.kill(os.getpid(), signal.SIGINT)
        return line

    monkeypatch.setattr(Exchange, "rest", reading)
    (tmp_path / "made").write_bytes(os.urandom(2 << 20))
    with pytest.raises(KeyboardInterrupt):
        run(("vdi-import", str(tmp_path / "made"), "sr=disks", "--state-dir", str(house.state_dir)))
    [disk] = house.call("VDI.get_by_name_label", "made")
    uuid = house.call("VDI.get_uuid", disk)
    assert f"the import was done already; the new disk is {uuid}" in capsys.readouterr().err
