"""The way to a gateway: its Unix socket, plain HTTP, or HTTPS with a certificate that was checked.

Everything a command sends, calls and disks alike, goes through sockets that are made here. The trap: a
certificate is checked on each connection before the first byte is sent, since that byte may be part of a
password.
"""

import os
import socket
import ssl
import struct
import urllib.parse
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from gateway.cli.known_hosts import KnownHosts
from gateway.cli.output import CommandError, UsageError

CONNECT_SECONDS: Final = 20.0
STALL_SECONDS: Final = 120
_TIMEVAL: Final = struct.Struct("ll")
# By OpenSSL's X509_V_ERR_…: what another authority would not help against.
_ADVICE: Final = {
    9: "look at the clocks of both machines",
    10: "give the gateway a new one, and SIGHUP; or look at the clock of this machine",
    62: "give --url with a name that the certificate has",
    64: "give --url with an address that the certificate has",
}


class DoorClosedError(CommandError):
    """Nobody answers there (now)."""


@dataclass(frozen=True)
class Door:
    """One address of a gateway. `path` is that of a Unix socket; `authority` a PEM file, instead of
    remembering certificates."""

    url: str
    path: str | None = None
    authority: str | None = None

    def __post_init__(self) -> None:
        if self.path is None:
            self._parts  # noqa: B018 - a wrong address is told before anything is done

    @property
    def encrypted(self) -> bool:
        """Whether bytes go through TLS."""
        return self.path is None and self._parts.scheme == "https"

    @property
    def host(self) -> str:
        """What the Host header says."""
        return "localhost" if self.path is not None else self._parts.netloc

    @cached_property
    def _parts(self) -> urllib.parse.SplitResult:
        try:
            parts = urllib.parse.urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"--url: {self.url!r} is no address; give one as in https://host:8443")
        if parts.username is not None or parts.password is not None:
            raise UsageError("--url: an address holds no user and no password; give --user, --password-file")
        return parts

    @cached_property
    def _context(self) -> ssl.SSLContext:
        if self.authority is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # known_hosts decides instead
            return context
        try:
            return ssl.create_default_context(cafile=self.authority)
        except OSError as error:
            raise UsageError(
                f"--ca-file: {self.authority} can't be used: {error.strerror or error}; give a PEM file"
            ) from None

    def open(self, timeout: float | None = CONNECT_SECONDS) -> socket.socket:
        """A connected socket whose other end was checked. Its time-out is `timeout` seconds.

        DoorClosedError when nobody answers, CommandError when it isn't the gateway that is meant.
        """
        try:
            if self.path is not None:
                return _connect_unix(self.path, timeout)
            port = self._parts.port or (443 if self.encrypted else 80)
            connected = socket.create_connection((str(self._parts.hostname), port), timeout)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise DoorClosedError(
                f"no gateway answers at {self.url}: {error.strerror or error}; is it running?"
            ) from None
        return self._encrypt(connected, port) if self.encrypted else connected

    def _encrypt(self, connected: socket.socket, port: int) -> socket.socket:
        try:
            wrapped = self._context.wrap_socket(connected, server_hostname=self._parts.hostname)
        except ssl.SSLCertVerificationError as error:
            advice = _ADVICE.get(
                error.verify_code,
                "give the gateway's tls/ca.pem with --ca-file, or leave --ca-file out to have the certificate"
                " remembered",
            )
            raise CommandError(
                f"the certificate of {self.url} isn't trusted ({error.verify_message}); {advice}"
            ) from None
        except ssl.SSLError as error:
            raise CommandError(
                f"{self.url} doesn't speak HTTPS ({error.reason or error}); check the address"
            ) from None
        except OSError as error:
            raise DoorClosedError(f"{self.url} closed the connection: {error.strerror or error}") from None
        if self.authority is None:
            try:
                certificate = wrapped.getpeercert(binary_form=True)
                KnownHosts().check(f"{self._parts.hostname}:{port}", certificate or b"")
            except BaseException:
                wrapped.close()
                raise
        return wrapped


def _connect_unix(path: str, timeout: float | None) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(timeout)
        # A socket's address holds 107 bytes; through its directory's descriptor any path fits.
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connected.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        finally:
            os.close(directory)
    except BaseException:
        connected.close()
        raise
    return connected


def block(connected: socket.socket, seconds: int = STALL_SECONDS) -> None:
    """Let the kernel keep the time: the socket blocks, and after `seconds` without a byte a call fails.

    Python's own time-outs ask poll() before each call, and sendfile() knows nothing of them. Through TLS
    Python keeps it nevertheless: what the kernel gives up there, ssl tries again for ever.
    """
    if isinstance(connected, ssl.SSLSocket):
        connected.settimeout(seconds)
        return
    connected.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connected.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, 0))
