"""One connection of the control socket, as the gateway has it: messages, descriptors, and who is there.

The trap: any message may bring descriptors, asked for or not; those that nobody takes are closed with the
connection. A close may wait for the file system, which a client may have made itself, for ever.
"""

import contextlib
import socket
from collections import deque
from typing import Final

import trio

from gateway.access.protocol import (
    ANCILLARY_SPACE,
    Announce,
    Decoder,
    Message,
    ProtocolError,
    Refused,
    close_descriptors,
    encode,
    pack_descriptors,
    unpack_descriptors,
)
from gateway.core.errors import XenAPIError
from gateway.core.peer import Peer, peer_of
from gateway.core.threads import in_thread

_SEND_SECONDS: Final = 30.0
_PIECE: Final = 16384


class Link:
    """One accepted connection. Descriptors that nobody takes are closed with it."""

    def __init__(self, accepted: trio.socket.SocketType) -> None:
        self._socket = accepted
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        self._descriptors: list[int] = []
        self._sending = trio.Lock()
        self.peer: Final[Peer] = peer_of(accepted)

    async def receive(self) -> Message | None:
        """The next message, None at the end. Raises ProtocolError, OSError."""
        while not self._messages:
            data, ancillary, flags, _ = await self._socket.recvmsg(
                _PIECE, ANCILLARY_SPACE, socket.MSG_CMSG_CLOEXEC
            )
            come = unpack_descriptors(ancillary)
            if self._descriptors and come:
                close_descriptors(come)
                raise ProtocolError("descriptors came with two messages")
            self._descriptors += come
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("more descriptors came than a chain has files, or than may be open here")
            if not data:
                if self._decoder.is_empty:
                    return None
                raise ProtocolError("the connection ended within a message")
            self._messages += self._decoder.feed(data)
        message = self._messages.popleft()
        if self._descriptors and not isinstance(message, Announce):
            raise ProtocolError("descriptors came with a message that has none")
        return message

    def take_descriptors(self) -> list[int]:
        """What came along with an announcement; the caller's to close, or to give back."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def give_back(self, descriptors: list[int]) -> None:
        """They are of no use, and are closed with the connection."""
        self._descriptors += descriptors

    async def send(self, message: Message, descriptors: list[int] | None = None) -> None:
        """Send a message whole. Raises OSError, also when the client takes nothing for half a minute."""
        data = encode(message)
        ancillary = pack_descriptors(descriptors) if descriptors else []
        async with self._sending:
            with trio.move_on_after(_SEND_SECONDS) as waiting:
                while data:
                    sent = await self._socket.sendmsg([data], ancillary)
                    data, ancillary = data[sent:], []
            if waiting.cancelled_caught:
                raise TimeoutError("the client takes no messages")

    async def refuse(self, error: XenAPIError) -> None:
        """Say why not; who doesn't listen any more need not know."""
        clean = [printable(text) for text in (error.code, error.message, *error.params)]
        with contextlib.suppress(OSError, ProtocolError):
            await self.send(Refused(clean[0], tuple(clean[2:]), clean[1]))

    async def aclose(self, threads: trio.CapacityLimiter) -> None:
        """Close the connection, and in one of the threads what came over it."""
        self._socket.close()
        if came := self.take_descriptors():
            await in_thread(close_descriptors, came, limiter=threads, abandon_on_cancel=True)


def printable(text: str) -> str:
    """Text that can be sent and logged: a file's name may hold what is no text."""
    return text.encode("utf-8", "replace").decode()
