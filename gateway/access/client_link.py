"""One connection to the control socket, as a client has it: blocking. Standard library only.

The trap: descriptors come beside the bytes of a message; what nobody takes is closed with the connection.
"""

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections import deque
from typing import Final

from gateway.access.protocol import (
    ANCILLARY_SPACE,
    Closed,
    Decoder,
    Message,
    ProtocolError,
    close_descriptors,
    encode,
    pack_descriptors,
    unpack_descriptors,
)

_TIME: Final = struct.Struct("ll")  # struct timeval: seconds, microseconds
ANSWER_SECONDS: Final = 30.0  # the gateway waits for others up to its limit lease_wait before it refuses


class ClientLink:
    """One connection to the control socket, blocking."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        self._descriptors: list[int] = []

    @classmethod
    def connect(cls, path: str) -> "ClientLink":
        """Connect to the socket at `path`, which may be of any length. Raises OSError."""
        directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                _connect(connected, ANSWER_SECONDS, f"/proc/self/fd/{directory}/{os.path.basename(path)}")
            except BaseException:
                connected.close()
                raise
        finally:
            os.close(directory)
        return cls(connected)

    def send(self, message: Message, descriptors: list[int] | None = None) -> None:
        """Send a message, with descriptors or without. Raises OSError."""
        data = encode(message)
        sent = self._socket.sendmsg([data], pack_descriptors(descriptors) if descriptors else [])
        if sent < len(data):
            self._socket.sendall(data[sent:])

    def receive(self, seconds: float) -> Message | None:
        """The next message, None at the end. Raises TimeoutError after `seconds`, OSError, ProtocolError."""
        deadline = time.monotonic() + seconds
        while not self._messages:
            self._wait(deadline - time.monotonic())
            data, ancillary, flags, _ = self._socket.recvmsg(16384, ANCILLARY_SPACE, socket.MSG_CMSG_CLOEXEC)
            self._descriptors += unpack_descriptors(ancillary)
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("not all descriptors came: there are too many open files in this process")
            if not data:
                return None
            self._messages += self._decoder.feed(data)
        return self._messages.popleft()

    def _wait(self, seconds: float) -> None:
        """Until something comes. The socket's own time-out is that of `send`, in another thread perhaps."""
        waiting = select.poll()
        try:
            waiting.register(self._socket, select.POLLIN)
        except ValueError as closed:
            raise OSError(errno.EBADF, "the connection was closed here") from closed
        if not waiting.poll(max(seconds, 0) * 1000):
            raise TimeoutError("the gateway says nothing")

    def take_descriptors(self) -> list[int]:
        """What came along with the messages so far; the caller's to close."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def end(self) -> None:
        """Say that the disk is closed; the gateway closes the connection once the lease has ended."""
        with contextlib.suppress(OSError):
            self.send(Closed())
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection and what came over it."""
        close_descriptors(self.take_descriptors())
        self._socket.close()


def _connect(connecting: socket.socket, seconds: float, address: str) -> None:
    """Connect, and wait for room in the queue of those who want to for so long; have it as time-out then.

    The socket has to block at first: unix(7) says EAGAIN at once to one with a time-out of Python's.
    """
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(int(seconds), 0))
    try:
        connecting.connect(address)
    except BlockingIOError as error:
        raise TimeoutError("the gateway is there, but lets nobody in") from error
    connecting.settimeout(seconds)
