import socket
import threading
from pathlib import Path

import pytest

from gateway.access import client_link
from gateway.access.client_link import ClientLink


@pytest.fixture
def full(tmp_path: Path) -> socket.socket:
    """A socket that listens, and whose queue has room for nobody else."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "access.sock"))
    listening.listen(0)
    return listening


def test_who_finds_the_queue_full_waits_until_there_is_room(full: socket.socket, tmp_path: Path) -> None:
    path = str(tmp_path / "access.sock")
    first = ClientLink.connect(path)
    found: list[ClientLink | OSError] = []

    def connect() -> None:
        try:
            found.append(ClientLink.connect(path))
        except OSError as error:
            found.append(error)

    waiting = threading.Thread(target=connect)
    waiting.start()
    # Long enough for a refusal, if there were one.
    waiting.join(0.2)
    assert found == []
    accepted = [full.accept()[0] for _ in range(2)]
    waiting.join(20)
    [second] = found
    assert isinstance(second, ClientLink)
    for link in (first, second):
        link.close()
    for each in (*accepted, full):
        each.close()


def test_a_gateway_whose_queue_stays_full_is_as_good_as_none(
    full: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_link, "ANSWER_SECONDS", 1)
    first = ClientLink.connect(str(tmp_path / "access.sock"))
    with pytest.raises(TimeoutError):
        ClientLink.connect(str(tmp_path / "access.sock"))
    first.close()
    full.close()
