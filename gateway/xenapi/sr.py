"""The class SR: storage repositories.

SR.create and SR.introduce have xapi's parameters in xapi's order, of which a directory needs few: what it is,
is `device_config["location"]`. The others are kept in the record for those who set them.
"""

from __future__ import annotations

from typing import Any, Final

from gateway.core.errors import XenAPIError
from gateway.core.roles import Role
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, computed, fixed, message, stored
from gateway.xenapi.types import (
    BOOL,
    INT,
    STRING,
    STRING_MAP,
    STRINGS,
    Choice,
    MapOf,
    Reference,
    SetOf,
)

SR_OPERATIONS: Final = Choice(
    "storage_operations",
    (
        "scan",
        "destroy",
        "forget",
        "plug",
        "unplug",
        "update",
        "vdi_create",
        "vdi_destroy",
        "vdi_clone",
        "vdi_snapshot",
    ),
)

SUPPORTED_TYPES: Final = ("file",)

_CUSTOM_FIELDS: Final = (("folder", Role.POOL_OPERATOR), ("XenCenter.CustomFields.*", Role.VM_OPERATOR))


def _allowed_operations(sr: Any, estate: Any) -> tuple[str, ...]:
    pbds = estate.records.pbds_of_sr(sr.ref)
    attached = [pbd for pbd in pbds if pbd.currently_attached]
    if not attached:
        return ("plug", "destroy", "forget") if pbds else ("forget",)
    if any(pbd.device_config.get("writable") == "true" for pbd in attached):
        return ("scan", "update", "unplug", "vdi_create", "vdi_destroy", "vdi_clone", "vdi_snapshot")
    return ("scan", "update", "unplug")


FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    stored("name_label", STRING, "a human-readable name", writer=Role.POOL_OPERATOR),
    stored("name_description", STRING, "a human-readable description", writer=Role.POOL_OPERATOR),
    computed("allowed_operations", SetOf(SR_OPERATIONS), "what may be started now", _allowed_operations),
    computed(
        "current_operations",
        MapOf(SR_OPERATIONS, STRING),
        "what is being done, by task",
        lambda sr, estate: estate.operations.of(sr.ref),
    ),
    computed(
        "VDIs",
        SetOf(Reference("VDI")),
        "the disks in it",
        lambda sr, estate: tuple(vdi.ref for vdi in estate.records.vdis_of_sr(sr.ref)),
    ),
    computed(
        "PBDs",
        SetOf(Reference("PBD")),
        "how hosts reach it",
        lambda sr, estate: tuple(pbd.ref for pbd in estate.records.pbds_of_sr(sr.ref)),
    ),
    stored("virtual_allocation", INT, "sum of the virtual sizes of its disks in bytes"),
    stored("physical_utilisation", INT, "bytes in use on the storage"),
    stored("physical_size", INT, "size of the storage in bytes"),
    stored("type", STRING, "kind of storage"),
    stored("content_type", STRING, "kind of content"),
    stored("shared", BOOL, "whether several hosts may attach it"),
    stored(
        "other_config",
        STRING_MAP,
        "additional configuration",
        writer=Role.POOL_OPERATOR,
        key_writers=_CUSTOM_FIELDS,
    ),
    stored("tags", STRINGS, "words for sorting", writer=Role.VM_OPERATOR),
    stored("sm_config", STRING_MAP, "data of the storage manager", writer=Role.POOL_OPERATOR),
    fixed("blobs", MapOf(STRING, Reference("blob")), {}, "binary data attached to it"),
    stored("local_cache_enabled", BOOL, "whether it serves as a host's cache"),
    stored("introduced_by", Reference("DR_task"), "the disaster recovery task that introduced it"),
    stored("clustered", BOOL, "whether it has a clustered file system"),
    stored("is_tools_sr", BOOL, "whether it holds guest tools"),
)

_SELF = Parameter("sr", Reference("SR"), "the SR")


@message(
    "create",
    "Create an SR in an empty or new directory of this host, and attach it.",
    Parameter("host", Reference("host"), "this host"),
    Parameter("device_config", STRING_MAP, 'where it is: {"location": directory}'),
    Parameter("physical_size", INT, "not used: a directory is as large as its file system"),
    Parameter("name_label", STRING, "name of the new SR"),
    Parameter("name_description", STRING, "description of the new SR"),
    Parameter("type", STRING, "kind of storage: file"),
    Parameter("content_type", STRING, "kind of content, usually user"),
    Parameter("shared", BOOL, "whether other hosts may attach it too"),
    Parameter("sm_config", STRING_MAP, "data of the storage manager", default={}),
    result=Reference("SR"),
    role=Role.POOL_OPERATOR,
    errors=("SR_UNKNOWN_DRIVER", "OPERATION_NOT_ALLOWED"),
)
async def create(  # noqa: PLR0917 - xapi's parameters in xapi's order
    call: Call,
    host: str,
    device_config: dict[str, str],
    physical_size: int,
    name_label: str,
    name_description: str,
    sr_type: str,
    content_type: str,
    shared: bool,
    sm_config: dict[str, str],
) -> str:
    call.estate.records.hosts.get(host)
    if host != call.estate.records.this_host.ref:
        raise XenAPIError("VALUE_NOT_SUPPORTED", "host", host, "an SR can be created on this host only")
    if sr_type not in SUPPORTED_TYPES:
        raise XenAPIError("SR_UNKNOWN_DRIVER", sr_type)
    location = device_config.get("location")
    if not location:
        raise XenAPIError("VALUE_NOT_SUPPORTED", "device_config:location", "", "it must name a directory")
    return await call.estate.inventory.sr_create(
        name_label,
        location,
        name_description=name_description,
        content_type=content_type,
        shared=shared,
        sm_config=sm_config,
    )


@message(
    "introduce",
    "Make an SR known that exists already, without attaching it: create a PBD and plug it.",
    Parameter("uuid", STRING, "uuid of the SR"),
    Parameter("name_label", STRING, "name of the SR"),
    Parameter("name_description", STRING, "description of the SR"),
    Parameter("type", STRING, "kind of storage: file"),
    Parameter("content_type", STRING, "kind of content, usually user"),
    Parameter("shared", BOOL, "whether several hosts may attach it"),
    Parameter("sm_config", STRING_MAP, "data of the storage manager", default={}),
    result=Reference("SR"),
    role=Role.POOL_OPERATOR,
    errors=("SR_UNKNOWN_DRIVER",),
)
async def introduce(  # noqa: PLR0917 - xapi's parameters in xapi's order
    call: Call,
    uuid: str,
    name_label: str,
    name_description: str,
    sr_type: str,
    content_type: str,
    shared: bool,
    sm_config: dict[str, str],
) -> str:
    if sr_type not in SUPPORTED_TYPES:
        raise XenAPIError("SR_UNKNOWN_DRIVER", sr_type)
    return await call.estate.inventory.sr_introduce(
        uuid,
        name_label,
        name_description=name_description,
        content_type=content_type,
        shared=shared,
        sm_config=sm_config,
    )


@message(
    "scan",
    "Look which images the SR holds, and how large they are.",
    _SELF,
    role=Role.VM_POWER_ADMIN,
    errors=("SR_NOT_ATTACHED",),
)
async def scan(call: Call, sr: str) -> None:
    with call.operating(sr, "scan"):
        await call.estate.inventory.sr_scan(sr)


@message(
    "coalesce",
    "Coalesce what can be coalesced in the SR, and return when the rest waits for people or has failed. This"
    " gateway's own: XenServer has no such method. Each merge has a task called coalesce.",
    _SELF,
    role=Role.POOL_OPERATOR,
    errors=("SR_NOT_ATTACHED", "OPERATION_NOT_ALLOWED", "SR_BACKEND_FAILURE_40"),
)
async def coalesce(call: Call, sr: str) -> None:
    await call.estate.inventory.sr_coalesce(sr)


@message(
    "get_coalesce_state",
    "What will be coalesced in the SR, for whom it waits, and why others are not, in words by the uuids of"
    " VDIs; under the SR's own uuid why nothing is. This gateway's own.",
    _SELF,
    result=STRING_MAP,
    asynchronous=False,
)
async def get_coalesce_state(call: Call, sr: str) -> dict[str, str]:
    return call.estate.inventory.sr_coalesce_state(sr)


@message(
    "update", "Refresh the sizes of the SR.", _SELF, role=Role.POOL_OPERATOR, errors=("SR_NOT_ATTACHED",)
)
async def update(call: Call, sr: str) -> None:
    call.estate.inventory.repository(sr)
    with call.operating(sr, "update"):
        await call.estate.inventory.refresh_sizes(sr)


@message(
    "destroy",
    "Destroy the SR, which must be unplugged and hold no VDI, and forget it.",
    _SELF,
    role=Role.POOL_OPERATOR,
    errors=("SR_NOT_EMPTY", "SR_HAS_PBD", "SR_HAS_NO_PBDS"),
)
async def destroy(call: Call, sr: str) -> None:
    with call.operating(sr, "destroy"):
        await call.estate.inventory.sr_destroy(sr)


@message(
    "forget",
    "Forget the SR, which must be unplugged, and its VDIs; their images stay where they are.",
    _SELF,
    role=Role.POOL_OPERATOR,
    errors=("SR_HAS_PBD",),
)
async def forget(call: Call, sr: str) -> None:
    with call.operating(sr, "forget"):
        await call.estate.inventory.sr_forget(sr)


@message(
    "get_supported_types", "List the kinds of storage that are supported.", result=STRINGS, asynchronous=False
)
async def get_supported_types(call: Call) -> tuple[str, ...]:
    return SUPPORTED_TYPES


SR = ApiClass(
    name="SR",
    doc="A storage repository: a directory that holds disk images.",
    fields=FIELDS,
    messages=(
        create,
        introduce,
        scan,
        coalesce,
        get_coalesce_state,
        update,
        destroy,
        forget,
        get_supported_types,
    ),
    objects=lambda estate: estate.records.srs,
)
