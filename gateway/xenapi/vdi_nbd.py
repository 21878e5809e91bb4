"""A VDI beside the gateway: how NBD clients reach it, and how it is taken away from whoever holds it.

The trap: an export name holds the caller's session, so what `get_nbd_info` answers is as secret as that.
"""

from typing import Any, Final

from gateway.core.errors import XenAPIError
from gateway.core.roles import Role
from gateway.repository.inventory import Where
from gateway.xenapi.messages import Call, Parameter, message
from gateway.xenapi.types import Record, Reference, SetOf

_VDI: Final = Parameter("vdi", Reference("VDI"), "the VDI")
_SELF: Final = Parameter("self", Reference("VDI"), "the VDI")


@message(
    "force_unlock",
    "Take the disk away from all processes beside the gateway that hold it, as over NBD: their requests fail "
    "from now on. A process that is stopped keeps it until it ends or goes on; the log says so.",
    _VDI,
    role=Role.VM_ADMIN,
)
async def force_unlock(call: Call, ref: str) -> None:
    call.estate.records.vdis.get(ref)
    call.estate.holds.revoke_vdi(ref, f"{call.who} took the disk away")


@message(
    "get_nbd_info",
    "How the VDI is reached over NBD, for reading: one entry for each address; none if NBD isn't served, or "
    "the SR is not attached here. Each has `exportname`, which holds the caller's session and so is "
    "secret, `address`, `port`, `subject` and, only where the server demands TLS, `cert`: its certificate as "
    "PEM.",
    _SELF,
    result=SetOf(Record("vdi_nbd_server_info", {})),
    role=Role.VM_ADMIN,
    asynchronous=False,
    errors=("VDI_INCOMPATIBLE_TYPE",),
)
async def get_nbd_info(call: Call, ref: str) -> list[dict[str, Any]]:
    estate = call.estate
    vdi = estate.records.vdis.get(ref)
    if vdi.type == "cbt_metadata":
        raise XenAPIError("VDI_INCOMPATIBLE_TYPE", ref, vdi.type)
    service = estate.nbd.service
    if service is None or estate.inventory.where_is(vdi.sr) is not Where.LOCAL:
        return []
    info: dict[str, Any] = {
        "exportname": f"/{vdi.uuid}?session_id={call.session_ref}",
        "port": service.port,
        "subject": service.subject,
    }
    if service.certificate is not None:
        # Clients take the mere presence of this for TLS.
        info["cert"] = service.certificate
    return [{**info, "address": address} for address in service.addresses]


MESSAGES: Final = (force_unlock, get_nbd_info)
