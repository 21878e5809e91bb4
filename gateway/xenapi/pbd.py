"""The class PBD: how one host reaches one SR. Plugging this host's PBD attaches the SR."""

from __future__ import annotations

from typing import Any

from gateway.core.roles import Role
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, given, message, stored
from gateway.xenapi.types import BOOL, STRING, STRING_MAP, Reference

FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    stored("host", Reference("host"), "the host", given=True),
    stored("SR", Reference("SR"), "the SR", given=True),
    stored("device_config", STRING_MAP, 'where the host finds it: {"location": directory}', given=True),
    stored("currently_attached", BOOL, "whether it is attached now"),
    stored(
        "other_config",
        STRING_MAP,
        "additional configuration",
        writer=Role.POOL_OPERATOR,
        given=True,
        default={},
    ),
)

_SELF = Parameter("self", Reference("PBD"), "the PBD")


@message(
    "create",
    "Say how a host reaches an SR, without attaching it.",
    Parameter(
        "args", given("PBD", FIELDS), "the fields of the new PBD; a complete record of another will do"
    ),
    result=Reference("PBD"),
    role=Role.POOL_OPERATOR,
)
async def create(call: Call, args: dict[str, Any]) -> str:
    return await call.estate.inventory.pbd_create(**{name.lower(): value for name, value in args.items()})


@message(
    "plug",
    "Attach the SR to the host.",
    _SELF,
    role=Role.POOL_OPERATOR,
    errors=("SR_BACKEND_FAILURE_47", "SR_BACKEND_FAILURE_16"),
)
async def plug(call: Call, ref: str) -> None:
    with call.operating(call.estate.records.pbds.get(ref).sr, "plug"):
        await call.estate.inventory.pbd_plug(ref)


@message("unplug", "Detach the SR from the host.", _SELF, role=Role.POOL_OPERATOR, errors=("VDI_IN_USE",))
async def unplug(call: Call, ref: str) -> None:
    with call.operating(call.estate.records.pbds.get(ref).sr, "unplug"):
        await call.estate.inventory.pbd_unplug(ref)


@message(
    "destroy", "Forget how the host reaches the SR; it must be unplugged.", _SELF, role=Role.POOL_OPERATOR
)
async def destroy(call: Call, ref: str) -> None:
    await call.estate.inventory.pbd_destroy(ref)


PBD = ApiClass(
    name="PBD",
    doc="How one host reaches one SR.",
    fields=FIELDS,
    messages=(create, plug, unplug, destroy),
    objects=lambda estate: estate.records.pbds,
    named=False,
)
