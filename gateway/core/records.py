"""The objects of the API that are not tasks or sessions: pool, host, SR, PBD, VDI.

An attribute is XenAPI's field name in lower case (`VDI.SR` is `sr`, `pool.default_SR` is `default_sr`),
references are strings, maps are dicts and sets are tuples. Fields that follow from other records (SR.VDIs,
VDI.snapshots) are not stored: `Records` answers them from its indexes. Records are immutable: change one
through its table, never by its dicts.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Final, Literal

from sqlalchemy import Connection, insert, select

from gateway.core import schema
from gateway.core.clock import EPOCH
from gateway.core.database import Database
from gateway.core.events import Events
from gateway.core.refs import NULL_REF, new_ref, new_uuid
from gateway.core.tables import Table

__all__ = ["PBD", "SR", "VDI", "Host", "ImageFormat", "Pool", "Records", "Table"]

# The row of the settings that says which host record is this machine's.
_THIS_HOST: Final = "this_host"

ImageFormat = Literal["vhd", "raw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The pool; there is one."""

    ref: str
    uuid: str
    name_label: str = ""
    name_description: str = ""
    master: str = NULL_REF
    default_sr: str = NULL_REF
    suspend_image_sr: str = NULL_REF
    crash_dump_sr: str = NULL_REF
    other_config: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    gui_config: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine that reaches SRs: this gateway, or another one made through the API."""

    ref: str
    uuid: str
    name_label: str = ""
    name_description: str = ""
    hostname: str = ""
    # Host name or IP address, without a port unless the gateway there does not use the scheme's own.
    address: str = ""
    enabled: bool = True
    software_version: dict[str, str] = field(default_factory=dict)
    other_config: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SR:
    """A storage repository. Sizes in bytes; -1 where the storage has no size."""

    ref: str
    uuid: str
    name_label: str = ""
    name_description: str = ""
    virtual_allocation: int = 0
    physical_utilisation: int = 0
    physical_size: int = 0
    type: str = "file"
    content_type: str = "user"
    shared: bool = False
    other_config: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    sm_config: dict[str, str] = field(default_factory=dict)
    local_cache_enabled: bool = False
    introduced_by: str = NULL_REF
    clustered: bool = False
    is_tools_sr: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PBD:
    """How one host reaches one SR; `device_config` holds the directory."""

    ref: str
    uuid: str
    host: str
    sr: str
    device_config: dict[str, str] = field(default_factory=dict)
    currently_attached: bool = False
    other_config: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VDI:
    """A virtual disk. Sizes in bytes.

    `content_id` (a uuid) names the bytes: it is new before the first write of a writing lease and at each
    commit. `managed` is false for the hidden parent of a chain. `parent` is XenAPI's field, unused there and
    here.
    """

    ref: str
    uuid: str
    sr: str
    name_label: str = ""
    name_description: str = ""
    virtual_size: int = 0
    physical_utilisation: int = 0
    type: str = "user"
    sharable: bool = False
    read_only: bool = False
    other_config: dict[str, str] = field(default_factory=dict)
    storage_lock: bool = False
    location: str = ""
    managed: bool = True
    missing: bool = False
    parent: str = NULL_REF
    xenstore_data: dict[str, str] = field(default_factory=dict)
    sm_config: dict[str, str] = field(default_factory=dict)
    is_a_snapshot: bool = False
    snapshot_of: str = NULL_REF
    snapshot_time: datetime = EPOCH
    tags: tuple[str, ...] = ()
    allow_caching: bool = False
    on_boot: str = "persist"
    metadata_of_pool: str = NULL_REF
    metadata_latest: bool = False
    is_tools_iso: bool = False
    cbt_enabled: bool = False
    content_id: str = ""
    image_format: ImageFormat = "vhd"


class Records:
    """Every record of the gateway. Made by `Records.load`."""

    def __init__(self, database: Database, events: Events) -> None:
        self._database = database
        self._this_host = NULL_REF
        self.pools: Final = Table(Pool, "pool", schema.pools, database, events, indexed=("name_label",))
        self.hosts: Final = Table(Host, "host", schema.hosts, database, events, indexed=("name_label",))
        self.srs: Final = Table(SR, "SR", schema.srs, database, events, indexed=("name_label",))
        self.pbds: Final = Table(
            PBD,
            "PBD",
            schema.pbds,
            database,
            events,
            indexed=("host", "sr"),
            owners={"host": "host", "sr": "SR"},
            told=("currently_attached",),
        )
        self.vdis: Final = Table(
            VDI,
            "VDI",
            schema.vdis,
            database,
            events,
            indexed=("name_label", "sr", "snapshot_of"),
            owners={"sr": "SR", "snapshot_of": "VDI"},
        )

    @classmethod
    async def load(
        cls,
        database: Database,
        events: Events,
        *,
        host_name: str | None = None,
        address: str = "127.0.0.1",
        software_version: Mapping[str, str] | None = None,
    ) -> "Records":
        """Read everything; at the first start a pool and the record of this host are made.

        The host's name and uuid stay as they are from then on; its host name, address and versions follow
        what is given.
        """
        records = cls(database, events)
        name = socket.gethostname() if host_name is None else host_name
        records._this_host = await database.run(lambda connection: _ensure_host(connection, name))
        for table in (records.pools, records.hosts, records.srs, records.pbds, records.vdis):
            await table.load()
        await records.hosts.change(
            records._this_host,
            hostname=name,
            address=address,
            software_version=dict(software_version or {}),
        )
        return records

    @property
    def this_host(self) -> Host:
        """The record of the host that this gateway runs on."""
        return self.hosts.get(self._this_host)

    @property
    def pool(self) -> Pool:
        """The one pool."""
        return self.pools.all()[0]

    def vdis_of_sr(self, sr: str) -> list[VDI]:
        """SR.VDIs, as records."""
        return self.vdis.referring("sr", sr)

    def snapshots_of_vdi(self, vdi: str) -> list[VDI]:
        """VDI.snapshots, as records."""
        return self.vdis.referring("snapshot_of", vdi)

    def pbds_of_sr(self, sr: str) -> list[PBD]:
        """SR.PBDs, as records."""
        return self.pbds.referring("sr", sr)

    def pbds_of_host(self, host: str) -> list[PBD]:
        """host.PBDs, as records."""
        return self.pbds.referring("host", host)


def _ensure_host(connection: Connection, name: str) -> str:
    """The reference of this host's record; made with its pool in the same transaction if there is none."""
    query = select(schema.settings.c.value).where(schema.settings.c.name == _THIS_HOST)
    known = connection.execute(query).scalar_one_or_none()
    if known is not None:
        return str(known)
    host = Host(ref=new_ref(), uuid=new_uuid(), name_label=name)
    pool = Pool(ref=new_ref(), uuid=new_uuid(), master=host.ref)
    connection.execute(insert(schema.hosts).values(_fields(host)))
    connection.execute(insert(schema.pools).values(_fields(pool)))
    connection.execute(insert(schema.settings).values(name=_THIS_HOST, value=host.ref))
    return host.ref


def _fields(record: Host | Pool) -> dict[str, Any]:
    return {item.name: getattr(record, item.name) for item in fields(record)}
