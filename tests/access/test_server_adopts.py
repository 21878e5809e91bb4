"""Leases of clients that outlived their gateway: the next one adopts them, if they hold what they say."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.access.protocol import Adopted, Announce, Granted, Open, Revoke
from gateway.access.server import AccessServer
from gateway.core.errors import XenAPIError
from gateway.core.leases import Leases
from gateway.core.limits import Limits
from gateway.core.records import VDI
from gateway.images.files import identity_of
from tests.access.conftest import Room, Talk, opened, refused


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
