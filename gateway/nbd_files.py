"""What the supervisor of NBD and its workers find in the state directory, and how the supervisor is started.

    nbd/             open to the group of the user that workers run as, when the gateway runs as root
    nbd/access.sock  the control socket for them: those of other users may not enter the state directory
    nbd/tls-*        certificate, key and authority in files that are called as nbdkit wants them

The trap: nbdkit reads three files, and a certificate may be exchanged at any time, also by one that can't be
used. So each certificate has a directory of its own, which is whole, durable and good once it has its name.
"""

import errno
import hashlib
import os
import pwd
import shutil
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import nbd_plugin
from gateway.certificates import ServerCertificate
from gateway.config import Config
from gateway.state import StateDirectory, write_private_file
from nbd_plugin.listening import is_loopback

SUPERVISOR: Final = str(Path(nbd_plugin.__file__).with_name("supervisor.py"))

_KEEP_TLS_BEFORE: Final = 1  # beside the present one: workers may just be starting with it


class NbdRefused(Exception):  # noqa: N818  it says what happened
    """NBD can't be served: one line that says why and what to do. `is_address`: the address can't be had."""

    def __init__(self, text: str, *, is_address: bool = False) -> None:
        super().__init__(text)
        self.is_address: Final = is_address


class NbdFiles:
    """The part of one state directory that is NBD's, for one configuration."""

    def __init__(self, state: StateDirectory, config: Config) -> None:
        """Raises NbdRefused when the configuration can't be served. `config.nbd` is an address."""
        assert config.nbd is not None
        self.state: Final = state
        self.host, self.port = config.nbd
        self.directory: Final = os.path.join(state.path, "nbd")
        self.control_socket: Final = os.path.join(state.path, "nbd-control.sock")
        self._config: Final = config
        name = config.named("listen.nbd")
        try:
            self.loopback: Final = is_loopback(self.host)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise NbdRefused(f"{name}: the host {self.host!r} can't be resolved: {reason}") from error
        self.user: Final = config.nbd_user if os.geteuid() == 0 and config.nbd_user != "root" else None
        self._group: int | None = None
        if self.user is not None:
            try:
                self._group = pwd.getpwnam(self.user).pw_gid
            except KeyError:
                raise NbdRefused(
                    f"{config.named('nbd.user')}: there is no user {self.user!r} on this machine; give one"
                    " that workers shall run as"
                ) from None

    @property
    def tls(self) -> bool:
        """Whether clients have to use TLS."""
        return not self.loopback and not self._config.nbd_insecure

    @property
    def access_socket(self) -> str | None:
        """Where the gateway has to listen for workers of another user; None without such."""
        return os.path.join(self.directory, "access.sock") if self._group is not None else None

    def prepare(self) -> None:
        """Make the directory. Raises OSError."""
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        if self._group is not None:
            os.chown(self.directory, 0, self._group)
            os.chmod(self.directory, 0o710)  # noqa: S103  the group may pass, and see nothing

    def open_to_workers(self, path: str) -> None:
        """Let the workers' user use a socket. Raises OSError."""
        if self._group is not None:
            os.chown(path, 0, self._group)
            os.chmod(path, 0o660)

    def certificates(self, certificate: ServerCertificate) -> str:
        """The directory of this certificate, made where needed; its `server-cert.pem` is what clients get.

        Raises OSError, also if certificate and key don't belong together.
        """
        self.prepare()
        chain, key = Path(certificate.chain).read_bytes(), Path(certificate.key).read_bytes()
        # Only a server that verifies its clients needs the authority, but nbdkit wants the file.
        authority = Path(certificate.authority).read_bytes() if certificate.authority else chain
        digest = hashlib.sha256(b"\0".join((chain, key, authority))).hexdigest()[:16]
        directory = os.path.join(self.directory, f"tls-{digest}")
        if not os.path.isdir(directory):
            unfinished = os.path.join(self.directory, "tls.new")
            with suppress(FileNotFoundError):
                shutil.rmtree(unfinished)
            os.mkdir(unfinished, 0o700)
            for name, data in (("ca-cert", authority), ("server-cert", chain), ("server-key", key)):
                path = os.path.join(unfinished, f"{name}.pem")
                write_private_file(path, data)
                if self._group is not None:
                    os.chown(path, 0, self._group)
                    os.chmod(path, 0o640)
            _check_pair(unfinished, certificate)
            if self._group is not None:
                os.chown(unfinished, 0, self._group)
                os.chmod(unfinished, 0o710)  # noqa: S103
            os.rename(unfinished, directory)
        os.utime(directory)
        self._remove_old(Path(directory))
        return directory

    def command(self, certificates: str | None, version: str, *arguments: str) -> list[str]:
        """The command line of the supervisor."""
        listen = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        limits = self._config.limits
        command = [sys.executable, "-I", "-S", SUPERVISOR, "--state-dir", self.state.path, "--listen", listen]
        command += ["--workers", str(int(limits["nbd_workers"]))]
        command += ["--clients", str(int(limits["nbd_clients"]))]
        command += ["--grace", str(limits["shutdown_seconds"]), "--version", version]
        command += ["--log-level", self._config.log_level]
        if self._config.nbd_insecure:
            command.append("--insecure")
        if self._config.nbd_parallel:
            command.append("--parallel")
        if certificates is not None:
            command += ["--tls", certificates]
        if self.user is not None:
            assert self.access_socket is not None
            command += ["--user", self.user, "--access", self.access_socket]
        return [*command, *arguments]

    def options(self, version: str) -> dict[str, object]:
        """What a supervisor that is kept on says of itself."""
        limits = self._config.limits
        return {
            "host": self.host,
            "port": self.port,
            "insecure": self._config.nbd_insecure,
            "parallel": self._config.nbd_parallel,
            "workers": int(limits["nbd_workers"]),
            "clients": int(limits["nbd_clients"]),
            "tls": self.tls,
            "user": self.user,
            "version": version,
        }

    def _remove_old(self, present: Path) -> None:
        # Where the clock was put back the present one isn't the latest.
        found = sorted(set(Path(self.directory).glob("tls-*")) - {present}, key=_changed, reverse=True)
        for each in found[_KEEP_TLS_BEFORE:]:
            shutil.rmtree(each, ignore_errors=True)


def _check_pair(directory: str, certificate: ServerCertificate) -> None:
    chain, key = (os.path.join(directory, f"server-{part}.pem") for part in ("cert", "key"))
    try:
        # A passphrase is not asked for.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password="")
    except ssl.SSLError as error:
        shutil.rmtree(directory)
        why = f"can't be used with {certificate.key} ({error.reason or error})"
        raise OSError(errno.EINVAL, why, certificate.chain) from error


def _changed(path: Path) -> float:
    return path.stat().st_mtime
