"""A server over a real inventory and real tasks in the test's own trio run; clients come by socketpair."""

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from gateway.access.holding import Holds
from gateway.access.protocol import (
    ANCILLARY_SPACE,
    Decoder,
    Granted,
    Message,
    Open,
    encode,
    pack_descriptors,
    unpack_descriptors,
)
from gateway.access.server import AccessServer
from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.leases import Leases
from gateway.core.limits import Limits
from gateway.core.nbd_service import NbdDoor
from gateway.core.peer import Peer
from gateway.core.records import VDI, Records
from gateway.core.refusals import Refusals
from gateway.core.roles import Role
from gateway.core.sessions import Sessions
from gateway.core.tasks import Tasks
from gateway.core.users import Users
from gateway.repository.inventory import Inventory

MIB = 1 << 20


class Talk:
    """The client's end of one connection, as bytes and descriptors."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = trio.socket.from_stdlib_socket(end)
        self.decoder = Decoder()
        self.messages: list[Message] = []
        self.fds: list[int] = []

    async def send(self, message: Message | bytes, fds: list[int] | None = None) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        await self.socket.sendmsg([data], pack_descriptors(fds) if fds else [])

    async def receive(self) -> Message | None:
        while not self.messages:
            data, ancillary, _, _ = await self.socket.recvmsg(16384, ANCILLARY_SPACE)
            self.fds += unpack_descriptors(ancillary)
            if not data:
                return None
            self.messages += self.decoder.feed(data)
        return self.messages.pop(0)

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


@dataclass
class Room:
    inventory: Inventory
    tasks: Tasks
    sessions: Sessions
    users: Users
    server: AccessServer
    nursery: trio.Nursery
    sr: str
    events: Events
    holds: Holds
    nbd: NbdDoor
    refusals: Refusals
    talks: list[Talk] = field(default_factory=list)

    def connect(self, server: AccessServer | None = None) -> Talk:
        here, there = socket.socketpair()
        self.nursery.start_soon((server or self.server).serve, trio.socket.from_stdlib_socket(there))
        talk = Talk(here)
        self.talks.append(talk)
        return talk

    async def vdi(self, image_format: str = "vhd") -> VDI:
        ref = await self.inventory.vdi_create(
            sr=self.sr, virtual_size=4 * MIB, sm_config={"image-format": image_format}
        )
        return self.inventory.records.vdis.get(ref)

    def operations(self, vdi: VDI) -> dict[str, str]:
        return self.inventory.leases.operations_for(vdi.ref)

    async def until(self, condition: Callable[[], Any]) -> Any:
        with trio.fail_after(20):
            while not (found := condition()):  # noqa: ASYNC110 - of things that tell nobody
                await trio.sleep(0.005)
        return found

    async def session(self, role: Role) -> str:
        if self.users.find(role.wire_name) is None:
            await self.users.create(role.wire_name, "right", role)
        return await self.sessions.login_trusted(role.wire_name, address="the test")


def open_files(directory: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
        if target.startswith(f"{directory}/sr"):
            found.append(target)
    return [name for name in found if "/.vdi-gateway/" not in name]


@asynccontextmanager
async def opened_room(directory: Path) -> AsyncIterator[Room]:
    limits = Limits(lease_wait=0.2, header_seconds=5)
    events = Events()
    database = await Database.open(str(directory / "gateway.sqlite3"))
    try:
        records = await Records.load(database, events)
        tasks = await Tasks.load(database, events, limits=limits)
        users = await Users.load(database)
        sessions = await Sessions.load(database, users, limits=limits)
        async with Inventory.open(records, Leases(limits), events, who="the test") as inventory:
            sr = await inventory.sr_create(name_label="SR", path=str(directory / "sr"))
            nbd, refusals = await NbdDoor.load(database, events, records.this_host), Refusals(events)
            holds = Holds()
            server = AccessServer(
                inventory,
                tasks,
                sessions,
                limits,
                administrator="root",
                holds=holds,
                nbd=nbd,
                refusals=refusals,
            )
            async with trio.open_nursery() as nursery:
                room = Room(
                    inventory, tasks, sessions, users, server, nursery, sr, events, holds, nbd, refusals
                )
                try:
                    yield room
                finally:
                    for talk in room.talks:
                        talk.close()
                    nursery.cancel_scope.cancel()
    finally:
        await database.aclose()


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    async with opened_room(tmp_path) as room:
        yield room
    assert open_files(tmp_path) == []


def refused(message: Message | None) -> XenAPIError:
    """The refusal that the message must be."""
    told = cast("Any", message)
    assert type(message).__name__ == "Refused", message
    return XenAPIError(told.code, *told.params)


async def opened(room: Room, vdi: VDI, *, write: bool = False, session: str | None = None) -> Talk:
    talk = room.connect()
    await talk.send(Open(vdi.uuid, write, "test", session))
    assert isinstance(await talk.receive(), Granted)
    return talk


async def ended(talk: Talk) -> None:
    talk.close()
    await trio.lowlevel.checkpoint()


def stranger(_: object) -> Peer:
    """The kernel's word when another user is at the other end."""
    return Peer(1, os.geteuid() + 4711)
