"""A connection to a server: its name resolved, the address judged, that very one connected to, perhaps TLS.

For a worker thread that can be woken at any time: whatever waits does so by poll() on its descriptor and on
an eventfd. The trap: a name may stand for another address each time it is asked for, so it is asked once, and
what was judged is what is connected to.
"""

import errno
import ipaddress
import os
import select
import socket
import ssl
import threading
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

from gateway.core.errors import XenAPIError
from gateway.transfers.body import TransferAborted
from gateway.transfers.pull_source import ImageURL, IPAddress, PullRules

_MOST_ADDRESSES: Final = 8

# A family of addresses, and what connect() takes of one.
_Place = tuple[int, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: to find and reach a server, without a good piece of an answer, before each new attempt."""

    connect: float = 12.0
    idle: float = 60.0
    pauses: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)


class Broken(Exception):  # noqa: N818  a state of the transfer
    """An attempt failed, and another may succeed; `error` is what to say if none does."""

    def __init__(self, error: XenAPIError) -> None:
        super().__init__(str(error))
        self.error = error


class Unreachable(Broken):
    """Nobody answers there at all."""


class Interrupt:
    """What wakes the thread of one transfer, from any other one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._aborted = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def abort(self) -> None:
        """The wait of the thread and all later ones raise TransferAborted."""
        with self._lock:
            self._aborted = True
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """The thread has ended."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def wait(self, fd: int | None, events: int, seconds: float) -> bool:
        """Until the descriptor is ready (True) or `seconds` have passed (False). Raises TransferAborted."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if fd is not None:
            poll.register(fd, events)
        ready = poll.poll(max(0.0, seconds) * 1000)
        self.check()
        return bool(ready)

    def check(self) -> None:
        """Raise TransferAborted if somebody has aborted: for who has bytes, and so doesn't wait."""
        if self._aborted:
            raise TransferAborted


def open_socket(url: ImageURL, rules: PullRules, patience: Patience, interrupt: Interrupt) -> socket.socket:
    """A connection that doesn't block, over which the request can be sent. Blocks.

    Raises Unreachable, TransferAborted, XenAPIError: PULL_ERROR_ADDRESS_REFUSED, PULL_ERROR_CERTIFICATE.
    """
    opening = _Opening(url, rules, patience, interrupt)
    plain = opening.connect()
    if url.scheme == "http":
        return plain
    try:
        return opening.encrypt(plain)
    except BaseException:
        plain.close()
        raise


@dataclass(frozen=True, slots=True)
class _Opening:
    """The way to one connection."""

    url: ImageURL
    rules: PullRules
    patience: Patience
    interrupt: Interrupt

    def connect(self) -> socket.socket:
        """To the first address that may be and answers."""
        url, until = self.url, monotonic() + self.patience.connect
        permitted: list[_Place] = []
        objection: XenAPIError | None = None
        for family, place in self._addresses():
            address = _address_of(place)
            kind = self.rules.objection(url.host, address)
            if kind is None:
                permitted.append((family, place))
            else:
                objection = XenAPIError("PULL_ERROR_ADDRESS_REFUSED", str(url), str(address), kind)
        if not permitted:
            assert objection is not None
            raise objection
        why = ""
        for number, (family, place) in enumerate(permitted[:_MOST_ADDRESSES]):
            # The first ones must not take the time of those that would answer.
            left = max(0.0, until - monotonic()) / min(2, len(permitted) - number)
            try:
                return self._connect_to(family, place, left)
            except OSError as error:
                why = error.strerror or str(error)
        raise self._unreachable(why)

    def _unreachable(self, why: str) -> Unreachable:
        return Unreachable(XenAPIError("PULL_ERROR_UNREACHABLE", str(self.url), why))

    def _addresses(self) -> list[_Place]:
        """What the host's name stands for. The resolver can't be woken, so it has a thread to hang in."""
        host, port = self.url.host, self.url.port
        found: list[_Place] = []
        failed: list[OSError | UnicodeError] = []
        done, tell = os.pipe2(os.O_CLOEXEC)

        def resolve() -> None:
            try:
                answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                found.extend((int(family), tuple(place)) for family, _, _, _, place in answers)
            except (OSError, UnicodeError) as error:
                failed.append(error)
            finally:
                os.close(tell)

        threading.Thread(target=resolve, name="resolver", daemon=True).start()
        try:
            told = self.interrupt.wait(done, select.POLLIN, self.patience.connect)
        finally:
            os.close(done)
        if not told:
            raise self._unreachable("its name could not be resolved in time")
        if failed or not found:
            why = getattr(failed[0], "strerror", None) if failed else None
            raise self._unreachable(f"its name can't be resolved: {why or 'it has no address'}")
        return found

    def _connect_to(self, family: int, place: tuple[Any, ...], seconds: float) -> socket.socket:
        """A connection to this very address. Raises OSError, TransferAborted."""
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            code = made.connect_ex(place)
            if code == errno.EINPROGRESS:
                answered = self.interrupt.wait(made.fileno(), select.POLLOUT, seconds)
                code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if answered else errno.ETIMEDOUT
        except BaseException:
            made.close()
            raise
        if code:
            made.close()
            raise OSError(code, os.strerror(code))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return made

    def encrypt(self, plain: socket.socket) -> ssl.SSLSocket:
        """TLS over the connection, the certificate verified. The socket is closed if it can't be."""
        context = ssl.create_default_context()
        authorities = self.rules.authorities
        if authorities:
            try:
                context.load_verify_locations(authorities)
            except (OSError, ssl.SSLError) as error:
                why = f"{authorities} can't be used: {getattr(error, 'strerror', None) or error}"
                raise XenAPIError("PULL_ERROR_CERTIFICATE", self.url.host, why) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        # The end of a body without a length must be told, or a cut would be taken for it.
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        try:
            encrypted = context.wrap_socket(
                plain,
                server_hostname=self.url.host,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            )
        except (OSError, ValueError) as error:
            raise self._unreachable(f"TLS can't be begun: {error}") from error
        try:
            self._shake_hands(encrypted)
        except BaseException:
            encrypted.close()
            raise
        return encrypted

    def _shake_hands(self, encrypted: ssl.SSLSocket) -> None:
        until = monotonic() + self.patience.connect
        while True:
            try:
                encrypted.do_handshake()
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except ssl.SSLCertVerificationError as error:
                raise XenAPIError("PULL_ERROR_CERTIFICATE", self.url.host, error.verify_message) from error
            except (ssl.SSLError, OSError) as error:
                reason = getattr(error, "reason", None)
                why = f"TLS can't be begun: {reason or error.strerror or error}"
                if reason == "WRONG_VERSION_NUMBER":
                    why = "it doesn't speak TLS; is it http://?"
                raise self._unreachable(why) from error
            else:
                return
            if not self.interrupt.wait(encrypted.fileno(), events, until - monotonic()):
                raise self._unreachable("it has not begun TLS in time; is it http://?")


def _address_of(place: tuple[Any, ...]) -> IPAddress:
    return ipaddress.ip_address(str(place[0]).partition("%")[0])
