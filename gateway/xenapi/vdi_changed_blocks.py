"""The messages of the class VDI about changed blocks, by which backup programs copy only what is new.

The trap: clients read the answer 32 bits at a time, highest bit first, so it always has whole groups of four
bytes, and a bit for each 64 KiB.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Final

from gateway.core.roles import Role
from gateway.xenapi.messages import Call, Parameter, message
from gateway.xenapi.types import STRING, Reference

if TYPE_CHECKING:
    from gateway.core import records

TRACKING: Final = ("enable_cbt", "disable_cbt")
OF_METADATA: Final = ("destroy", "data_destroy", "list_changed_blocks")
"""All that may be done with a snapshot whose data is destroyed."""

_SELF: Final = Parameter("self", Reference("VDI"), "the VDI")
_ERRORS: Final = (
    "OPERATION_NOT_ALLOWED",
    "VDI_INCOMPATIBLE_TYPE",
    "SR_BACKEND_FAILURE_66",
    "SR_FULL",
    "SR_NOT_ATTACHED",
)


def is_offered(vdi: records.VDI, operation: str) -> bool:
    """Whether an operation about changed blocks, or any of one whose data is destroyed, has a meaning."""
    if vdi.type == "cbt_metadata":
        return operation in OF_METADATA
    if operation in TRACKING:
        fit = vdi.type in ("user", "system") and vdi.image_format == "vhd"
        return fit and vdi.managed and not vdi.is_a_snapshot
    if operation == "data_destroy":
        return vdi.cbt_enabled and vdi.is_a_snapshot
    return operation != "list_changed_blocks" or vdi.cbt_enabled


@message(
    "enable_cbt",
    "Track from now on which blocks of the VDI change. It may be in use; writing costs nothing more.",
    _SELF,
    role=Role.VM_ADMIN,
    errors=_ERRORS,
)
async def enable_cbt(call: Call, vdi: str) -> None:
    await call.estate.inventory.vdi_enable_cbt(vdi)


@message(
    "disable_cbt",
    "Track no more which blocks of the VDI change. What its snapshots tell of each other stays.",
    _SELF,
    role=Role.VM_ADMIN,
    errors=_ERRORS,
)
async def disable_cbt(call: Call, vdi: str) -> None:
    await call.estate.inventory.vdi_disable_cbt(vdi)


@message(
    "list_changed_blocks",
    "Which blocks of 64 KiB may differ between a snapshot and a later one, or the VDI itself: base64 of one "
    "bit for each block of the later one, the first block the highest bit of the first byte, in groups of "
    "four bytes. Too much may be told, never too little.",
    Parameter("vdi_from", Reference("VDI"), "the earlier one; its data may have been destroyed"),
    Parameter("vdi_to", Reference("VDI"), "the later one, to which nobody may be writing"),
    result=STRING,
    role=Role.VM_OPERATOR,
    errors=("SR_BACKEND_FAILURE_459", "SR_BACKEND_FAILURE_460", "VDI_IN_USE", "SR_NOT_ATTACHED"),
)
async def list_changed_blocks(call: Call, vdi_from: str, vdi_to: str) -> str:
    bits = await call.estate.inventory.vdi_list_changed_blocks(vdi_from, vdi_to, who=call.who, task=call.task)
    return base64.b64encode(bits).decode()


@message(
    "data_destroy",
    "Destroy the data of a snapshot of a VDI whose changes are tracked. It gets the type cbt_metadata, and "
    "what has changed since can still be asked.",
    _SELF,
    role=Role.VM_ADMIN,
    errors=(
        "OPERATION_NOT_ALLOWED",
        "VDI_NO_CBT_METADATA",
        "VDI_IN_USE",
        "OTHER_OPERATION_IN_PROGRESS",
        "SR_NOT_ATTACHED",
    ),
)
async def data_destroy(call: Call, vdi: str) -> None:
    await call.estate.inventory.vdi_data_destroy(vdi, who=call.who, task=call.task)


MESSAGES: Final = (enable_cbt, disable_cbt, list_changed_blocks, data_destroy)
