"""The supervisor of NBD: owns the sockets that clients connect to, and the nbdkit processes that serve them.

    python3 -I -S nbd_plugin/supervisor.py --state-dir DIR --listen HOST:PORT [--tls DIR] ...

A process of its own, so that a gateway which crashes takes no client with it. It reads no byte of NBD and has
one thread, and everything that happens to it is an event of one selector. `vdi-gateway serve` starts it and
speaks with it through nbd-control.sock in the state directory, as `vdi-gateway nbd` lets people do; there is
one per state directory. Without a gateway and without clients it ends after a minute.

The trap: nothing here may wait for anybody but in `Events.wait`, whatever hangs: gateway, worker or client.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from gateway.images.file_locks import lock_wholly
from nbd_plugin.listening import is_loopback, listen_locally, listen_on
from nbd_plugin.pool import Pool
from nbd_plugin.supervisor_events import Events
from nbd_plugin.supervisor_links import Links
from nbd_plugin.supervisor_log import Log
from nbd_plugin.supervisor_options import Options, Refused, find_nbdkit, find_user, read_arguments
from nbd_plugin.supervisor_workers import Workers
from nbd_plugin.worker import WorkerOptions

ROOT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONTROL_SOCKET: Final = "nbd-control.sock"
PRIVATE_SOCKET: Final = "nbd.sock"
LOCK: Final = "nbd.lock"

START_SECONDS: Final = 20.0
COUNT_SECONDS: Final = 5.0


class Supervisor:
    """From bound sockets to the end."""

    def __init__(self, options: Options) -> None:
        """Raises Refused when it can't begin."""
        self._options: Final = options
        self._log: Final = Log(options.log_level)
        self._leaving: str | None = None
        self._kill_at: float | None = None
        self._begun = False
        self._starter = options.ready_fd
        self._starter_ended = False
        now = time.monotonic()
        self._needed_at = now
        self._count_at = now + COUNT_SECONDS
        self._start_until = now + START_SECONDS

        nbdkit = find_nbdkit()
        identity = find_user(options.user)
        os.makedirs(options.state_dir, mode=0o700, exist_ok=True)
        os.chdir(options.state_dir)
        self._lock = self._take_lock()
        if options.tls is None and not options.insecure and not is_loopback(options.host):
            raise Refused(
                f"{options.host} is reached by other machines, and NBD without TLS shows them disks and"
                " sessions"
            )
        try:
            public = listen_on(options.host, options.port)
        except OSError as error:
            where = f"[{options.host}]" if ":" in options.host else options.host
            reason = error.strerror or str(error)
            raise Refused(f"can't listen on {where}:{options.port}: {reason}", kind="listen") from None
        self._addresses = [each.getsockname()[:2] for each in public]
        private = listen_locally(".", PRIVATE_SOCKET)
        control = listen_locally(".", CONTROL_SOCKET)
        common = WorkerOptions(
            nbdkit=nbdkit,
            root=ROOT,
            access=os.path.join(options.state_dir, "access.sock"),
            private=True,
            clients=options.clients,
            handshake=options.handshake,
            parallel=options.parallel,
            plugin=options.plugin,
        )
        of_public = WorkerOptions(
            nbdkit=nbdkit,
            root=ROOT,
            access=options.access or common.access,
            private=False,
            clients=options.clients,
            handshake=options.handshake,
            parallel=options.parallel,
            plugin=options.plugin,
            tls=options.tls,
            identity=identity,
        )
        self._public: Final = Pool(public, of_public, options.workers)
        self._events: Final = Events()
        self._workers: Final = Workers(
            self._public, Pool([private], common, 1, on_demand=True), self._events, self._log
        )
        self._links: Final = Links(control, self._events, self._log, status=self._status, obey=self._obey)

    def run(self, announce: Callable[[str], None]) -> int:
        """Until everything has ended. `announce` gets one line when clients are answered. Raises Refused."""
        self._events.watch_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._signalled)
        if self._starter is not None:
            self._events.watch(self._starter, self._starter_reads_no_more)
        while True:
            now = time.monotonic()
            self._due(now)
            # An orphan serves on while another supervisor takes over.
            if self._leaving and not (
                self._workers.everybody if self._leaving == "stop" else self._workers.present
            ):
                break
            self._events.wait(self._pause(now))
            if not self._begun and self._public.is_ready:
                self._begun = self._workers.begun = True
                announce(self._ready_line())
            self._look_for_starter()
            self._links.tell_status()
        self._workers.tell_repeats()
        self._links.end()
        return 0

    def _starter_reads_no_more(self) -> None:
        """Nobody reads any more whether it is ready. A gateway is connected before it stops doing so."""
        assert self._starter is not None
        self._events.forget(self._starter)
        self._starter_ended = True

    def _look_for_starter(self) -> None:
        """Once all that has come at the same time is known: whether anybody wants this supervisor."""
        if self._starter is None or not (self._links or self._starter_ended):
            return
        self._events.forget(self._starter)
        os.close(self._starter)
        self._starter = None
        if not self._links and not self._leaving:
            self._log.info("the gateway that started it has ended")
            self._needed_at = time.monotonic() - self._options.linger

    # Time

    def _due(self, now: float) -> None:
        if not self._leaving:
            self._workers.fill(now)
        if not self._begun and now > self._start_until and not self._leaving:
            raise Refused("nbdkit has started, but doesn't say that it is ready")
        if now >= self._count_at:
            self._count_at = now + COUNT_SECONDS
            self._workers.count_clients()
        if self._links or self._options.stay or self._workers.clients:
            self._needed_at = now
        if not self._leaving and now - self._needed_at >= self._options.linger:
            self._log.info("nobody needs NBD any more: no gateway runs, no client is connected")
            self._stop()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._workers.kill()
        self._links.accept_again(now)
        self._workers.replace()
        self._workers.tell_repeats(now)

    def _pause(self, now: float) -> float:
        times = [self._count_at, *self._workers.due]
        if not self._begun:
            times.append(self._start_until)
        if not self._leaving:
            times.append(self._needed_at + self._options.linger)
        times += [each for each in (self._kill_at, self._links.again_at) if each is not None]
        return max(min(times) - now, 0.0)

    # Orders

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._renew(self._public.options.tls)
        else:
            self._stop()

    def _obey(self, order: dict[str, Any]) -> None:
        if order.get("do") == "stop":
            self._stop()
        elif order.get("do") == "drain":
            if not self._leaving:
                self._leave("drain")
        elif order.get("do") == "renew":
            self._renew(order.get("tls"))

    def _renew(self, tls: str | None) -> None:
        """New workers with the certificates as they are now; the old ones serve who is with them."""
        if self._leaving:
            return
        if (tls is None) != (self._public.options.tls is None):
            self._log.error("TLS can be switched on and off by a restart alone")
            return
        self._workers.renew(tls)

    def _stop(self) -> None:
        """End after the requests that are in flight; the second time at once."""
        if self._leaving == "stop":
            self._kill_at = time.monotonic()
            return
        self._leave("stop")
        self._kill_at = time.monotonic() + self._options.grace

    def _leave(self, how: str) -> None:
        self._log.info("stopping" if how == "stop" else "another supervisor takes over")
        self._workers.leave(how)
        if self._leaving is None:
            self._links.close()
            for name in (CONTROL_SOCKET, PRIVATE_SOCKET):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
            if how == "drain":
                # Who comes next is to know of those that stay.
                self._workers.hand_over()
                os.close(self._lock)
        self._leaving = how

    def _take_lock(self) -> int:
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            lock_wholly(fd)
        except (BlockingIOError, PermissionError):
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise Refused(
                f"NBD is served for {self._options.state_dir} already (process {holder})", kind="running"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def _status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "options": self._options.shared,
            "stay": self._options.stay,
            "addresses": self._addresses,
            "tls": self._public.options.tls,
            "ready": self._begun,
            "leaving": self._leaving,
            "accepting": self._workers.accept,
            "generation": self._workers.generation,
            "workers": len(self._workers.present),
            "clients": self._workers.clients,
            "problem": self._workers.problem,
        }

    def _ready_line(self) -> str:
        scheme = "nbds" if self._options.tls else "nbd"
        urls = [
            f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
            for host, port in self._addresses
        ]
        path = os.path.join(self._options.state_dir, PRIVATE_SOCKET)
        return f"NBD ready: {' '.join(urls)} nbd+unix:///?socket={path}"


def _raise_descriptor_limit() -> None:
    """Each client holds descriptors: a socket, a connection to the gateway, the files of a chain."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        most = 1 << 20 if hard == resource.RLIM_INFINITY else min(hard, 1 << 20)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def main(arguments: list[str]) -> int:
    """Exit code 0 after an orderly end, 1 if it could not begin, with one line of JSON that says why."""
    options = read_arguments(arguments)
    os.umask(0o077)
    if options.ready_fd is not None:
        os.set_inheritable(options.ready_fd, False)  # its end would wait for the workers'
    _raise_descriptor_limit()

    def announce(line: str) -> None:
        _write(options.ready_fd, json.dumps({"ready": line}) if options.ready_fd is not None else line)

    try:
        return _begun(options).run(announce)
    except Refused as refused:
        return _say(options.ready_fd, refused)


def _begun(options: Options) -> Supervisor:
    try:
        return Supervisor(options)
    except OSError as error:
        parts = (options.state_dir, error.filename) if error.filename else (options.state_dir,)
        raise Refused(f"{os.path.join(*parts)}: {error.strerror or error}") from error


def _say(ready_fd: int | None, refused: Refused) -> int:
    if ready_fd is not None:
        _write(ready_fd, json.dumps({"refused": str(refused), "kind": refused.kind}))
    else:
        _write(2, f"vdi-gateway nbd: {refused}")
    return 1


def _write(fd: int | None, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1 if fd is None else fd, text.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
