"""Gateways that don't read, or write nonsense, at the supervisor's control socket."""

import errno
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbd_plugin.supervisor_events import Events
from nbd_plugin.supervisor_links import Links
from nbd_plugin.supervisor_log import Log


class Control:
    """The control socket, and a gateway that is connected."""

    def __init__(self, path: Path) -> None:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen()
        self.events = Events()
        self.log = Log()
        self.orders: list[dict[str, Any]] = []
        self.listening = listening
        self.links = Links(
            listening, self.events, self.log, status=lambda: {"pid": 1}, obey=self.orders.append
        )
        self.gateway = socket.socket(socket.AF_UNIX)
        self.gateway.settimeout(30)
        self.gateway.connect(str(path))
        self.events.wait(30)
        assert len(self.links) == 1

    def received(self) -> bytes:
        """All until the end."""
        data = b""
        while piece := self.gateway.recv(1 << 16):
            data += piece
        return data


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    made = Control(tmp_path / "control.sock")
    yield made
    made.gateway.close()
    made.links.end()
    made.links.close()


def test_orders_are_obeyed_however_they_are_cut(control: Control) -> None:
    for piece in (b'{"do": "re', b'new", "tls": "/a"}\n{"do"', b': "stop"}\n[1]\n'):
        control.gateway.sendall(piece)
        control.events.wait(30)
    assert control.orders == [{"do": "renew", "tls": "/a"}, {"do": "stop"}]


@pytest.mark.parametrize("nonsense", [b"no JSON\n", b"\xff\n", b"[" * 60_000 + b"\n", b"x" * 70_000])
def test_who_writes_nonsense_is_disconnected(control: Control, nonsense: bytes) -> None:
    control.gateway.sendall(nonsense)
    while len(control.links):
        control.events.wait(30)
    assert control.orders == []


def test_a_gateway_that_ends_with_messages_unread_is_gone_and_no_fault(control: Control) -> None:
    """As one that was killed: the kernel tells that as a connection that was reset."""
    control.gateway.close()
    control.events.wait(30)
    assert len(control.links) == 0


def test_of_a_message_that_did_not_fit_nothing_follows(
    control: Control, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the beginning of one and the next would be read as one line."""
    control.log.info("much", line="x" * (4 << 20))
    control.log.info("next")
    first, *rest = control.received().splitlines()
    assert json.loads(first) == {"status": {"pid": 1}}
    assert len(rest) == 1
    assert b"next" not in rest[0]
    # Neither is lost.
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["much", "next"]
    control.events.wait(30)
    assert len(control.links) == 0


def test_for_whom_no_descriptor_is_left_waits_and_is_let_in_later(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def accept(_: socket.socket) -> Any:
        nonlocal tries
        tries += 1
        raise OSError(errno.EMFILE, "too many open files")

    address = control.listening.getsockname()
    with socket.socket(socket.AF_UNIX) as another:
        another.connect(address)
        with monkeypatch.context() as patched:
            patched.setattr(socket.socket, "accept", accept)
            control.events.wait(30)
            control.events.wait(0)
        assert tries == 1
        assert control.links.again_at is not None
        control.links.accept_again(0.0)
        control.events.wait(0)
        assert len(control.links) == 1
        control.links.accept_again(math.inf)
        control.events.wait(30)
        assert len(control.links) == 2
