"""Disks opened through the server: with which files, under which task, and how they are asked back."""

import os

import pytest
import structlog

from gateway.access.protocol import Closed, Granted, Moved, Open, Revoke, Working
from gateway.core.errors import XenAPIError
from gateway.core.roles import Role
from gateway.core.tasks import TaskStatus
from gateway.images.files import identity_of
from tests.access.conftest import Room, ended, opened, refused


async def test_a_disk_is_opened_with_the_descriptors_of_its_chain(room: Room) -> None:
    vdi = await room.vdi()
    talk = await opened(room, vdi)
    assert [identity_of(fd).inode for fd in talk.fds] == [
        os.stat(room.inventory.repository_of(vdi).image_path(vdi.uuid)).st_ino
    ]
    assert list(room.operations(vdi).values()) == ["read"]
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await room.inventory.vdi_destroy(vdi.ref)
    await ended(talk)
    await room.until(lambda: not room.operations(vdi))
    await room.inventory.vdi_destroy(vdi.ref)


async def test_a_writer_is_alone_and_makes_a_new_content(room: Room) -> None:
    vdi = await room.vdi()
    talk = await opened(room, vdi, write=True)
    during = room.inventory.records.vdis.get(vdi.ref).content_id
    assert during != vdi.content_id
    for write in (True, False):
        other = room.connect()
        await other.send(Open(vdi.uuid, write, "test", None))
        error = refused(await other.receive())
        assert error.code == "VDI_IN_USE"
        assert f"write by root (test, process {os.getpid()})" in error.params[1]
        assert await other.receive() is None
    await talk.send(Closed())
    await ended(talk)
    await room.until(lambda: not room.operations(vdi))
    assert room.inventory.records.vdis.get(vdi.ref).content_id not in {vdi.content_id, during}


async def test_a_task_begins_with_the_first_bytes_and_succeeds_with_the_closing(room: Room) -> None:
    talk = await opened(room, await room.vdi())
    assert room.tasks.all() == []
    await talk.send(Moved(512, 0))
    working = await talk.receive()
    assert isinstance(working, Working)
    await talk.send(Moved(1024, 5))
    await talk.send(Closed())
    await ended(talk)
    await room.until(lambda: room.tasks.get(working.task).status is TaskStatus.SUCCESS)
    assert room.tasks.get(working.task).result == "1024 bytes read, 5 bytes written"


async def test_the_task_of_a_client_that_dies_is_cancelled(room: Room) -> None:
    talk = await opened(room, await room.vdi())
    await talk.send(Moved(512, 0))
    working = await talk.receive()
    assert isinstance(working, Working)
    await ended(talk)
    await room.until(lambda: room.tasks.get(working.task).status is TaskStatus.CANCELLED)


async def test_cancelling_the_task_revokes_and_lasts_until_the_client_has_gone(room: Room) -> None:
    vdi = await room.vdi()
    talk = await opened(room, vdi)
    await talk.send(Moved(512, 0))
    working = await talk.receive()
    assert isinstance(working, Working)
    await room.until(lambda: room.operations(vdi) == {working.task: "read"})
    await room.tasks.cancel(working.task)
    assert isinstance(await talk.receive(), Revoke)
    assert room.tasks.get(working.task).status is TaskStatus.CANCELLING
    assert room.operations(vdi) == {working.task: "read"}
    await ended(talk)
    await room.until(lambda: room.tasks.get(working.task).status is TaskStatus.CANCELLED)
    assert not room.operations(vdi)


async def test_a_session_opens_what_its_role_allows_and_its_end_revokes(room: Room) -> None:
    vdi = await room.vdi()
    weak = room.connect()
    await weak.send(Open(vdi.uuid, False, "test", await room.session(Role.VM_OPERATOR)))
    assert refused(await weak.receive()).code == "RBAC_PERMISSION_DENIED"
    session = await room.session(Role.VM_ADMIN)
    talk = await opened(room, vdi, session=session)
    await room.sessions.logout(session)
    assert isinstance(await talk.receive(), Revoke)


async def test_a_task_says_who_moves_how_much_of_which_disk_and_how(room: Room) -> None:
    vdi = await room.vdi()
    await room.inventory.records.vdis.change(vdi.ref, name_label="a disk")
    session = await room.session(Role.VM_ADMIN)
    talk = room.connect()
    await talk.send(Open(vdi.uuid, True, "nbd", session))
    assert isinstance(await talk.receive(), Granted)
    await talk.send(Moved(512, 1 << 40))
    working = await talk.receive()
    assert isinstance(working, Working)
    task = await room.until(lambda: room.tasks.get(working.task))
    assert task.name_label == "nbd write"
    assert task.user == "vm-admin"
    assert task.name_description == (
        f"vm-admin (logged in at the test) writes to the VDI {vdi.uuid} 'a disk', process {os.getpid()}"
    )
    moved = {"bytes-read": "512", "bytes-written": str(1 << 40)}
    fixed = {"vdi": vdi.uuid, "mode": "rw", "process": str(os.getpid())}
    await room.until(lambda: room.tasks.get(task.ref).other_config == {**fixed, **moved})
    await room.tasks.edit(task.ref, lambda task: {"other_config": {**task.other_config, "a": "b"}})
    await talk.send(Moved(1024, 1 << 41))
    await talk.send(Closed())
    await ended(talk)
    await room.until(lambda: room.tasks.get(task.ref).status is TaskStatus.SUCCESS)
    moved = {"bytes-read": "1024", "bytes-written": str(1 << 41)}
    assert room.tasks.get(task.ref).other_config == {**fixed, "a": "b", **moved}


# Revocation


async def test_all_who_hold_a_disk_are_asked_for_it_and_nobody_else(room: Room) -> None:
    vdi, other = await room.vdi(), await room.vdi()
    readers = [await opened(room, vdi) for _ in range(2)]
    stranger = await opened(room, other)
    room.holds.revoke_vdi(vdi.ref, "for a reason")
    for reader in readers:
        assert await reader.receive() == Revoke("for a reason")
        await ended(reader)
    await room.until(lambda: not room.operations(vdi))
    assert list(room.operations(other).values()) == ["read"]
    assert stranger.messages == []


async def test_a_disk_that_is_not_given_up_stays_in_use_and_the_log_says_by_whom(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.access.holding.REVOKE_SECONDS", 0.01)
    vdi = await room.vdi()
    talk = await opened(room, vdi)
    with structlog.testing.capture_logs() as logs:
        room.holds.revoke_vdi(vdi.ref, "for a reason")
        warning = await room.until(lambda: [each for each in logs if each["log_level"] == "warning"])
        assert "nobody can be forced to give it up" in warning[0]["event"]
        assert (warning[0]["vdi"], warning[0]["process"]) == (vdi.uuid, os.getpid())
        assert list(room.operations(vdi).values()) == ["read"]
        await ended(talk)
        await room.until(lambda: "given up at last" in logs[-1]["event"])
    assert not room.operations(vdi)
