"""Why a disk is refused: it is told to who asked, and with the disk, but never a secret."""

import os
from typing import Any

import pytest
import structlog
import trio

from gateway.access.protocol import Closed, Granted, Open, Revoke
from gateway.core.leases import Holder, Lease, LeaseMode
from gateway.core.limits import Limits
from gateway.core.nbd_service import NbdService
from gateway.core.roles import Role
from tests.access.conftest import Room, ended, opened, refused, stranger


@pytest.mark.parametrize("held", [True, False])
async def test_why_a_disk_was_refused_is_told_with_the_disk(room: Room, held: bool) -> None:
    """A second writer, and a writer among readers."""
    vdi = await room.vdi()
    await opened(room, vdi, write=held)
    before = room.events.counter
    assert room.refusals.last(vdi.ref) == ""
    talk = room.connect()
    await talk.send(Open(vdi.uuid, True, "nbd", None))
    refused(await talk.receive())
    told = room.refusals.last(vdi.ref)
    holder = f"{'write' if held else 'read'} by root (test, process {os.getpid()})"
    assert f"writing by root (nbd, process {os.getpid()}): VDI_IN_USE: " in told
    assert holder in told
    changes = room.events.since(before) or []
    assert ("VDI", "mod", vdi.ref) in {(event.class_name, event.operation, event.ref) for event in changes}


async def test_a_disk_that_is_coalesced_is_refused_with_the_time_that_is_left(room: Room) -> None:
    vdi = await room.vdi()
    path = room.inventory.repository_of(vdi).image_path(vdi.uuid)
    coalesce = Holder("the gateway", "coalesce", vdi.ref)
    until = trio.current_time() + 60
    async with room.inventory.leases.hold(path, LeaseMode.WRITE, coalesce, until=until):
        talk = room.connect()
        await talk.send(Open(vdi.uuid, False, "nbd", None))
        assert refused(await talk.receive()).code == "OTHER_OPERATION_IN_PROGRESS"
    assert "coalesce by the gateway, at most" in room.refusals.last(vdi.ref)


async def test_who_holds_a_disk_under_a_session_is_told_with_the_address_it_came_from(room: Room) -> None:
    vdi = await room.vdi()
    await opened(room, vdi, session=await room.session(Role.VM_ADMIN))
    [holder] = room.inventory.leases.holders_for(vdi.ref)
    assert holder.who == f"vm-admin at the test (test, process {os.getpid()})"


async def test_a_refused_session_is_told_without_its_secret(room: Room) -> None:
    vdi = await room.vdi()
    talk = room.connect()
    with structlog.testing.capture_logs() as logs:
        await talk.send(Open(vdi.uuid, False, "nbd", "OpaqueRef:a-secret"))
        refused(await talk.receive())
    assert "reading by somebody (nbd" in room.refusals.last(vdi.ref)
    assert "SESSION_INVALID" in room.refusals.last(vdi.ref)
    assert [each["error"] for each in logs] == ["SESSION_INVALID"]
    assert "secret" not in room.refusals.last(vdi.ref) + str(logs)


async def test_a_switch_keeps_those_out_who_come_with_a_session_over_nbd(room: Room) -> None:
    vdi = await room.vdi()
    session = await room.session(Role.VM_ADMIN)
    room.nbd.serve(NbdService(("192.0.2.7",), 10809))
    await room.nbd.remove_purpose("insecure_nbd")
    talk = room.connect()
    await talk.send(Open(vdi.uuid, False, "nbd", session))
    assert refused(await talk.receive()).code == "OPERATION_NOT_ALLOWED"
    assert "NBD is switched off" in room.refusals.last(vdi.ref)
    for purpose, who in (("nbd", None), ("other", session)):
        talk = room.connect()
        await talk.send(Open(vdi.uuid, False, purpose, who))
        assert isinstance(await talk.receive(), Granted)
    await room.nbd.add_purpose("insecure_nbd")
    talk = room.connect()
    await talk.send(Open(vdi.uuid, False, "nbd", session))
    assert isinstance(await talk.receive(), Granted)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (Open("00000000-0000-4000-8000-000000000000", False, "test", None), "UUID_INVALID"),
        (Open("../../etc/passwd", True, "test", None), "UUID_INVALID"),
        (Open("x", False, "test", "OpaqueRef:no-session"), "SESSION_INVALID"),
        (Closed(), "VALUE_NOT_SUPPORTED"),
    ],
)
async def test_a_refusal_says_why_and_ends_the_connection(
    room: Room, asked: Open | Closed, code: str
) -> None:
    talk = room.connect()
    await talk.send(asked)
    assert refused(await talk.receive()).code == code
    assert await talk.receive() is None


async def test_one_connection_too_many_is_refused_until_another_has_ended(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.server, "_limits", Limits(connections=1))
    vdi = await room.vdi()
    talk = await opened(room, vdi)
    other = room.connect()
    assert refused(await other.receive()).code == "TOO_MANY_TRANSFERS"
    assert await other.receive() is None
    await ended(talk)
    await room.until(lambda: not room.nursery.child_tasks)
    await opened(room, vdi)


async def test_a_session_that_ends_while_its_disk_is_opened_does_not_keep_it(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi, session = await room.vdi(), await room.session(Role.VM_ADMIN)
    take = room.inventory.lease

    async def logged_out_meanwhile(*asked: Any) -> Lease:
        await room.sessions.logout(session)
        return await take(*asked)

    monkeypatch.setattr(room.inventory, "lease", logged_out_meanwhile)
    talk = await opened(room, vdi, session=session)
    assert await talk.receive() == Revoke("its session has ended")


async def test_another_user_needs_a_session(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    vdi = await room.vdi()
    monkeypatch.setattr("gateway.access.server_link.peer_of", stranger)
    talk = room.connect()
    await talk.send(Open(vdi.uuid, False, "test", None))
    assert refused(await talk.receive()).code == "SESSION_AUTHENTICATION_FAILED"
    await opened(room, vdi, session=await room.session(Role.VM_ADMIN))
