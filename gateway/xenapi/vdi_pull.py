"""VDI.import_from_url: the gateway fetches an image itself, as VM.import does for a whole machine.

The trap: a URL may hold a password or a signature, so it is never sent back as it came, also not in an error
about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.core.errors import XenAPIError
from gateway.core.roles import Role
from gateway.transfers.formats import BodyFormat, body_format
from gateway.transfers.import_disk import NEW_NAME
from gateway.transfers.pull import Checksum
from gateway.transfers.pull_image import FORMATS, Order, Terms, pull_image
from gateway.transfers.pull_socket import Patience
from gateway.transfers.pull_source import ImageURL, WrongURL
from gateway.xenapi.messages import Call, Parameter, message
from gateway.xenapi.types import BOOL, STRING, Reference

if TYPE_CHECKING:
    from gateway.xenapi.estate import Estate


@message(
    "import_from_url",
    "Fetch an image from an HTTP server, and make a VDI of it that is as large as the disk in it: all of "
    "it, or nothing. What gzip, xz or zstd have compressed is unpacked. The task's other_config tells how "
    "many bytes have come; the VDI's, from where it is, and the checksum of the file.",
    Parameter(
        "url",
        STRING,
        "http or https, with user:password@ if need be; addresses that are not public have to be named by "
        "the gateway's configuration",
    ),
    Parameter("sr", Reference("SR"), "where the VDI is made"),
    Parameter("name_label", STRING, "its name; empty: that of the file", default=""),
    Parameter("format", STRING, f"one of {', '.join(FORMATS)}", default=str(BodyFormat.AUTO)),
    Parameter(
        "checksum",
        STRING,
        "sha256: or sha512: and digits, of the file as it lies there, compressed or not; or the URL of a "
        "file that has them, as sha256sum writes it; empty: whatever comes is taken",
        default="",
    ),
    Parameter(
        "reuse",
        BOOL,
        "whether a VDI of the SR that was made of a file with this checksum, and has not been written to "
        "since, may be the answer; the task's other_config then has reused=true",
        default=False,
    ),
    result=Reference("VDI"),
    role=Role.VM_ADMIN,
    tasked=True,
    errors=(
        "PULL_ERROR_ADDRESS_REFUSED",
        "PULL_ERROR_BROKEN_OFF",
        "PULL_ERROR_CERTIFICATE",
        "PULL_ERROR_CHANGED",
        "PULL_ERROR_CHECKSUM",
        "PULL_ERROR_CHECKSUM_FILE",
        "PULL_ERROR_LENGTH_REQUIRED",
        "PULL_ERROR_NOT_HTTP",
        "PULL_ERROR_REDIRECT",
        "PULL_ERROR_STATUS",
        "PULL_ERROR_UNREACHABLE",
        "IMPORT_ERROR_BAD_COMPRESSION",
        "IMPORT_ERROR_CONVERTER_LIMIT",
        "IMPORT_ERROR_CONVERTER_MISSING",
        "IMPORT_ERROR_CORRUPT_IMAGE",
        "IMPORT_ERROR_IMAGE_TOO_LONG",
        "IMPORT_ERROR_PREMATURE_EOF",
        "IMPORT_ERROR_UNKNOWN_FORMAT",
        "IMPORT_ERROR_UNSUPPORTED_IMAGE",
        "IMPORT_ERROR_WRONG_FORMAT",
        "OPERATION_NOT_ALLOWED",
        "VDI_TOO_LARGE",
        "SR_FULL",
        "SR_NOT_ATTACHED",
    ),
)
async def import_from_url(  # noqa: PLR0917  the parameters of the message
    call: Call, url: str, sr: str, name_label: str, image_format: str, checksum: str, reuse: bool
) -> str:
    if call.operation is None:
        raise AssertionError("an import always has a task")
    call.estate.records.srs.get(sr)
    source = _url("url", url)
    order = Order(
        url=source,
        sr=sr,
        name_label=name_label or source.name or NEW_NAME,
        format=_format(image_format),
        checksum=_checksum(checksum),
        reuse=reuse,
    )
    with call.operating(sr, "vdi_create"):
        return await pull_image(
            call.estate.inventory, call.operation, order=order, who=call.who, terms=_terms(call.estate)
        )


def _terms(estate: Estate) -> Terms:
    limits = estate.limits
    return Terms(estate.pull_rules(), estate.pulls, limits.spool_bytes, Patience(idle=limits.transfer_idle))


def _url(name: str, text: str) -> ImageURL:
    try:
        return ImageURL.parse(text.strip())
    except WrongURL as wrong:
        raise XenAPIError("VALUE_NOT_SUPPORTED", name, _MASKED, str(wrong)) from None


def _format(name: str) -> BodyFormat:
    wanted = body_format(name)
    if wanted not in FORMATS:
        raise XenAPIError("VALUE_NOT_SUPPORTED", "format", name, "a file has no such form")
    return wanted


def _checksum(text: str) -> Checksum | ImageURL | None:
    if not text.strip():
        return None
    if "://" in text:
        return _url("checksum", text)
    found = Checksum.parse(text)
    if found is None:
        reason = "it is sha256: and 64 digits, sha512: and 128 digits, or a URL"
        raise XenAPIError("VALUE_NOT_SUPPORTED", "checksum", text[:200], reason)
    return found


_MASKED: Final = "…"

MESSAGES: Final = (import_from_url,)
