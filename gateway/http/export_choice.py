"""What a request wants to have of a VDI: the format, and the base of a delta.

Every wrong wish is refused before anything is leased, with its own reason; only whether base and VDI share
files can't be seen before.
"""

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from gateway.core.errors import XenAPIError
from gateway.http.disk_request import Refusal
from gateway.transfers.export_formats import ExportFormat

if TYPE_CHECKING:
    from gateway.core.records import VDI, Table
    from gateway.http.request import Request


@dataclass(frozen=True, slots=True)
class ExportChoice:
    """A format; with a base only what differs from that."""

    image_format: ExportFormat
    base: "VDI | None" = None


def export_choice(request: "Request", vdi: "VDI", vdis: "Table[VDI]") -> ExportChoice:
    """What is wanted of `vdi`, found among `vdis`. Raises Refusal."""
    # An empty name is none that is known, as of an import.
    image_format = _format(request.parameter("format") or request.query.get("format"))
    if "chunked" in request.query or "chunked" in request.cookies:
        reason = "exports are not chunked, leave the parameter out"
        chunked = request.parameter("chunked") or ""
        raise Refusal(HTTPStatus.NOT_FOUND, XenAPIError("VALUE_NOT_SUPPORTED", "chunked", chunked, reason))
    name = request.parameter("base")
    if name is None:
        return ExportChoice(image_format)
    if image_format is ExportFormat.RAW:
        reason = "a raw disk can't say what is the same as in the base, ask for format=vhd or qcow2"
        raise Refusal(HTTPStatus.NOT_FOUND, XenAPIError("VALUE_NOT_SUPPORTED", "base", name[:100], reason))
    try:
        base = vdis.find(name)
    except XenAPIError as error:
        raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, error) from error
    if base.ref == vdi.ref:
        raise unrelated(vdi, base, "it is the VDI itself")
    if base.sr != vdi.sr:
        raise unrelated(vdi, base, "it is in another SR")
    if not base.managed:
        raise unrelated(vdi, base, "it is the hidden parent of other VDIs, whose content may change")
    return ExportChoice(image_format, base)


def unrelated(vdi: "VDI", base: "VDI", reason: str) -> Refusal:
    """No delta can be made of these two."""
    return Refusal(
        HTTPStatus.CONFLICT, XenAPIError("EXPORT_ERROR_BASE_UNRELATED", base.uuid, vdi.uuid, reason)
    )


def _format(name: str | None) -> ExportFormat:
    try:
        return ExportFormat("raw" if name is None else name.lower())
    except ValueError:
        error = XenAPIError("EXPORT_ERROR_UNKNOWN_FORMAT", (name or "")[:50])
        raise Refusal(HTTPStatus.NOT_FOUND, error) from None
