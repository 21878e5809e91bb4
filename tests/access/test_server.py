import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.access.holding import Holds
from gateway.access.protocol import (
    NAME_LENGTH,
    PAGE,
    Adopted,
    Announce,
    Closed,
    Granted,
    List,
    Listed,
    Moved,
    Open,
    Revoke,
    Working,
    encode,
)
from gateway.access.server import AccessServer
from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.core.limits import Limits
from gateway.core.nbd_service import NbdService
from gateway.core.peer import Peer
from gateway.core.records import VDI
from gateway.core.roles import Role
from gateway.core.tasks import TaskStatus
from gateway.images.files import identity_of
from tests.access.conftest import Room, Talk, open_files, refused


async def opened(room: Room, vdi: VDI, *, write: bool = False, session: str | None = None) -> Talk:
    talk = room.connect()
    await talk.send(Open(vdi.uuid, write, "test", session))
    assert isinstance(await talk.receive(), Granted)
    return talk


async def ended(talk: Talk) -> None:
    talk.close()
    await trio.lowlevel.checkpoint()


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


# Refusals


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


async def test_another_user_needs_a_session(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    vdi = await room.vdi()
    monkeypatch.setattr("gateway.access.server_link.peer_of", stranger)
    talk = room.connect()
    await talk.send(Open(vdi.uuid, False, "test", None))
    assert refused(await talk.receive()).code == "SESSION_AUTHENTICATION_FAILED"
    await opened(room, vdi, session=await room.session(Role.VM_ADMIN))


def stranger(_: object) -> Peer:
    """The kernel's word when another user is at the other end."""
    return Peer(1, os.geteuid() + 4711)


# Lists


async def listed(talk: Talk) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    while True:
        page = await talk.receive()
        assert isinstance(page, Listed), page
        found += page.vdis
        if page.last:
            assert await talk.receive() is None
            return found


async def test_all_vdis_are_listed_by_name_whatever_their_names_are(room: Room) -> None:
    talk = room.connect()
    await talk.send(List(None))
    assert await listed(talk) == []
    uuids = {}
    for number in range(PAGE * 2):
        vdi = await room.vdi()
        name = f"{number:02}" + "\U0001f4be" * 500
        await room.inventory.records.vdis.change(vdi.ref, name_label=name)
        uuids[vdi.uuid] = name[:NAME_LENGTH]
    talk = room.connect()
    await talk.send(List(None))
    assert await listed(talk) == list(uuids.items())


async def test_what_nobody_could_open_is_not_listed(room: Room) -> None:
    vdi, gone = await room.vdi(), await room.vdi()
    await room.inventory.vdi_snapshot(vdi.ref, who="the test")
    hidden = [one.uuid for one in room.inventory.records.vdis.all() if not one.managed]
    await room.inventory.records.vdis.change(gone.ref, missing=True)
    talk = room.connect()
    await talk.send(List(None))
    shown = {uuid for uuid, _ in await listed(talk)}
    assert len(shown) == 2 and vdi.uuid in shown
    assert len(hidden) <= 1 and not shown & {gone.uuid, *hidden}
    for pbd in room.inventory.records.pbds.all():
        await room.inventory.pbd_unplug(pbd.ref)
    talk = room.connect()
    await talk.send(List(None))
    assert await listed(talk) == []


async def test_a_list_takes_the_role_that_opening_takes(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    vdi = await room.vdi()
    monkeypatch.setattr("gateway.access.server_link.peer_of", stranger)
    for session, code in (
        (None, "SESSION_AUTHENTICATION_FAILED"),
        ("OpaqueRef:no-session", "SESSION_INVALID"),
        (await room.session(Role.VM_OPERATOR), "RBAC_PERMISSION_DENIED"),
    ):
        talk = room.connect()
        await talk.send(List(session))
        assert refused(await talk.receive()).code == code
    talk = room.connect()
    await talk.send(List(await room.session(Role.VM_ADMIN)))
    assert [uuid for uuid, _ in await listed(talk)] == [vdi.uuid]


# After a restart


def restarted(room: Room) -> AccessServer:
    """A server with an empty lease table over the same records."""
    limits = Limits(lease_wait=0.05)
    leases = Leases(limits)
    room.inventory.leases = leases  # type: ignore[misc]  # the one that is gone knew of the lease
    for repository in room.inventory._attached.values():
        repository._leases = leases
    return AccessServer(
        room.inventory,
        room.tasks,
        room.sessions,
        limits,
        administrator="root",
        holds=room.holds,
        nbd=room.nbd,
        refusals=room.refusals,
    )


def announcement(vdi: VDI, talk: Talk, *, write: bool = False, task: str | None = None) -> Announce:
    files = tuple(identity_of(fd) for fd in talk.fds)
    return Announce(vdi.uuid, write, "test", None, "lease", task, 7, 0, files)


@pytest.mark.parametrize("write", [False, True])
async def test_an_announced_lease_is_in_the_table_again(room: Room, write: bool) -> None:
    vdi = await room.vdi()
    before = await opened(room, vdi, write=write)
    server = restarted(room)
    talk = room.connect(server)
    task = await room.tasks.create("write", user="root", client_made=False)
    await talk.send(announcement(vdi, before, write=write, task=task.ref), before.fds)
    assert isinstance(await talk.receive(), Adopted)
    await room.until(lambda: room.operations(vdi) == {task.ref: "write" if write else "read"})
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await room.inventory.vdi_destroy(vdi.ref)
    await room.tasks.cancel(task.ref)
    assert isinstance(await talk.receive(), Revoke)


async def test_a_task_that_was_cancelled_meanwhile_ends_the_lease(room: Room) -> None:
    vdi = await room.vdi()
    before = await opened(room, vdi)
    talk = room.connect(restarted(room))
    task = await room.tasks.create("read", user="root", client_made=False)
    await room.tasks.cancel(task.ref)
    await talk.send(announcement(vdi, before, task=task.ref), before.fds)
    assert refused(await talk.receive()).code == "TASK_CANCELLED"
    assert not room.operations(vdi)


async def test_an_announcement_is_believed_only_with_the_descriptors(room: Room, tmp_path: Path) -> None:
    vdi, other = await room.vdi(), await room.vdi()
    before, stranger = await opened(room, vdi), await opened(room, other)
    server = restarted(room)
    right = announcement(vdi, before)
    path = os.open(room.inventory.repository_of(vdi).image_path(vdi.uuid), os.O_PATH)
    pipe, pipe_end = os.pipe()
    try:
        for told, fds in (
            (right, []),
            (right, stranger.fds),
            (right, [*before.fds, *before.fds]),
            (right, [path]),
            (replace(right, write=True), before.fds),
            (replace(right, files=()), []),
            (replace(right, files=(identity_of(pipe),)), [pipe]),
            (replace(announcement(vdi, stranger), write=True), stranger.fds),
        ):
            talk = room.connect(server)
            await talk.send(told, fds)
            assert refused(await talk.receive()).code == "OPERATION_NOT_ALLOWED"
            assert not room.operations(vdi)
    finally:
        for fd in (path, pipe, pipe_end):
            os.close(fd)


async def test_who_lost_the_locks_is_not_adopted(room: Room) -> None:
    vdi = await room.vdi("raw")
    server = restarted(room)
    lease_path = room.inventory.repository_of(vdi).image_path(vdi.uuid)
    talk, never_locked = room.connect(server), room.connect(server)
    await talk.send(Open(vdi.uuid, True, "test", None))
    assert isinstance(await talk.receive(), Granted)
    fd = os.open(lease_path, os.O_RDONLY)
    try:
        told = Announce(vdi.uuid, False, "test", None, "lease", None, 0, 0, (identity_of(fd),))
        await never_locked.send(told, [fd])
        assert refused(await never_locked.receive()).code == "VDI_IN_USE"
    finally:
        os.close(fd)


# Hostile bytes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
