"""An estate with the real records, tasks and lease table, and sessions that are known beforehand.

A session's reference is the wire name of its role: `await site.call("VDI.get_all", "vm-admin")`.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from gateway.core.current_operations import CurrentOperations
from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.leases import Leases
from gateway.core.nbd_service import NbdDoor
from gateway.core.records import Records
from gateway.core.refusals import Refusals
from gateway.core.roles import Permission, Role
from gateway.core.sessions import Credentials, Identity, Session
from gateway.core.tasks import Tasks
from gateway.core.users import Users
from gateway.repository.inventory import Inventory
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.dispatch import Api, Caller
from gateway.xenapi.estate import Estate

CALLER = Caller("192.0.2.1", "https")
ADMIN = Role.POOL_ADMIN.wire_name
MIB = 1 << 20


@dataclass
class KnownSessions:
    """Sessions whose references are roles, and whose users are called like their role."""

    asked: list[Permission] = field(default_factory=list)

    async def authorize(self, credentials: Credentials, permission: Permission) -> Identity:
        self.asked.append(permission)
        assert credentials.session_ref is not None
        if credentials.session_ref not in {role.wire_name for role in Role}:
            raise XenAPIError("SESSION_INVALID", credentials.session_ref)
        role = Role.from_wire(credentials.session_ref)
        permission.check(role)
        return Identity(user=role.wire_name, role=role, session=None)

    def get(self, ref: str) -> Session:
        raise XenAPIError("SESSION_INVALID", ref)

    def all(self) -> list[Session]:
        return []

    @contextmanager
    def in_use(self, session: Session | str) -> Iterator[None]:
        yield


class RecordedInventory:
    """Remembers what it was asked for, and answers what the test prepared."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answer: Any = "OpaqueRef:answer"
        self.before: Callable[[], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        async def method(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((name, arguments, keywords))
            if self.before is not None:
                await self.before()
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

        return method


@dataclass
class Site:
    api: Api
    estate: Estate
    events: Events
    inventory: RecordedInventory
    sessions: KnownSessions

    async def call(self, name: str, *params: Any) -> Any:
        return await self.api.call(name, list(params), CALLER)


@asynccontextmanager
async def open_site(path: Path, events: Events | None = None) -> AsyncIterator[Site]:
    database = await Database.open(str(path / "gateway.sqlite3"))
    try:
        events = events or Events()
        records = await Records.load(database, events, host_name="gateway.test", address="192.0.2.7")
        tasks = await Tasks.load(database, events, resident_on=records.this_host.ref)
        inventory, sessions = RecordedInventory(), KnownSessions()
        estate = Estate(
            users=await Users.load(database),
            events=events,
            operations=CurrentOperations(events),
            nbd=await NbdDoor.load(database, events, records.this_host),
            refusals=Refusals(events),
            records=records,
            tasks=tasks,
            sessions=cast("Any", sessions),
            inventory=cast("Any", inventory),
            leases=Leases(changed=lambda vdi: events.publish("VDI", "mod", vdi)),
        )
        async with trio.open_nursery() as nursery:
            yield Site(Api(estate, nursery, CLASSES), estate, events, inventory, sessions)
            nursery.cancel_scope.cancel()
    finally:
        await database.aclose()


@asynccontextmanager
async def with_inventory(site: Site) -> AsyncIterator[Site]:
    """The site with a real inventory."""
    estate = site.estate
    async with Inventory.open(estate.records, estate.leases, site.events, who="test") as inventory:
        async with trio.open_nursery() as nursery:
            yield replace(site, api=Api(replace(estate, inventory=inventory), nursery, CLASSES))
            nursery.cancel_scope.cancel()


def inventory_of(site: Site) -> Inventory:
    return site.api._estate.inventory


async def sr_of(site: Site, path: Path) -> str:
    host = site.estate.records.this_host.ref
    device_config = {"location": str(path)}
    sr: str = await site.call(
        "SR.create", ADMIN, host, device_config, "0", "local", "disks", "file", "user", False, {"a": "b"}
    )
    return sr


async def vdi_of(site: Site, sr: str, **more: Any) -> str:
    record = {"SR": sr, "virtual_size": str(3 * MIB), "name_label": "disk", **more}
    vdi: str = await site.call("VDI.create", ADMIN, record)
    return vdi


async def refusal(site: Site, name: str, *params: Any) -> list[str]:
    with pytest.raises(XenAPIError) as refused:
        await site.call(name, *params)
    return refused.value.error_info
