"""The one error of the API: a XenAPI code with its parameters, and one English sentence for each code.

Doors translate it: RPC sends `error_info`, HTTP bodies and the command line print `message`, a task keeps
`error_info`. Code names and parameter order are XenServer's where XenServer has the code
(idl/datamodel_errors.ml); the others are our own and follow the same form. The trap: a parameter may hold a
secret (SESSION_INVALID carries the session ref back to its sender), so a sentence names only parameters that
may be logged, and `str(error)` is that sentence.
"""

import errno
import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gateway.images.errors import ImageError

# A parameter that may be missing or empty: {n:detail} puts it into parentheses, {n:of user} names a user.
MESSAGES: Final[dict[str, str]] = {
    # Who you are and what you may do.
    "SESSION_INVALID": "The session is not known or has ended; log in again and use the new one.",
    "SESSION_AUTHENTICATION_FAILED": "The credentials{0:of user} could not be verified ({1}); "
    "check the user name and the password.",
    "RBAC_PERMISSION_DENIED": "Your role does not allow {0} ({1}); ask an administrator for a higher role.",
    "HOST_IS_SLAVE": "This host is not the pool's master; send the request to {0}.",
    # What was asked.
    "MESSAGE_METHOD_UNKNOWN": "There is no method {0}; check its name and the class before the dot.",
    "MESSAGE_PARAMETER_COUNT_MISMATCH": "{0} takes {1} parameters and was given {2}; correct the call.",
    "MESSAGE_DEPRECATED": "{0} is not offered any more; use its replacement.",
    "NOT_IMPLEMENTED": "{0} is not implemented here; use another way to do it.",
    "FIELD_TYPE_ERROR": "The value given for {0} has the wrong type; correct it.",
    "VALUE_NOT_SUPPORTED": "{0} cannot be {1!r}: {2}; give another value.",
    "MAP_DUPLICATE_KEY": "{0}.{1} of {2} has the key {3!r} already; remove it before adding it again.",
    "HANDLE_INVALID": "There is no {0} with the reference {1}; it may have been destroyed: look it up again.",
    "UUID_INVALID": "There is no {0} with the uuid {1}; check the uuid.",
    "DB_UNIQUENESS_CONSTRAINT_VIOLATION": "There is a {0} with the {1} {2} already; "
    "use that one or give another value.",
    "OPERATION_NOT_ALLOWED": "The operation is not allowed: {0}; see what has to be done first.",
    "OTHER_OPERATION_IN_PROGRESS": "Another operation is using the {0} {1}{2:detail}; "
    "wait until it has finished and try again.",
    # Disks and repositories.
    "VDI_NOT_NAMED": "The request names no VDI; add vdi=<reference or uuid> to its query.",
    "VDI_MISSING": "The image of the VDI is missing from its SR; put the file back or destroy the VDI.",
    "VDI_IN_USE": "The VDI {0} is in use ({1}); wait until that has finished and try again.",
    "VDI_READONLY": "The VDI {0} is read-only or a snapshot; write to a writable VDI instead.",
    "VDI_TOO_SMALL": "There is more data than the VDI {0} of {1} bytes holds; "
    "make the VDI larger or send a smaller disk.",
    "VDI_TOO_LARGE": "A disk of {0} bytes is too large, the maximum is {1}; ask for a smaller one.",
    "VDI_IO_ERROR": "Reading or writing the disk failed ({0}); check the storage under the SR.",
    "VDI_INCOMPATIBLE_TYPE": "The VDI {0} is of the type {1}, which has no such thing; name another VDI.",
    "VDI_NO_CBT_METADATA": "The changed blocks of the VDI {0} were not tracked; enable that before "
    "a snapshot is taken.",
    "NETWORK_INCOMPATIBLE_PURPOSES": "The purpose {0} does not go with {1}, for which NBD is served; "
    "the gateway's configuration says whether there is TLS.",
    "SR_NOT_ATTACHED": "The SR {0} is not attached to any host; attach it and try again.",
    "SR_FULL": "There is no space left on the SR ({0} bytes were asked for, {1} bytes are free); "
    "free some space and try again.",
    "SR_HAS_PBD": "The SR {0} is still attached; unplug its PBDs first.",
    "SR_HAS_NO_PBDS": "The SR {0} has no PBD; attach it to a host first.",
    "SR_NOT_EMPTY": "The SR {0} still holds VDIs; destroy or move them first.",
    "SR_UNKNOWN_DRIVER": "There is no SR type {0}; use a type that SR.get_supported_types lists.",
    # SM's own numbers (drivers/XE_SR_ERRORCODES.xml): device in use, SR scan failed, SR not available.
    "SR_BACKEND_FAILURE_16": "{1}; detach it there first, or attach it read-only.",
    "SR_BACKEND_FAILURE_40": "{1}; look at these images with vhd-check.",
    "SR_BACKEND_FAILURE_47": "{1}; look whether it is mounted and the path is right.",
    # SM's VDIType, CBTMetadataInconsistent, CBTChangedBlocksError.
    "SR_BACKEND_FAILURE_66": "{1}; copy the disk into a VHD, or use another one.",
    "SR_BACKEND_FAILURE_459": "{1}; the disk has become smaller in between: back it up in full.",
    "SR_BACKEND_FAILURE_460": "{1}; compare a snapshot with a later one of the same disk, taken while "
    "its changes were tracked without a break, or back it up in full.",
    # SM's SnapshotChainTooLong.
    "SR_BACKEND_FAILURE_109": "{1}; destroy snapshots that nobody needs and let the SR coalesce them, "
    "or copy the VDI.",
    # Transfers.
    "IMPORT_ERROR_PREMATURE_EOF": "The body ended after {1} of {0} bytes; "
    "nothing was changed: send it again.",
    "IMPORT_ERROR_LENGTH_REQUIRED": "The body had no length and ended after {1} of the {0} bytes that "
    "the VDI holds, so it may be cut short; nothing was changed: send it with a Content-Length.",
    "IMPORT_ERROR_CLIENT_STALLED": "No data came for {0} seconds; nothing was changed: send the disk again.",
    "EXPORT_ERROR_UNKNOWN_FORMAT": "There is no format {0!r} to export to; use raw, vhd or qcow2.",
    "EXPORT_ERROR_BASE_UNRELATED": "The VDI {0} can't be the base of a delta of {1}: {2}; "
    "name a snapshot of the same disk, or export the whole of it.",
    "EXPORT_ERROR_CLIENT_STALLED": "The client took no data for {0} seconds; download the disk again.",
    "IMPORT_ERROR_CANNOT_HANDLE_CHUNKED": "This transfer-encoding is not accepted here; "
    "send a Content-Length, or chunks with format=auto.",
    "IMPORT_ERROR_UNKNOWN_FORMAT": "The format {0!r} is not known here; use another one.",
    "IMPORT_ERROR_WRONG_FORMAT": "What was sent is not in the format {0} ({1}); "
    "nothing was changed: name the format that it has.",
    "IMPORT_ERROR_CORRUPT_IMAGE": "The {0} image that was sent is damaged ({1}); "
    "nothing was changed: look at the file, and send it again.",
    "IMPORT_ERROR_UNSUPPORTED_IMAGE": "The {0} image that was sent cannot be read here ({1}); "
    "nothing was changed: convert it, or send a raw disk.",
    "IMPORT_ERROR_SIZE_REQUIRED": "Nothing says how large the new VDI has to be; "
    "add virtual_size=<bytes> to the query, or send a Content-Length.",
    "IMPORT_ERROR_IMAGE_TOO_LONG": "The {0} image has more than {1} bytes, the most that are kept while "
    "it is read; send it as a raw disk or a VHD, or have spool_size raised.",
    "IMPORT_ERROR_CONVERTER_MISSING": "{0} images are read by {1}, which this gateway doesn't have; "
    "install it (Debian: qemu-utils), or send a raw disk or a VHD.",
    "IMPORT_ERROR_CONVERTER_LIMIT": "Reading the {0} image took more memory, or more than {1} seconds of a "
    "processor; nothing was changed: convert it, or send a raw disk.",
    "IMPORT_ERROR_BAD_COMPRESSION": "What {0} compressed can't be unpacked ({1}); "
    "nothing was changed: look at the file.",
    # What the gateway fetches itself.
    "PULL_ERROR_ADDRESS_REFUSED": "{0} is at {1}, {2}, from where nothing is fetched; "
    "if it is meant, name it in pull.from of the gateway's configuration.",
    "PULL_ERROR_BROKEN_OFF": "The connection to {0} broke off after {1} bytes, and trying again did not help "
    "({2}); nothing was changed: try again later.",
    "PULL_ERROR_CERTIFICATE": "The certificate of {0} could not be verified ({1}); "
    "pull.ca in the gateway's configuration names further authorities.",
    "PULL_ERROR_CHANGED": "{0} became another file while it was being fetched, after {1} bytes; "
    "nothing was changed: start again.",
    "PULL_ERROR_CHECKSUM": "{0} should have the checksum {1} and has {2}; "
    "nothing was changed: look which of them is right.",
    "PULL_ERROR_CHECKSUM_FILE": "{0} gives no checksum of {1} ({2}); give the checksum itself.",
    "PULL_ERROR_LENGTH_REQUIRED": "{0} tells neither its length nor its end, so a part of it could be taken "
    "for the whole; give its checksum.",
    "PULL_ERROR_NOT_HTTP": "The answer of {0} can't be used ({1}); check the URL and the server.",
    "PULL_ERROR_REDIRECT": "{0} redirects to where it isn't followed ({1}); give the final URL.",
    "PULL_ERROR_STATUS": "{0} answers with the status {1}; check the URL and who may read it.",
    "PULL_ERROR_UNREACHABLE": "{0} can't be reached from the gateway ({1}); check the URL and the network.",
    "TOO_MANY_TRANSFERS": "{0} transfers are running, the most that this gateway allows; try again later.",
    # Tasks.
    "TASK_CANCELLED": "The task {0} was cancelled; start the operation again if you still want it.",
    "TASK_INTERRUPTED": "The gateway was stopped while the task ran; start the operation again.",
    "TOO_MANY_PENDING_TASKS": "You have {0} pending tasks, the most that a user may have; "
    "destroy those that nobody needs.",
    # Events.
    "EVENT_FROM_TOKEN_PARSE_FAILURE": "{0!r} is no token of event.from; begin with an empty one.",
    "EVENT_SUBSCRIPTION_PARSE_FAILURE": "{0!r} is neither a class nor one of its objects; "
    "subscribe to a class, to class/reference, or to *.",
    "EVENTS_LOST": "Too much has changed since the last call; register again and read all records.",
    "SESSION_NOT_REGISTERED": "The session of {0} listens to no class; call event.register first, "
    "or better event.from.",
    "INTERNAL_ERROR": "The gateway failed unexpectedly ({0}); see its log.",
}


class _Missing(str):
    """A parameter that was not given."""


_MISSING: Final = _Missing("unknown")


class _Lenient(string.Formatter):
    """Fills in what there is: an error that fails while it is being told helps nobody."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if isinstance(key, int) and key < len(args):
            return args[key]
        return _MISSING

    def format_field(self, value: Any, format_spec: str) -> Any:
        if format_spec == "detail":
            return "" if value is _MISSING else f" ({value})"
        if format_spec == "of user":
            return "" if value is _MISSING or not value else f" of user {str(value)!r}"
        return super().format_field(value, format_spec)


_FORMATTER: Final = _Lenient()

# Characters; longer than any path. Strangers are answered with what they have sent, and tasks keep it.
_LONGEST_PARAMETER: Final = 5000


class XenAPIError(Exception):
    """A refusal or failure that the client is told, as XenAPI tells it: a code and string parameters."""

    def __init__(self, code: str, *params: str) -> None:
        shortened = tuple(map(_shortened, params))
        super().__init__(code, *shortened)
        self.code: Final = code
        self.params: Final[tuple[str, ...]] = shortened

    @property
    def error_info(self) -> list[str]:
        """The code followed by its parameters: `ErrorDescription` on the wire, `task.error_info`."""
        return [self.code, *self.params]

    @property
    def message(self) -> str:
        """One sentence, "what is wrong; what to do", without a line break. Never fails, whatever the
        parameters are.
        """
        template = MESSAGES.get(self.code)
        if template is None:
            detail = ", ".join(self.params)
            text = f"The operation failed with {self.code} ({detail})." if detail else f"{self.code}."
        else:
            text = _FORMATTER.vformat(template, self.params, {})
        return " ".join(text.split())

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def __repr__(self) -> str:
        return f"XenAPIError({str(self)!r})"


def _shortened(param: object) -> str:
    text = str(param)
    return text if len(text) <= _LONGEST_PARAMETER else f"{text[:_LONGEST_PARAMETER]}…"


def as_xenapi_error(error: BaseException) -> XenAPIError:
    """What a client is told about `error`.

    A group tells its most telling member: a XenAPIError before an I/O error before anything else. No space
    left (also over quota) is SR_FULL, other I/O errors and broken images are VDI_IO_ERROR, all else is
    INTERNAL_ERROR, but being stopped from outside (trio's cancellation, an interrupt) is TASK_INTERRUPTED.
    """
    import trio  # noqa: PLC0415  slow to load, and the command line tells errors without it

    # Nothing went wrong, somebody wants the program to end.
    stopped = (trio.Cancelled, KeyboardInterrupt, SystemExit)
    leaves = [leaf for leaf in _leaves(error) if not isinstance(leaf, stopped)]
    if not leaves:
        return XenAPIError("TASK_INTERRUPTED")
    for leaf in leaves:
        if isinstance(leaf, XenAPIError):
            return leaf
    for leaf in leaves:
        if isinstance(leaf, OSError):
            if leaf.errno in {errno.ENOSPC, errno.EDQUOT}:
                return XenAPIError("SR_FULL", "unknown", "0")
            return XenAPIError("VDI_IO_ERROR", _described(leaf))
        if isinstance(leaf, ImageError):
            return XenAPIError("VDI_IO_ERROR", str(leaf))
    return XenAPIError("INTERNAL_ERROR", _described(leaves[0]))


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for member in error.exceptions for leaf in _leaves(member)]
    return [error]


def _described(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
