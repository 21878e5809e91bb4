"""What a client asks for by the name of an export: a VDI, the session that may have it, and how.

`/<uuid>?session_id=<reference>` is XenServer's form (VDI.get_nbd_info gives it); `mode=rw` asks for writing,
and so does `rw` alone, which scripts in the wild append. Pure: nothing is looked up here.
The trap: the name comes from anybody who can connect. Whatever isn't exactly this form is refused, never
read leniently, so that a mistyped request for writing doesn't become one for reading.
"""

import re
from dataclasses import dataclass, field
from typing import Final

MAX_NAME: Final = 1024  # bytes; the protocol allows 4096
MAX_SESSION: Final = 256
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ESCAPE: Final = re.compile(r"%(..?|$)", re.DOTALL)
_HEXADECIMAL: Final = re.compile(r"[0-9A-Fa-f]{2}")
_VISIBLE: Final = re.compile(r"[\x21-\x7e]*")  # of ASCII; references have no blanks


class ExportNameError(ValueError):
    """The name is not that of an export; the text says why and can be shown, the name itself is not in it."""


@dataclass(frozen=True, slots=True)
class ExportName:
    """One VDI by its uuid (lower case). The session is a secret and not shown."""

    vdi: str
    session: str | None = field(default=None, repr=False)
    write: bool = False


def parse_export_name(name: str) -> ExportName:
    """Read the name of an export. Raises ExportNameError."""
    if len(name) > MAX_NAME:
        raise ExportNameError("the export name is too long")
    if not _VISIBLE.fullmatch(name):
        raise ExportNameError("the export name has characters that no VDI's has")
    path, mark, query = name.partition("?")
    uuid = _decoded(path.removeprefix("/")).lower()
    if not _UUID.fullmatch(uuid):
        raise ExportNameError("the export name does not begin with the uuid of a VDI")
    session: str | None = None
    mode: str | None = None
    for part in query.split("&") if mark else ():
        key, equals, value = part.partition("=")
        key, value = _decoded(key), _decoded(value)
        if key == "rw" and not equals:
            key, value = "mode", "rw"
        if key == "session_id" and session is None and 0 < len(value) <= MAX_SESSION:
            session = value
        elif key == "mode" and mode is None and value in {"ro", "rw"}:
            mode = value
        else:
            raise ExportNameError("after the uuid come session_id=REFERENCE and mode=ro|rw, once each")
    return ExportName(uuid, session, mode == "rw")


def _decoded(text: str) -> str:
    """Resolve percent escapes; what they stand for must be visible ASCII as well."""
    decoded = _ESCAPE.sub(_character, text)
    if not _VISIBLE.fullmatch(decoded):
        raise ExportNameError("the export name has an escape for a character that no VDI's has")
    return decoded


def _character(escape: re.Match[str]) -> str:
    if not _HEXADECIMAL.fullmatch(escape[1]):
        raise ExportNameError("the export name has a percent sign that begins no escape")
    return chr(int(escape[1], 16))
