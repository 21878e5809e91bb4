"""The class VDI: virtual disks.

Which operations are under way is read from the lease table, so it is true for every door alike: an upload
over HTTP, an NBD client and a destroy all show. The trap: VDI.create gets complete records back from clients
that saved one with get_record, so every field that is not the caller's to choose must be skipped, whatever it
holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from gateway.core.errors import XenAPIError
from gateway.core.leases import LeaseMode
from gateway.core.refs import NULL_REF
from gateway.core.roles import Role
from gateway.transfers.copy_disk import copy_disk
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, computed, fixed, given, message, stored
from gateway.xenapi.types import (
    BOOL,
    DATETIME,
    INT,
    STRING,
    STRING_MAP,
    STRINGS,
    Choice,
    MapOf,
    Reference,
    SetOf,
)
from gateway.xenapi.vdi_changed_blocks import MESSAGES as CHANGED_BLOCKS
from gateway.xenapi.vdi_changed_blocks import is_offered
from gateway.xenapi.vdi_nbd import MESSAGES as NBD
from gateway.xenapi.vdi_pull import MESSAGES as PULL

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core import records
    from gateway.xenapi.datamodel import Message, Run
    from gateway.xenapi.estate import Estate

VDI_TYPE: Final = Choice(
    "vdi_type",
    (
        "system",
        "user",
        "ephemeral",
        "suspend",
        "crashdump",
        "ha_statefile",
        "metadata",
        "redo_log",
        "rrd",
        "pvs_cache",
        "cbt_metadata",
    ),
)
ON_BOOT: Final = Choice("on_boot", ("reset", "persist"))

OPERATIONS: Final = {
    "snapshot": LeaseMode.REPLACE,
    "clone": LeaseMode.REPLACE,
    "copy": LeaseMode.READ,
    "revert": LeaseMode.REPLACE,
    "destroy": LeaseMode.WRITE,
    "resize": LeaseMode.WRITE,
    "enable_cbt": None,
    "disable_cbt": None,
    "data_destroy": LeaseMode.WRITE,
    "list_changed_blocks": LeaseMode.READ,
}
"""XenAPI's VDI operations that are offered here, each with the mode in which it leases the chain, if any."""

LAST_REFUSAL: Final = "last-refusal"
"""A key of sm_config that is never stored: a client that sends back a record stores what isn't shown."""

VDI_OPERATIONS: Final = Choice("vdi_operations", tuple(OPERATIONS))

_FORKS: Final = ("snapshot", "clone", "revert")

_CUSTOM_FIELDS: Final = (("folder", Role.VM_OPERATOR), ("XenCenter.CustomFields.*", Role.VM_OPERATOR))


def current_operations(vdi: records.VDI, estate: Estate) -> dict[str, Any]:
    """What is being done to the VDI now: its operations by their tasks."""
    return dict(estate.leases.operations_for(vdi.ref))


def sm_config(vdi: records.VDI, estate: Estate) -> dict[str, str]:
    """What is stored, and the last refusal: an NBD client isn't told why, and XenAPI has no field for it."""
    shown = {key: value for key, value in vdi.sm_config.items() if key != LAST_REFUSAL}
    refusal = estate.refusals.last(vdi.ref)
    return {**shown, LAST_REFUSAL: refusal} if refusal else shown


def allowed_operations(vdi: records.VDI, estate: Estate) -> tuple[str, ...]:
    """What may be started now: all that takes a lease which those who hold one would bear beside theirs."""
    if vdi.missing:
        return ()
    held = estate.leases.modes_for(vdi.ref)
    forked = vdi.managed and vdi.image_format == "vhd"
    return tuple(
        name
        for name, mode in OPERATIONS.items()
        if (forked or name not in _FORKS)
        and (vdi.managed or name != "copy")
        and (vdi.is_a_snapshot or name != "revert")
        and is_offered(vdi, name)
        and not (mode and any(mode.conflicts_with(other) for other in held))
    )


FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    stored("name_label", STRING, "a human-readable name", writer=Role.VM_ADMIN, given=True, default=""),
    stored(
        "name_description",
        STRING,
        "a human-readable description",
        writer=Role.VM_ADMIN,
        given=True,
        default="",
    ),
    computed("allowed_operations", SetOf(VDI_OPERATIONS), "what may be started now", allowed_operations),
    computed("current_operations", MapOf(STRING, STRING), "what is being done, by task", current_operations),
    stored("SR", Reference("SR"), "the repository that holds the VDI", given=True),
    fixed("VBDs", SetOf(Reference("VBD")), (), "virtual machines' devices that use this disk"),
    fixed("crash_dumps", SetOf(Reference("crashdump")), (), "crash dumps on this disk"),
    stored("virtual_size", INT, "size of the disk in bytes", given=True),
    stored("physical_utilisation", INT, "bytes that its image takes up in the SR"),
    stored("type", VDI_TYPE, "what the disk is used for", given=True, default="user"),
    stored(
        "sharable",
        BOOL,
        "whether several virtual machines may use it",
        writer=Role.VM_ADMIN,
        given=True,
        default=False,
    ),
    stored("read_only", BOOL, "whether it may only be read", writer=Role.VM_ADMIN, given=True, default=False),
    stored(
        "other_config",
        STRING_MAP,
        "additional configuration",
        writer=Role.VM_ADMIN,
        key_writers=_CUSTOM_FIELDS,
        given=True,
        default={},
    ),
    stored("storage_lock", BOOL, "whether the storage has locked it"),
    stored("location", STRING, "its name within the SR"),
    stored("managed", BOOL, "whether it is a disk of its own, not the hidden parent of others"),
    stored("missing", BOOL, "whether the last scan found no image"),
    stored("parent", Reference("VDI"), "always null"),
    stored("xenstore_data", STRING_MAP, "data for xenstore", writer=Role.VM_ADMIN, given=True, default={}),
    replace(
        stored(
            "sm_config",
            STRING_MAP,
            f"data of the storage manager; `{LAST_REFUSAL}` says when and why another process, as over NBD, "
            "was refused the disk last",
            writer=Role.VM_ADMIN,
            given=True,
            default={},
        ),
        read=sm_config,
    ),
    stored("is_a_snapshot", BOOL, "whether it is a snapshot"),
    stored("snapshot_of", Reference("VDI"), "the VDI of which it is a snapshot"),
    computed(
        "snapshots",
        SetOf(Reference("VDI")),
        "its snapshots",
        lambda vdi, estate: tuple(other.ref for other in estate.records.snapshots_of_vdi(vdi.ref)),
    ),
    stored("snapshot_time", DATETIME, "when the snapshot was made"),
    stored("tags", STRINGS, "words for sorting", writer=Role.VM_OPERATOR, given=True, default=()),
    stored("allow_caching", BOOL, "whether hosts may cache it"),
    stored("on_boot", ON_BOOT, "what becomes of its content when a virtual machine starts"),
    stored("metadata_of_pool", Reference("pool"), "the pool whose metadata it holds"),
    stored("metadata_latest", BOOL, "whether that metadata is the latest"),
    stored("is_tools_iso", BOOL, "whether it is an image of guest tools"),
    stored("cbt_enabled", BOOL, "whether its changed blocks are tracked"),
)

_SELF = Parameter("self", Reference("VDI"), "the VDI")


@message(
    "create",
    "Create a VDI, empty, in an attached SR. Its size is rounded up to 2 MiB, if raw to 512 bytes.",
    Parameter(
        "args", given("VDI", FIELDS), "the fields of the new VDI; a complete record of another will do"
    ),
    result=Reference("VDI"),
    role=Role.VM_ADMIN,
    errors=("SR_NOT_ATTACHED", "SR_FULL", "VDI_TOO_LARGE"),
)
async def create(call: Call, args: dict[str, Any]) -> str:
    with call.operating(args["SR"], "vdi_create"):
        return await call.estate.inventory.vdi_create(**{name.lower(): value for name, value in args.items()})


@message(
    "resize",
    "Make the VDI larger. The size is rounded up to 2 MiB, if raw to 512 bytes; what is new reads as zeroes.",
    Parameter("vdi", Reference("VDI"), "the VDI"),
    Parameter("size", INT, "the new size in bytes, not less than the VDI has"),
    role=Role.VM_ADMIN,
    errors=(
        "VALUE_NOT_SUPPORTED",
        "VDI_TOO_LARGE",
        "VDI_IN_USE",
        "OTHER_OPERATION_IN_PROGRESS",
        "VDI_READONLY",
        "OPERATION_NOT_ALLOWED",
        "SR_FULL",
        "SR_NOT_ATTACHED",
    ),
)
async def resize(call: Call, vdi: str, size: int) -> None:
    await call.estate.inventory.vdi_resize(vdi, size, who=call.who, task=call.task)


_FORK_ERRORS: Final = (
    "SR_BACKEND_FAILURE_109",
    "VDI_IN_USE",
    "OTHER_OPERATION_IN_PROGRESS",
    "OPERATION_NOT_ALLOWED",
    "SR_FULL",
    "SR_NOT_ATTACHED",
)
_DRIVER_PARAMS: Final = Parameter("driver_params", STRING_MAP, "not used", default={})


_MARKS: Final = Parameter(
    "driver_params",
    STRING_MAP,
    "keys that the snapshot has in its other_config from its first moment on, by which whoever lost the "
    "answer finds it",
    default={},
)


def _fork(
    name: str, doc: str, vdi: str, driver_params: Parameter = _DRIVER_PARAMS
) -> Callable[[Run], Message]:
    """A message that makes a VDI which shares its bytes with `vdi`, of which it says what that may be."""
    return message(
        name,
        doc,
        Parameter("vdi", Reference("VDI"), vdi),
        driver_params,
        result=Reference("VDI"),
        role=Role.VM_ADMIN,
        errors=_FORK_ERRORS,
    )


@_fork(
    "snapshot",
    "Keep the VDI as it is now, as a read-only VDI. Nobody may be writing; who reads is not disturbed.",
    "the VDI",
    _MARKS,
)
async def snapshot(call: Call, vdi: str, driver_params: dict[str, str]) -> str:
    with call.operating(_sr_of(call, vdi), "vdi_snapshot"):
        return await call.estate.inventory.vdi_snapshot(
            vdi, who=call.who, task=call.task, marks=driver_params
        )


@_fork(
    "clone",
    "Make a writable VDI with the bytes of this one, which share what they have in common.",
    "the VDI, or a snapshot",
)
async def clone(call: Call, vdi: str, _driver_params: dict[str, str]) -> str:
    with call.operating(_sr_of(call, vdi), "vdi_clone"):
        return await call.estate.inventory.vdi_clone(vdi, who=call.who, task=call.task)


@message(
    "copy",
    "Copy all bytes of the VDI into a new VDI that shares nothing with it, or over another VDI.",
    Parameter("vdi", Reference("VDI"), "the VDI, or a snapshot; others may read it meanwhile"),
    Parameter("sr", Reference("SR"), "where the new VDI is made; null with into_vdi", default=NULL_REF),
    Parameter("base_vdi", Reference("VDI"), "must be null: whole disks are copied", default=NULL_REF),
    Parameter(
        "into_vdi",
        Reference("VDI"),
        "a VDI that is not smaller, whose content is replaced; null: a new one",
        default=NULL_REF,
    ),
    result=Reference("VDI"),
    role=Role.VM_ADMIN,
    tasked=True,
    errors=(
        "VALUE_NOT_SUPPORTED",
        "OPERATION_NOT_ALLOWED",
        "VDI_IN_USE",
        "OTHER_OPERATION_IN_PROGRESS",
        "VDI_TOO_SMALL",
        "VDI_READONLY",
        "SR_FULL",
        "SR_NOT_ATTACHED",
    ),
)
async def copy(call: Call, vdi: str, sr: str, base_vdi: str, into_vdi: str) -> str:
    if base_vdi != NULL_REF:
        raise XenAPIError("VALUE_NOT_SUPPORTED", "base_vdi", base_vdi, "only whole disks are copied")
    if call.operation is None:
        raise AssertionError("a copy always has a task")
    return await copy_disk(
        call.estate.inventory,
        call.estate.publications,
        call.operation,
        vdi=vdi,
        sr=sr,
        into=into_vdi,
        who=call.who,
        turns=call.estate.copies,
    )


@message(
    "revert",
    "Give the VDI of which this is a snapshot the snapshot's bytes and size. What was written since is gone.",
    Parameter("snapshot", Reference("VDI"), "the snapshot; it stays"),
    _DRIVER_PARAMS,
    role=Role.VM_ADMIN,
    errors=_FORK_ERRORS,
)
async def revert(call: Call, vdi: str, _driver_params: dict[str, str]) -> None:
    estate = call.estate
    publishing = estate.publications.publishing
    await estate.inventory.vdi_revert(vdi, who=call.who, task=call.task, publishing=publishing)


@message(
    "destroy",
    "Destroy the VDI and its image.",
    _SELF,
    role=Role.VM_ADMIN,
    errors=(
        "VDI_IN_USE",
        "OTHER_OPERATION_IN_PROGRESS",
        "OPERATION_NOT_ALLOWED",
        "VDI_READONLY",
        "SR_NOT_ATTACHED",
    ),
)
async def destroy(call: Call, vdi: str) -> None:
    with call.operating(_sr_of(call, vdi), "vdi_destroy"):
        await call.estate.inventory.vdi_destroy(vdi, who=call.who, task=call.task)


@message(
    "forget",
    "Forget the VDI; its image stays, and the next scan finds it again, without a name.",
    _SELF,
    role=Role.VM_ADMIN,
)
async def forget(call: Call, vdi: str) -> None:
    await call.estate.inventory.vdi_forget(vdi)


def _sr_of(call: Call, vdi: str) -> str:
    records = call.estate.records
    return records.vdis.get(vdi).sr if vdi in records.vdis else NULL_REF


VDI = ApiClass(
    name="VDI",
    doc="A virtual disk.",
    fields=FIELDS,
    messages=(
        create,
        snapshot,
        clone,
        copy,
        revert,
        resize,
        destroy,
        forget,
        *NBD,
        *CHANGED_BLOCKS,
        *PULL,
    ),
    objects=lambda estate: estate.records.vdis,
)
