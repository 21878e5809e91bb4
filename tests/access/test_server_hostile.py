"""Bytes and descriptors from somebody hostile: a refusal or a close, and nothing stays open."""

import errno
import os
import socket
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.access.holding import Holds
from gateway.access.protocol import Announce, Open, encode
from gateway.access.server import AccessServer
from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.core.records import VDI
from tests.access.conftest import Room, Talk, open_files, opened, refused


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300)
    | st.builds(
        lambda head, tail: encode(Open("x", True, "test", None))[:head] + tail,
        st.integers(0, 60),
        st.binary(),
    ),
    descriptors=st.integers(0, 3),
)
def test_any_bytes_end_in_a_refusal_or_a_close_and_leave_nothing_open(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, descriptors: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def talk_to_it() -> None:
        nobody = cast("Any", Nobody())
        server = AccessServer(
            nobody,
            nobody,
            nobody,
            Limits(),
            administrator="root",
            holds=Holds(),
            nbd=nobody,
            refusals=nobody,
        )
        here, there = socket.socketpair()
        null = os.open("/dev/null", os.O_RDONLY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, trio.socket.from_stdlib_socket(there))
            talk = Talk(here)
            try:
                if data:
                    await talk.send(data, [null] * descriptors)
                talk.socket.shutdown(socket.SHUT_WR)
                with trio.fail_after(5):
                    told = await talk.receive()
                    if told is not None:
                        assert refused(told).code in {"VALUE_NOT_SUPPORTED", "UUID_INVALID"}
                        assert await talk.receive() is None
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                os.close(null)
                talk.close()

    trio.run(talk_to_it)
    assert len(os.listdir("/proc/self/fd")) == before


class Nobody:
    """An inventory without VDIs, and sessions of nobody."""

    def on_end(self, _call: object) -> None:
        pass

    @property
    def records(self) -> "Nobody":
        return self

    vdis = records

    def by_uuid(self, uuid: str) -> VDI:
        raise XenAPIError("UUID_INVALID", "VDI", uuid)


async def test_bytes_that_are_no_message_end_a_lease(room: Room, tmp_path: Path) -> None:
    vdi = await room.vdi()
    talk = await opened(room, vdi)
    await talk.send(b"\xff\xff\xff\xff")
    await room.until(lambda: not room.operations(vdi))
    talk.close()
    await room.until(lambda: not open_files(tmp_path))


async def test_a_descriptor_whose_close_does_not_end_holds_up_nobody(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client can make a file system that answers no close."""
    vdi = await room.vdi()
    stuck = tmp_path / "on a file system that answers nobody"
    stuck.touch()
    close, begun, goes_on = os.close, threading.Event(), threading.Event()

    def closing(fd: int) -> None:
        if os.fstat(fd).st_ino == stuck.stat().st_ino:
            begun.set()
            assert goes_on.wait(20)
        close(fd)

    descriptor = os.open(stuck, os.O_RDONLY)
    monkeypatch.setattr(os, "close", closing)
    try:
        for first in (
            b"\xff\xff\xff\xff",
            encode(Announce(vdi.uuid, False, "test", None, "", None, 0, 0, ())),
        ):
            hostile = room.connect()
            await hostile.send(first, [descriptor])
            assert refused(await hostile.receive()).code in {"VALUE_NOT_SUPPORTED", "OPERATION_NOT_ALLOWED"}
            await room.until(begun.is_set)
            begun.clear()
        (await opened(room, vdi)).close()
    finally:
        goes_on.set()
        close(descriptor)


async def test_a_descriptor_that_can_not_be_closed_well_ends_its_connection_alone(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi = await room.vdi()
    bad = tmp_path / "on a network file system that is full"
    bad.touch()
    close, failed = os.close, []

    def closing(fd: int) -> None:
        is_bad = os.fstat(fd).st_ino == bad.stat().st_ino
        close(fd)
        if is_bad:
            failed.append(fd)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    descriptor = os.open(bad, os.O_RDONLY)
    monkeypatch.setattr(os, "close", closing)
    hostile = room.connect()
    await hostile.send(encode(Open(vdi.uuid, False, "test", None)), [descriptor] * 2)
    assert refused(await hostile.receive()).code == "VALUE_NOT_SUPPORTED"
    assert await hostile.receive() is None
    await room.until(lambda: len(failed) == 2)
    close(descriptor)
    (await opened(room, vdi)).close()
