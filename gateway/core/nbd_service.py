"""Where this gateway serves NBD, and whether an administrator lets it: what the API tells of its network.

The app says what is served once clients are answered (`NbdDoor.serve`); the doors only read it. Whether NBD
may be used outlives a restart. XenServer keeps that on a network; here it is one network for all, which is
this machine's, so its references are made of the host's uuid.
"""

import uuid as uuids
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, delete, insert, select

from gateway.core import schema
from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.records import Host
from gateway.core.refs import REF_PREFIX

SECURE: Final = "nbd"
INSECURE: Final = "insecure_nbd"

# The row of the settings that is there while NBD is switched off.
_SWITCHED_OFF: Final = "nbd_switched_off"


@dataclass(frozen=True, slots=True)
class NbdService:
    """An NBD server that answers: at each of `addresses` (IPv4, IPv6 without brackets, or a name) and `port`.

    `certificate` is what the server sends, as PEM; None: it speaks without TLS. `subject` is a name of the
    certificate that clients may verify, or the host's name.
    """

    addresses: tuple[str, ...]
    port: int
    certificate: str | None = None
    subject: str = ""

    @property
    def purpose(self) -> str:
        """XenAPI's word for such a service."""
        return INSECURE if self.certificate is None else SECURE


@dataclass(frozen=True, slots=True)
class Named:
    """The name of an object that is made of another one's uuid."""

    ref: str
    uuid: str


class NbdDoor:
    """The NBD service of this gateway as others see it. Made by `NbdDoor.load`."""

    def __init__(self, database: Database, events: Events, host: Host, *, switched_off: bool) -> None:
        self.host: Final = host.ref
        self.network: Final = _named(host, "network")
        self.interface: Final = _named(host, "PIF")
        self._database = database
        self._events = events
        self._switched_off = switched_off
        self._service: NbdService | None = None

    @classmethod
    async def load(cls, database: Database, events: Events, host: Host) -> "NbdDoor":
        """Read whether NBD is switched off; nothing is served yet."""

        def row(connection: Connection) -> str | None:
            query = select(schema.settings.c.value).where(schema.settings.c.name == _SWITCHED_OFF)
            return connection.execute(query).scalar_one_or_none()

        return cls(database, events, host, switched_off=await database.run(row) is not None)

    def serve(self, service: NbdService | None) -> None:
        """From now on `service` answers, or None. Also for a new certificate. Each change is an event."""
        if service != self._service:
            self._service = service
            self._tell()

    @property
    def service(self) -> NbdService | None:
        """What clients are told to connect to; None while nothing is served or NBD is switched off."""
        return None if self._switched_off else self._service

    @property
    def purposes(self) -> tuple[str, ...]:
        """network.purpose."""
        return () if self.service is None else (self.service.purpose,)

    async def add_purpose(self, purpose: str) -> None:
        """Switch NBD on again. How it is served, and so which purpose, the gateway's configuration says.

        Raises NETWORK_INCOMPATIBLE_PURPOSES for the other one, OPERATION_NOT_ALLOWED if none is served.
        """
        if self._service is None:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "this gateway serves no NBD; start it with --nbd")
        if purpose != self._service.purpose:
            raise XenAPIError("NETWORK_INCOMPATIBLE_PURPOSES", purpose, self._service.purpose)
        await self._switch(off=False)

    async def remove_purpose(self, purpose: str) -> None:
        """Switch NBD off if `purpose` is what it is served for. Who holds a disk keeps it."""
        if purpose in self.purposes:
            await self._switch(off=True)

    def check(self) -> None:
        """Raise OPERATION_NOT_ALLOWED while NBD is switched off."""
        if self._switched_off:
            raise XenAPIError(
                "OPERATION_NOT_ALLOWED", "NBD is switched off; network.add_purpose switches it on again"
            )

    async def _switch(self, *, off: bool) -> None:
        if off == self._switched_off:
            return

        def store(connection: Connection) -> None:
            connection.execute(delete(schema.settings).where(schema.settings.c.name == _SWITCHED_OFF))
            if off:
                connection.execute(insert(schema.settings).values(name=_SWITCHED_OFF, value=""))

        await self._database.run(store)
        self._switched_off = off
        self._tell()

    def _tell(self) -> None:
        self._events.publish("network", "mod", self.network.ref)
        self._events.publish("PIF", "mod", self.interface.ref)


def _named(host: Host, what: str) -> Named:
    of_host = uuids.UUID(host.uuid)
    return Named(f"{REF_PREFIX}{uuids.uuid5(of_host, f'{what} reference')}", str(uuids.uuid5(of_host, what)))
