"""Who is at the other end of a Unix socket, as the kernel says: nobody can pretend to be somebody else."""

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import trio

_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred of unix(7): process, user, group


@dataclass(frozen=True, slots=True)
class Peer:
    """A process, and the user that it had when it connected."""

    process: int
    uid: int


def peer_of(connected: "socket.socket | trio.socket.SocketType") -> Peer:
    """The process that connected to a Unix socket. Raises OSError."""
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, uid, _ = _CREDENTIALS.unpack(packed)
    return Peer(process, uid)
