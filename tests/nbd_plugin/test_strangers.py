"""Clients that nobody knows: names that are no exports, and more connections than there is room for."""

import json
import socket
import struct
from pathlib import Path

import pytest

from nbd_plugin.connections import COUNT_PAUSE_SECONDS, Room
from nbd_plugin.export import Parameters
from nbd_plugin.supervisor_repeats import MOST_KINDS, OTHERS, Repeats
from tests.nbd_plugin.supervised import Supervised

GO, EXPORT_NAME = 7, 1
ERR_UNKNOWN, ERR_INVALID = (1 << 31) + 6, (1 << 31) + 3


def answer_to(port: int, name: bytes) -> int:
    """The type of the reply to NBD_OPT_GO."""
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(struct.pack(">I", 1) + b"IHAVEOPT" + struct.pack(">II", GO, len(data)) + data)
        with client.makefile("rb") as stream:
            assert stream.read(8) == b"NBDMAGIC"
            stream.read(10)
            _, _, kind, _ = struct.unpack(">QIII", stream.read(20))
            assert isinstance(kind, int)
            return kind


def test_names_that_are_no_exports_are_refused_and_leave_one_harmless_line_each(tmp_path: Path) -> None:
    names = {
        b"\xff\xfe": "the export name is no UTF-8",
        b"a" * 4096: "the export name is too long",
        b"a\nnbdkit: error: forged": "the export name has characters that no VDI's has",
        b"\x1b[2J": "the export name has characters that no VDI's has",
        b"": "the export name does not begin with the uuid of a VDI",
        b"0" * 8 + b"-0000-0000-0000-000000000000": "the export name has no session_id",
        b"/x?session_id=OpaqueRef:secret": "the export name does not begin with the uuid of a VDI",
    }
    with Supervised(tmp_path, plugin=None) as supervisor:
        assert [answer_to(supervisor.port, name) for name in names] == [ERR_UNKNOWN] * len(names)
        assert answer_to(supervisor.port, b"a" * 4097) == ERR_INVALID
        assert answer_to(supervisor.port, b"a\0b") == ERR_INVALID
        assert supervisor.stop() == 0
        lines = [json.loads(line) for line in supervisor.log().splitlines()]
    said = [line for line in lines if line["event"] == "nbdkit says"]
    reasons = list(dict.fromkeys(names.values()))
    assert len(said) == len(reasons) + 2
    for line, reason in zip(said, reasons, strict=False):
        assert reason in line["line"]
    again = [(line["line"], line["times"]) for line in lines if line["event"] == "nbdkit has said this again"]
    assert [times for _, times in again] == [1, 1]
    assert {line["level"] for line in lines} == {"info"}
    assert "forged" not in supervisor.log()
    assert "secret" not in supervisor.log()


def test_what_comes_again_and_again_is_counted_and_told_once_a_minute() -> None:
    repeats = Repeats()
    line = "nbdkit: python[{}]: error: too many clients are connected"
    assert [repeats.is_first(line.format(number), "info", 0.0) for number in (1, 2, 3)] == [
        True,
        False,
        False,
    ]
    assert repeats.is_first("something else[1]", "error", 10.0)
    assert repeats.due == 60.0
    assert repeats.counted(59.9) == []
    assert repeats.counted(60.0) == [(line.format(1), "info", 2)]
    # Within the minute after what was told nothing but the count is, either.
    assert not repeats.is_first(line.format(4), "info", 60.0)
    assert repeats.counted(119.0) == []
    assert repeats.counted(120.0) == [(line.format(1), "info", 1)]
    assert repeats.counted(180.0) == []
    assert repeats.due is None
    assert repeats.is_first(line.format(5), "info", 200.0)


def test_what_the_threads_of_a_connection_say_is_the_same() -> None:
    repeats = Repeats()
    line = "nbdkit: python.{}: error: No space left on device"
    assert [repeats.is_first(line.format(number), "error", 0.0) for number in (0, 3)] == [True, False]


def test_lines_that_are_all_different_are_bounded_too() -> None:
    repeats = Repeats()
    told = sum(
        repeats.is_first(f"unknown option version {number:x}", "info", 0.0) for number in range(10_000)
    )
    assert told == MOST_KINDS + 1
    errors = ("no space left", "input/output error", "no space left")
    assert [repeats.is_first(line, "error", 0.0) for line in errors] == [True, True, False]
    assert repeats.counted(60.0) == [(OTHERS, "info", 10_000 - told), ("no space left", "error", 1)]


class Counted:
    def __init__(self) -> None:
        self.clients = 0
        self.counts = 0
        self.time = 0.0

    def __call__(self) -> int:
        self.counts += 1
        return self.clients

    def come(self, room: Room, limit: int) -> bool:
        """One more client; it goes again if there is no room."""
        self.clients += 1
        let_in = room.is_there(limit)
        self.clients -= not let_in
        return let_in


def test_room_is_counted_only_when_it_may_be_full_and_not_again_at_once() -> None:
    counted = Counted()
    room = Room(counted, lambda: counted.time)
    assert [counted.come(room, 3) for _ in range(4)] == [True, True, True, False]
    assert counted.counts == 1
    assert not any(counted.come(room, 3) for _ in range(1000))
    assert counted.counts == 1
    counted.clients = 1
    counted.time += COUNT_PAUSE_SECONDS
    assert [counted.come(room, 3) for _ in range(3)] == [True, True, False]
    assert counted.counts == 2


@pytest.mark.parametrize("key", ["clients", "handshake", "wait"])
@pytest.mark.parametrize("value", ["-1", "many", "nan", "inf", ""])
def test_numbers_are_checked_when_nbdkit_starts(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is a number from 0 on"):
        Parameters().with_value(key, value)
    assert getattr(Parameters().with_value(key, "7"), key) == 7
