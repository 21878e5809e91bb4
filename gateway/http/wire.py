"""One accepted connection as bytes: TCP, Unix socket or TLS, driven by trio or by one worker thread.

The socket is non-blocking for its whole life, under trio and in a thread alike: a thread waits with poll() on
the socket and on an eventfd, so that abort() wakes it at once and nothing has to be switched back afterwards.
Heads and small bodies are read under trio; disk bytes in a thread, straight into the caller's buffer. Polling
with SO_RCVLOWAT set to 256 KiB receives 1.5 to 3 times as fast as a blocking recv, because the thread sleeps
until a good piece has come instead of waking for every segment.

The trap: SSLSocket.shutdown() and SSLSocket.close() throw the TLS state away under a thread that uses it, so
the unbound methods of socket.socket are called wherever TLS must not be touched.
"""

import contextlib
import errno
import os
import select
import socket
import ssl
import struct
import threading
from time import monotonic
from typing import Final

import trio

from gateway.transfers.body import BodyReset, BodyStalled, Bytes, SinkClosed, SinkStalled, TransferAborted

_LOW_WATER: Final = 256 << 10
_TLS_RECORD_SLACK: Final = 32 << 10  # OpenSSL may hold one record (16 KiB and overhead) that poll can't see
_FILE_PIECE: Final = 256 << 10
_ZEROES_LENGTH: Final = 16 << 20
_FAREWELL_INTERVAL: Final = 1.0
_LINGER_NOT: Final = struct.pack("ii", 1, 0)
_PEER_GONE: Final = frozenset(
    {
        errno.EPIPE,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EBADF,
    }
)


class WireBroken(Exception):  # noqa: N818 - a state of the wire
    """The connection was reset, closed by the other side, or its TLS is broken."""


class Wire:
    """An accepted socket under trio. Deadlines are the caller's: every method can be cancelled."""

    def __init__(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        sock.setblocking(False)
        self.scheme: Final = "http" if tls is None else "https"
        self.address: Final = peer_address(sock)
        self.closed = False
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._tls: ssl.SSLSocket | None = None
        if tls is not None:
            # A missing close_notify is an end of file: some clients of disk images never send it, and the
            # length of the body is checked anyway.
            sock = self._tls = tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
            )
        self._socket: Final = sock

    async def handshake(self) -> None:
        """Do the TLS handshake; nothing for plain sockets. Raises WireBroken."""
        if self._tls is None:
            return
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._socket)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._socket)
            except (OSError, ValueError) as error:  # ValueError: the socket was closed under the handshake
                raise WireBroken(str(error)) from error
            else:
                return

    async def receive_some(self, limit: int = 65536) -> bytes:
        """Some bytes, b"" at the end of file. Raises WireBroken."""
        # Of TLS one record comes at a time, and it may hold one byte: with thousands of them there, everybody
        # else gets a turn here.
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self._socket.recv(limit)
            except (BlockingIOError, ssl.SSLWantReadError):
                await trio.lowlevel.wait_readable(self._socket)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._socket)
            except ssl.SSLZeroReturnError:
                return b""
            except OSError as error:
                raise WireBroken(str(error)) from error

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of `data`. Raises WireBroken."""
        await trio.lowlevel.checkpoint_if_cancelled()
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await trio.lowlevel.wait_writable(self._socket)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._socket)
            except OSError as error:
                raise WireBroken(str(error)) from error

    async def half_close_and_drain(self, limit: int, seconds: float) -> None:
        """Say that nothing more comes, then throw away what the other side still sends.

        Closing a TCP socket that holds unread bytes sends a reset, and a reset makes the other side's kernel
        forget the answer it has not read yet. So a client that is still streaming gets up to `limit` bytes
        and `seconds` to find the answer. Never raises but on cancellation.
        """
        if self._tls is not None:
            with contextlib.suppress(OSError, ValueError):
                self._tls.unwrap()  # sends close_notify; does not wait for the other one, which would raise
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
        except OSError:
            return
        scratch = bytearray(min(limit, 256 << 10) or 1)
        with trio.move_on_after(seconds):
            while limit > 0:
                try:
                    got = socket.socket.recv_into(self._socket, scratch)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._socket)
                    continue
                except OSError:
                    return
                if not got:
                    return
                limit -= got
                await trio.lowlevel.checkpoint()

    async def gone(self) -> None:
        """Return once the other side has closed the connection, or its end of it. Reads nothing.

        Bytes that have come before, such as TLS's word of farewell or the next request, keep the socket
        readable; behind them the end is looked for once a second.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLRDHUP)
        while True:
            state = sum(flags for _, flags in poll.poll(0))
            if state & ~select.POLLIN:
                return
            if state:
                await trio.sleep(_FAREWELL_INTERVAL)
            else:
                await trio.lowlevel.wait_readable(self._socket)

    def for_thread(self, idle_seconds: float, first: bytes = b"") -> "ThreadWire":
        """The same socket for one worker thread. `first` was received already and belongs to the body.

        Until ThreadWire.close() is called, nothing else may be done with this wire.
        """
        return ThreadWire(self._socket, tls=self._tls is not None, idle_seconds=idle_seconds, first=first)

    def reset(self) -> None:
        """Close the socket so that the other side sees a broken connection, and forget what is unsent."""
        if not self.closed:
            with contextlib.suppress(OSError):
                socket.socket.setsockopt(self._socket, socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            self.close()

    def close(self) -> None:
        """Close the socket at once. Repeatable."""
        if not self.closed:
            self.closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


class ThreadWire:
    """A wire's socket for one worker thread: the Body of an import, the Sink of an export."""

    def __init__(self, sock: socket.socket, *, tls: bool, idle_seconds: float, first: bytes) -> None:
        self._socket: Final = sock
        self._is_tls: Final = tls
        self._idle: Final = idle_seconds
        self.sent = 0
        self._first = memoryview(first)
        self._aborted = False
        self._low_water = 1
        self._has_low_water: Final = sock.family != socket.AF_UNIX
        self._scratch: bytearray | None = None
        self._wake_lock: Final = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll: Final = select.poll()
        self._poll.register(self._wake, select.POLLIN)

    # --- both directions

    def abort(self) -> None:
        self._aborted = True
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Give the socket back to its wire; it stays open."""
        self._set_low_water(1)
        with self._wake_lock:
            wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)

    def _wait(self, events: int, seconds: float) -> bool:
        """Until the socket is ready (True) or `seconds` have passed (False). Raises TransferAborted."""
        self._poll.register(self._socket, events)
        ready = self._poll.poll(max(0.0, seconds) * 1000)
        if self._aborted:
            raise TransferAborted
        return bool(ready)

    # --- receiving

    def recv_into(self, view: memoryview) -> int:
        if self._aborted:
            raise TransferAborted
        if self._first:
            return self._take_first(view)
        deadline: float | None = None
        timed_out = False
        while True:
            events = select.POLLIN
            try:
                return self._socket.recv_into(view)
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except ssl.SSLZeroReturnError:
                return 0
            except OSError as error:
                raise BodyReset(str(error)) from error
            # After a time-out recv was tried once more: a slow client stays below the low-water mark.
            if timed_out:
                raise BodyStalled(self._idle)
            if deadline is None:
                deadline = monotonic() + self._idle
                slack = _TLS_RECORD_SLACK if self._is_tls else 0
                self._set_low_water(max(1, min(_LOW_WATER, len(view) - slack)))
            timed_out = not self._wait(events, deadline - monotonic())

    def _take_first(self, view: memoryview) -> int:
        count = min(len(view), len(self._first))
        view[:count] = self._first[:count]
        self._first = self._first[count:]
        return count

    def more_within(self, seconds: float) -> bool:
        if self._first:
            return True
        self._set_low_water(1)
        deadline = monotonic() + seconds
        byte = bytearray(1)
        while True:
            events = select.POLLIN
            try:
                return self._socket.recv_into(byte) > 0
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except OSError:
                return False
            if not self._wait(events, deadline - monotonic()):
                return False

    def _set_low_water(self, count: int) -> None:
        if count != self._low_water and self._has_low_water:
            self._low_water = count
            with contextlib.suppress(OSError):  # a socket that is gone says so to the next recv
                socket.socket.setsockopt(self._socket, socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    # --- sending

    def send(self, data: Bytes) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            if self._aborted:
                raise TransferAborted
            events = select.POLLOUT
            try:
                sent = self._socket.send(rest)
                rest = rest[sent:]
                self.sent += sent
                continue
            except (BlockingIOError, ssl.SSLWantWriteError):
                pass
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except OSError as error:
                raise SinkClosed(str(error)) from error
            if not self._wait(events, self._idle):
                raise SinkStalled(self._idle)

    def sendfile(self, fd: int, offset: int, length: int) -> None:
        if self._is_tls:
            self._send_file_encrypted(fd, offset, length)
            return
        out = self._socket.fileno()
        end = offset + length
        while offset < end:
            if self._aborted:
                raise TransferAborted
            try:
                sent = os.sendfile(out, fd, offset, end - offset)
            except BlockingIOError:
                if not self._wait(select.POLLOUT, self._idle):
                    raise SinkStalled(self._idle) from None
                continue
            except OSError as error:
                if error.errno in _PEER_GONE:
                    raise SinkClosed(str(error)) from error
                raise
            if not sent:
                raise OSError(errno.EIO, f"the image file ends at {offset}, before {end}")
            offset += sent
            self.sent += sent

    def _send_file_encrypted(self, fd: int, offset: int, length: int) -> None:
        if self._scratch is None:
            self._scratch = bytearray(_FILE_PIECE)
        view = memoryview(self._scratch)
        while length:
            got = os.preadv(fd, (view[: min(length, len(view))],), offset)
            if not got:
                raise OSError(errno.EIO, f"the image file ends at {offset}, {length} bytes too early")
            self.send(view[:got])
            offset += got
            length -= got

    def zeroes(self, length: int) -> None:
        source = None if self._is_tls else _sparse_file()
        while length:
            piece = min(length, _ZEROES_LENGTH if source is not None else len(_ZERO_BYTES))
            if source is None:
                self.send(_ZERO_BYTES[:piece])
            else:
                self.sendfile(source, 0, piece)
            length -= piece


_ZERO_BYTES: Final = memoryview(bytes(_FILE_PIECE))
_sparse_lock: Final = threading.Lock()
_sparse: list[int] = []


def _sparse_file() -> int:
    """One sparse file in memory for the process, the source of the zeroes of holes; it occupies nothing."""
    with _sparse_lock:
        if not _sparse:
            fd = os.memfd_create("vdi-gateway-zeroes", os.MFD_CLOEXEC)
            os.ftruncate(fd, _ZEROES_LENGTH)
            _sparse.append(fd)
        return _sparse[0]


def peer_address(sock: socket.socket) -> str:
    """The other side's IP address without its port, "unix" for a Unix socket."""
    if sock.family == socket.AF_UNIX:
        return "unix"
    try:
        return str(sock.getpeername()[0])
    except OSError:
        return "unknown"
