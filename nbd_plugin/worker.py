"""One nbdkit process: how it is started, what it is told, and how it ends. Standard library only.

A worker gets everything by descriptors: the sockets to accept on, its leash, and the directories of the code,
of the gateway's control socket and of the certificates. So one that runs as another user needs no way into
directories that are closed to that user. The trap: the user is changed before nbdkit is executed, not by
nbdkit, because a process that changed its user by itself may not look into its own /proc/self/fd any more.
"""

import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from nbd_plugin.proc import process_start
from nbd_plugin.supervisor_log import Tracebacks

THREADS: Final = 4  # for each connection: more only get in each other's way
SEARCH_PATH: Final = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin:/usr/local/sbin"

_ABOVE: Final = 200  # descriptors are moved there first, so that none is overwritten before it is copied
_FIRST: Final = 3  # where systemd's protocol puts the sockets
_LONGEST: Final = 64
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Identity:
    """The user that a worker runs as."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What one kind of worker is. `root` is the directory that holds nbd_plugin, unless `plugin` is given."""

    nbdkit: str
    root: str
    access: str
    private: bool
    clients: int
    handshake: float
    parallel: bool = False
    tls: str | None = None
    plugin: str | None = None
    identity: Identity | None = None


@dataclass(eq=False, slots=True)
class Worker:
    """A running nbdkit. `leash` and `log` are None where it was started by a supervisor that is dead."""

    pid: int
    pidfd: int
    leash: socket.socket | None = None
    log: int | None = None
    ready: bool = False
    draining: bool = False
    clients: int = 0
    said: list[str] = field(default_factory=list)
    tracebacks: Tracebacks = field(default_factory=Tracebacks)
    unfinished: bytes = b""
    started: float = field(default_factory=time.monotonic)

    def tell(self, order: str) -> None:
        """Say `count`, `drain` or `stop`; one that can't be told so is asked to stop by a signal."""
        try:
            if self.leash is not None:
                self.leash.send(order.encode(), socket.MSG_DONTWAIT)
                return
        except OSError:
            pass
        if order == "stop":
            self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process and none that has got its number since."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reports(self) -> bool:
        """Take in what came over the leash. False at its end."""
        assert self.leash is not None
        try:
            word, _, number = self.leash.recv(_LONGEST, socket.MSG_DONTWAIT).decode().partition(" ")
        except BlockingIOError:
            return True
        except OSError:
            return False
        if word == "ready":
            self.ready = True
        elif word == "draining":
            self.draining = True
        elif word == "count":
            self.clients = int(number)
        return bool(word)

    def lines(self) -> list[str] | None:
        """The lines that it has written to its log since; None at the end."""
        assert self.log is not None
        try:
            data = os.read(self.log, 65536)
        except BlockingIOError:
            return []
        *whole, self.unfinished = (self.unfinished + data).split(b"\n")
        if (not data or len(self.unfinished) > 4096) and self.unfinished:
            whole.append(self.unfinished)
            self.unfinished = b""
        lines = [line.decode("utf-8", "backslashreplace") for line in whole if line]
        self.said = [*self.said, *lines][-5:]
        return lines if data or lines else None

    def close_log(self) -> None:
        if self.log is not None:
            os.close(self.log)
            self.log = None

    def reap(self) -> str:
        """How it ended, in words; it has."""
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            how = "ended"
        else:
            code = os.waitstatus_to_exitcode(status)
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        os.close(self.pidfd)
        if self.leash is not None:
            self.leash.close()
        self.close_log()
        return how

    @property
    def mark(self) -> tuple[int, int]:
        """What tells this process from later ones with its number."""
        return self.pid, process_start(self.pid)


def find_again(pid: int, start_time: int) -> Worker | None:
    """The worker of a dead supervisor, if it still runs."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        if process_start(pid) == start_time:
            return Worker(pid, pidfd, ready=True, draining=True, clients=1)
    except OSError:
        pass
    os.close(pidfd)
    return None


def start_worker(options: WorkerOptions, sockets: Sequence[socket.socket]) -> Worker:
    """Start an nbdkit that accepts on `sockets`; it says when it is ready. Raises OSError."""
    with contextlib.ExitStack() as opened:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        opened.callback(theirs.close)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        opened.callback(os.close, writing)
        try:
            os.set_blocking(reading, False)
            given = [each.fileno() for each in sockets] + [theirs.fileno()]
            for directory in (options.root, os.path.dirname(options.access), options.tls):
                if directory is not None:
                    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                    opened.callback(os.close, fd)
                    given.append(fd)
            command = _command(options, _FIRST + len(sockets))
            # What the supervisor does at a signal would be done in the child too, to the same pipe.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                pid = os.fork()
                if pid == 0:
                    _become(command, given, len(sockets), writing, options.identity)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                # Nobody could watch it, and it would take clients all the same.
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            return Worker(pid, pidfd, ours, reading)
        except BaseException:
            ours.close()
            os.close(reading)
            raise


def _command(options: WorkerOptions, leash: int) -> list[str]:
    root, access, tls = (f"/proc/self/fd/{leash + position}" for position in (1, 2, 3))
    command = [options.nbdkit, "--threads", str(THREADS)]
    if options.tls is not None:
        command += ["--tls=require", f"--tls-certificates={tls}"]
    return [
        *command,
        "python",
        options.plugin or f"{root}/nbd_plugin/plugin.py",
        f"control={access}/{os.path.basename(options.access)}",
        f"private={str(options.private).lower()}",
        "purpose=nbd",
        "outlive=true",
        f"leash={leash}",
        f"clients={options.clients}",
        f"handshake={options.handshake:g}",
        # With TLS no nbdkit is aborted by a client that goes; see the plugin's `thread_model`.
        f"parallel={str(options.parallel or options.tls is not None).lower()}",
    ]


def _become(
    command: list[str], given: list[int], sockets: int, log: int, identity: Identity | None
) -> NoReturn:
    """The child, until it is nbdkit. Nothing of the supervisor's is done any more, whatever fails."""
    try:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.setsid()  # Ctrl-C is for the supervisor, which stops its workers in order
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in given]
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for number, fd in enumerate(moved, _FIRST):
            os.dup2(fd, number)
        if identity is not None:
            os.setgroups([])
            os.setgid(identity.gid)
            os.setuid(identity.uid)
        environment = {
            "PATH": SEARCH_PATH,
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LISTEN_FDS": str(sockets),
            "LISTEN_PID": str(os.getpid()),
        }
        os.execve(command[0], command, environment)  # noqa: S606
    except OSError as error:
        os.write(2, f"nbdkit can't be started: {error}\n".encode())
    finally:
        os._exit(127)
