"""The objects of the API that are not tasks or sessions: pool, host, SR, PBD, VDI.

An attribute is XenAPI's field name in lower case (`VDI.SR` is `sr`, `pool.default_SR` is `default_sr`),
references are strings, maps are dicts and sets are tuples. Fields that follow from other records (SR.VDIs,
VDI.snapshots) are not stored: `Records` answers them from its indexes. Records are immutable: change one
through its table, never by its dicts.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from gateway.core.clock import EPOCH
from gateway.core.refs import NULL_REF

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
