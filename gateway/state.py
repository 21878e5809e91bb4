"""The state directory: everything a gateway keeps lies under it, and one gateway at a time has it.

    admin-password     the password of the user `root`, as XenServer names its own; 0600
    gateway.sqlite3    sessions, tasks, users, SR and VDI records
    tls/               the authority, the server certificate and their keys
    gateway.json       where the running gateway listens: read by the commands on the same machine
    xapi.sock          where the running gateway answers its own user without a password
    access.sock        where other processes get the descriptors of leased disks; 0660
    lock               held by the running gateway, names its process

The standard library and `images` only: the small commands read from here without loading the gateway. The
trap: the lock is the kernel's, the process number in the file is only for people. A file that is left over
locks nobody out, and gateway.json counts only while the lock is held: the port of a dead gateway may be
somebody else's by now, who must not be sent the password.
"""

import json
import os
import secrets
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gateway.images.file_locks import is_locked_wholly, lock_wholly

ADMINISTRATOR = "root"
STATE_DIR_VARIABLE = "VDI_GATEWAY_STATE_DIR"
_LONGEST_LINE = 4096  # bytes; a disk that is given for a password file has no line end for gigabytes


class StateError(Exception):
    """The state directory can't be used; the text says why and what to do."""


def write_private_file(path: str, data: bytes, *, mode: int = 0o600) -> None:
    """Replaces `path` by `data` in one durable step; nobody ever sees a half of it."""
    temporary = f"{path}.new"
    Path(temporary).unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """What gateway.json says: where the gateway listens, as URLs, and the authority of its certificate."""

    pid: int
    http: tuple[str, ...]
    https: tuple[str, ...]
    authority: str | None


class StateDirectory:
    """Paths under one state directory, and the lock on it."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.password_file = os.path.join(self.path, "admin-password")
        self.database = os.path.join(self.path, "gateway.sqlite3")
        self.tls = os.path.join(self.path, "tls")
        self.socket = os.path.join(self.path, "xapi.sock")
        self.access_socket = os.path.join(self.path, "access.sock")
        self._running = os.path.join(self.path, "gateway.json")
        self._lock = os.path.join(self.path, "lock")
        self._lock_fd: int | None = None

    @classmethod
    def take(cls, path: str) -> Self:
        """Creates the directory where needed and locks it for this process. StateError when that can't be."""
        state = cls(path)
        try:
            os.makedirs(state.path, mode=0o700, exist_ok=True)
            fd = os.open(state._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateError(
                f"{state.path} can't be used as state directory: {error.strerror};"
                " give a directory that this user may write with --state-dir"
            ) from error
        try:
            # A lock of the open file description: it can be asked about without taking it.
            lock_wholly(fd)
        except (BlockingIOError, PermissionError):
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise StateError(
                f"a gateway is running on {state.path} already (process {holder});"
                " stop it or give another --state-dir"
            ) from None
        except OSError as error:
            os.close(fd)
            raise StateError(
                f"{state.path} can't be locked: {error.strerror}; put it on a local file system"
            ) from error
        state._lock_fd = fd
        note = f"{os.getpid()}\n".encode()
        # For people alone: on a full disk the gateway starts without it. Cut last, to keep the block it has.
        with suppress(OSError):
            os.pwrite(fd, note, 0)
            os.ftruncate(fd, len(note))
        return state

    def release(self) -> None:
        """Gives the directory up; the files stay."""
        Path(self._running).unlink(missing_ok=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def ensure_password(self) -> str:
        """The administrator's password: the first line of its file, made at first start."""
        try:
            return self.read_password()
        except FileNotFoundError:
            password = secrets.token_urlsafe(18)
            self.write_password(password)
            return password

    def write_password(self, password: str) -> None:
        """Put another password into the administrator's file. One of several lines can't be read back."""
        write_private_file(self.password_file, f"{password}\n".encode())

    def read_password(self) -> str:
        """The administrator's password. FileNotFoundError before the first start."""
        return read_password_file(self.password_file)

    def announce(self, running: RunningGateway) -> None:
        """Says where the gateway listens, for the commands on this machine."""
        text = json.dumps(
            {
                "pid": running.pid,
                "http": running.http,
                "https": running.https,
                "authority": running.authority,
            },
            indent=2,
        )
        write_private_file(self._running, text.encode() + b"\n")

    def running(self) -> RunningGateway:
        """The gateway on this directory. StateError when none runs."""
        try:
            known: dict[str, Any] = json.loads(Path(self._running).read_text())
            fd = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._none_runs() from None
        except (OSError, ValueError) as error:
            raise StateError(
                f"{self._running} can't be read ({error}); run this as the user of the gateway"
            ) from error
        try:
            runs = is_locked_wholly(fd)
        finally:
            os.close(fd)
        if not runs:
            raise self._none_runs()
        return RunningGateway(
            pid=known["pid"],
            http=tuple(known["http"]),
            https=tuple(known["https"]),
            authority=known["authority"],
        )

    def _none_runs(self) -> StateError:
        command = f"vdi-gateway serve --state-dir {shlex.quote(self.path)}"
        return StateError(
            f"no gateway runs on {self.path}; start it with `{command}"
            " --http 127.0.0.1:8080`, or name a running one with --state-dir or --url"
        )


def read_password_file(path: str) -> str:
    """The first line of a password file. StateError when it is empty or can't be read."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_LONGEST_LINE)
        lines = line.decode().splitlines()
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"the password file {path} can't be read: {error}") from error
    if not lines or not lines[0]:
        raise StateError(f"the password file {path} is empty; write the password on its first line")
    if len(line) == _LONGEST_LINE:
        raise StateError(f"the first line of {path} is too long for a password; give the file that has it")
    return lines[0]
