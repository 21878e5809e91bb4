"""When a worker that drains ends: after the last client, however long that stays."""

import os
import signal
import socket

import pytest

from nbd_plugin import leash


@pytest.mark.parametrize("order", [b"drain", b""])
def test_a_worker_that_drains_stays_while_somebody_is_there_or_nobody_can_look(
    monkeypatch: pytest.MonkeyPatch, order: bytes
) -> None:
    found: list[int | OSError] = [1, OSError("no descriptor is left"), 1, 0]
    signals: list[tuple[int, int]] = []

    def count() -> int:
        number = found.pop(0)
        if isinstance(number, OSError):
            raise number
        return number

    monkeypatch.setattr(leash, "count_clients", count)
    monkeypatch.setattr(leash, "stop_listening", lambda: None)
    for pause in ("IDLE_SECONDS", "GREETING_SECONDS"):
        monkeypatch.setattr(leash, pause, 0.0)
    for pause in ("_LOOK_SECONDS", "_LOOK_AT_CLIENTS_SECONDS"):
        monkeypatch.setattr(leash, pause, 0.01)
    monkeypatch.setattr(os, "kill", lambda *given: signals.append(given))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if order:
            ours.send(order)
        else:
            ours.shutdown(socket.SHUT_WR)  # as when the supervisor has died
        leash._obey(theirs)
        assert [ours.recv(64) for _ in range(2)] == [b"ready", b"draining"]
    assert found == []
    assert signals == [(os.getpid(), signal.SIGTERM)]
