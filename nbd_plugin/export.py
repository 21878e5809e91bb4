"""One connection's disk: what nbdkit's callbacks do, without nbdkit.

A connection has a lease of its own, so that it ends with the connection and can be revoked alone. Readers may
come in any number; whoever writes is alone, which is why one process owns the allocation of blocks.
The trap: a client opens an export two times, for INFO and for GO, and others come to look only; so opening
reads nothing but what the format needs.
"""

import math
import os
from dataclasses import dataclass
from itertools import islice
from typing import Final

from gateway.access.client import AccessDisk, open_vdi
from gateway.access.client_patience import patiently
from gateway.images.disk import ExtentKind, FileRange
from nbd_plugin.export_name import ExportName, ExportNameError, parse_export_name

# One answer to a block status request; what is left out the client asks for again.
MOST_EXTENTS: Final = 8192


@dataclass(frozen=True, slots=True)
class Parameters:
    """How nbdkit was started. `control` is the gateway's access socket, an absolute path.

    `private` says that whoever can connect to this socket may have any disk, without a session. `purpose` is
    told to people who meet a lease. `outlive`: don't end with the process that started nbdkit. `leash` is the
    descriptor of the supervisor, `clients` how many may be connected at a time (0: any number), `handshake`
    how many seconds a client may be connected that opens nothing (0: any time), `wait` how many seconds a
    client is kept waiting while the gateway isn't there. `parallel`: several requests of a connection at a
    time, with any nbdkit.
    """

    control: str = ""
    private: bool = False
    purpose: str = "nbd"
    outlive: bool = False
    leash: str = ""
    clients: int = 0
    handshake: float = 30.0
    wait: float = 5.0
    parallel: bool = False

    def with_value(self, key: str, value: str) -> "Parameters":
        """These parameters and one more. Raises ValueError."""
        given = {name: getattr(self, name) for name in self.__slots__}
        if key not in given:
            raise ValueError(f"there is no parameter {key}; there are {', '.join(given)}")
        match given[key]:
            case bool():
                given[key] = _flag(key, value)
            case int() | float() as usual:
                given[key] = _number(key, value, type(usual))
            case _:
                # nbdkit changes its directory.
                given[key] = os.path.abspath(value) if key == "control" else value
        return Parameters(**given)


class Export:
    """An open VDI, or ExportNameError, AccessRefused, ImageError, OSError."""

    def __init__(self, name: str, parameters: Parameters) -> None:
        asked = parse_export_name(name)
        if asked.session is None and not parameters.private:
            raise ExportNameError("the export name has no session_id, and this is not a private socket")
        self.disk: Final = _opened(asked, parameters)
        self.vdi: Final = asked.vdi
        self.size: Final = self.disk.size
        self.writable: Final = asked.write
        self.read: Final = self.disk.reader()  # nbdkit has checked that the range is on the disk

    def extents(self, offset: int, length: int, *, first_only: bool) -> "list[tuple[int, int, ExtentKind]]":
        """What the range is made of, from its beginning on and not beyond its end, though maybe less."""
        most = 1 if first_only else MOST_EXTENTS
        return [
            (extent.offset, extent.length, extent.kind)
            for extent in islice(self.disk.extents(offset, length), most)
        ]

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the kernel to read what a client is going to ask for."""
        for segment in self.disk.segments(offset, length):
            if isinstance(segment, FileRange):
                os.posix_fadvise(segment.fd, segment.offset, segment.length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Make what was written durable and end the lease. Raises OSError when that failed."""
        self.disk.close()


def _opened(asked: ExportName, parameters: Parameters) -> AccessDisk:
    def ask() -> AccessDisk:
        return open_vdi(
            parameters.control,
            asked.vdi,
            write=asked.write,
            session=asked.session,
            purpose=parameters.purpose,
        )

    return patiently(ask, parameters.wait)


def _number(key: str, value: str, kind: type[int] | type[float]) -> float:
    try:
        number = kind(value)
    except ValueError:
        number = -1
    if not 0 <= number < math.inf:
        raise ValueError(f"{key} is a number from 0 on")
    return number


def _flag(key: str, value: str) -> bool:
    if value not in {"true", "false"}:
        raise ValueError(f"{key} is true or false")
    return value == "true"
