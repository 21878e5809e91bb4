"""What PUT /import_raw_vdi is asked beside the questions for every disk: what the body is and how it ends.

The parameter `chunked` switches the pieces of XenServer's hosts on, as xapi has it. The traps: there is a
transfer-encoding of the same name, which is another thing; and xapi looks for the parameter alone, so that
`chunked=false` means true there: here that is refused, since either meaning would surprise somebody.
"""

from http import HTTPStatus
from typing import TYPE_CHECKING

from gateway.core.errors import XenAPIError
from gateway.http.disk_request import Refusal
from gateway.transfers.formats import BodyFormat, body_format

if TYPE_CHECKING:
    from gateway.http.request import Request


def format_of(request: "Request") -> BodyFormat:
    """The format of the body: raw when none is named. Raises Refusal (404).

    An empty name is none that is known, as for xapi: a script has lost it, and an image isn't a raw disk.
    """
    name = request.parameter("format") or request.query.get("format")
    try:
        wanted = BodyFormat.RAW if name is None else body_format(name)
    except XenAPIError as error:
        raise Refusal(HTTPStatus.NOT_FOUND, error) from error
    if "base" in request.query or "base" in request.cookies:
        reason = "a delta is sent as a differencing VHD, leave the parameter out"
        raise _unsupported(request, "base", reason)
    if "chunked" not in request.query and "chunked" not in request.cookies:
        return wanted
    value = request.query.get("chunked", request.cookies.get("chunked", "")).lower()
    if value in ("false", "0", "no"):
        raise _unsupported(request, "chunked", "its presence means pieces of a disk; leave it out")
    if wanted not in (BodyFormat.RAW, BodyFormat.CHUNKED):
        raise _unsupported(request, "chunked", f"pieces of a {wanted} image cannot be taken")
    return BodyFormat.CHUNKED


def size_of(request: "Request") -> int | None:
    """The size in bytes that a new VDI shall have, if the request says it. Raises Refusal (404)."""
    text = request.parameter("virtual_size")
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or not 0 < len(text) < 19 or int(text) == 0:
        raise _unsupported(request, "virtual_size", "it must be a number of bytes")
    return int(text)


def require_encoding(request: "Request", *, as_proposed: bool) -> None:
    """Refuse a transfer-encoding: any for the upload of the proposal (403), all but chunked for others."""
    coding = request.transfer_encoding
    if coding is None or (not as_proposed and coding.lower() == "chunked"):
        return
    raise Refusal(HTTPStatus.FORBIDDEN, XenAPIError("IMPORT_ERROR_CANNOT_HANDLE_CHUNKED"))


def require_plain(request: "Request") -> None:
    """Refuse a part of a body, as of an upload that is gone on with (400), a compressed one and a form (415).

    As the beginning of the disk, or as its bytes, each would spoil it (RFC 9110, sections 14.5, 8.4, 8.3.3).
    """
    part = request.headers.get("content-range")
    if part is not None:
        reason = "an upload can't be resumed, send all of it"
        error = XenAPIError("VALUE_NOT_SUPPORTED", "content-range", part[:100], reason)
        raise Refusal(HTTPStatus.BAD_REQUEST, error)
    coding = request.headers.get("content-encoding", "identity").strip()
    if coding.lower() not in ("", "identity"):
        reason = "unpack what you send"
        error = XenAPIError("VALUE_NOT_SUPPORTED", "content-encoding", coding[:50], reason)
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, error)
    # Other types say nothing: curl and wget name that of a form's fields for bytes as they are.
    media = request.headers.get("content-type", "").partition(";")[0].strip()
    if media.lower().startswith("multipart/"):
        reason = "the disk has to be the body itself, not a part of a form (curl: -T, not -F)"
        error = XenAPIError("VALUE_NOT_SUPPORTED", "content-type", media[:50], reason)
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, error)


def _unsupported(request: "Request", name: str, reason: str) -> Refusal:
    value = (request.parameter(name) or "")[:50]
    return Refusal(HTTPStatus.NOT_FOUND, XenAPIError("VALUE_NOT_SUPPORTED", name, value, reason))
