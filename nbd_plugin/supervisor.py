"""The supervisor of NBD: owns the sockets that clients connect to, and the nbdkit processes that serve them.

    python3 -I -S nbd_plugin/supervisor.py --state-dir DIR --listen HOST:PORT [--tls DIR] ...

A process of its own, so that a gateway which crashes takes no client with it. It reads no byte of NBD and has
one thread, and everything that happens to it is an event of one selector. `vdi-gateway serve` starts it and
speaks with it through nbd-control.sock in the state directory, as `vdi-gateway nbd` lets people do; there is
one per state directory. Without a gateway and without clients it ends after a minute.

The trap: a gateway that hangs must not hold it up. Nothing here waits for anybody: what a socket doesn't take
at once is dropped with its connection.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from gateway.images.file_locks import lock_wholly
from nbd_plugin.listening import is_loopback, listen_locally, listen_on
from nbd_plugin.pool import Pool
from nbd_plugin.supervisor_log import Log
from nbd_plugin.supervisor_options import Options, Refused, find_nbdkit, find_user, read_arguments
from nbd_plugin.worker import Worker, WorkerOptions, find_again

ROOT: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONTROL_SOCKET: Final = "nbd-control.sock"
PRIVATE_SOCKET: Final = "nbd.sock"
LOCK: Final = "nbd.lock"
WORKERS: Final = "nbd-workers"

START_SECONDS: Final = 20.0
COUNT_SECONDS: Final = 5.0
_LONGEST_ORDER: Final = 65536


class _Link:
    """A connection of the control socket: JSON, one object a line, both ways."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self._received = b""

    def send(self, message: dict[str, Any]) -> bool:
        """False when the other side is gone or doesn't read."""
        data = json.dumps(message).encode() + b"\n"
        try:
            return self.socket.send(data) == len(data)
        except OSError:
            return False

    def orders(self) -> list[dict[str, Any]] | None:
        """What has come, None at the end."""
        try:
            data = self.socket.recv(_LONGEST_ORDER)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > _LONGEST_ORDER:
            return None
        try:
            return [order for order in map(json.loads, lines) if isinstance(order, dict)]
        except ValueError:
            return None


class Supervisor:
    """From bound sockets to the end."""

    def __init__(self, options: Options) -> None:
        """Raises Refused when it can't begin."""
        self._options: Final = options
        self._selector: Final = selectors.DefaultSelector()
        self._links: set[_Link] = set()
        self._log: Final = Log()
        self._orphans: set[Worker] = set()
        self._problem: str | None = None
        self._generation = 1
        self._leaving: str | None = None
        self._kill_at: float | None = None
        self._begun = False
        self._told: dict[str, Any] = {}
        now = time.monotonic()
        self._needed_at = now
        self._count_at = now + COUNT_SECONDS
        self._start_until = now + START_SECONDS

        nbdkit = find_nbdkit()
        identity = find_user(options.user)
        os.makedirs(options.state_dir, mode=0o700, exist_ok=True)
        os.chdir(options.state_dir)
        self._lock = self._take_lock()
        self._find_orphans()
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
        self._control = listen_locally(".", CONTROL_SOCKET)
        self._control.setblocking(False)
        common = WorkerOptions(
            nbdkit=nbdkit,
            root=ROOT,
            access=os.path.join(options.state_dir, "access.sock"),
            private=True,
            clients=options.clients,
            plugin=options.plugin,
        )
        of_public = WorkerOptions(
            nbdkit=nbdkit,
            root=ROOT,
            access=options.access or common.access,
            private=False,
            clients=options.clients,
            plugin=options.plugin,
            tls=options.tls,
            identity=identity,
        )
        self._public: Final = Pool(public, of_public, options.workers)
        self._private: Final = Pool([private], common, 1, on_demand=True)
        self._pools: Final = (self._public, self._private)

    def run(self, announce: Callable[[str], None]) -> int:
        """Until everything has ended. `announce` gets one line when clients are answered. Raises Refused."""
        self._watch(self._control.fileno(), self._accept)
        self._watch_signals()
        self._watch_demand(self._private)
        while True:
            now = time.monotonic()
            self._due(now)
            if self._leaving and not self._all_workers() and not self._orphans_count():
                break
            for key, _ in self._selector.select(self._pause(now)):
                key.data()
            if not self._begun and self._public.is_ready:
                self._begun = True
                announce(self._ready_line())
            self._tell_status()
        for link in set(self._links):
            self._drop(link)
        return 0

    # Time

    def _due(self, now: float) -> None:
        if not self._leaving:
            for pool in self._pools:
                if pool is self._public or pool.again_at is not None:
                    self._fill(pool, now)
        if not self._begun and now > self._start_until and not self._leaving:
            raise Refused("nbdkit has started, but doesn't say that it is ready")
        if now >= self._count_at:
            self._count_at = now + COUNT_SECONDS
            for worker in self._all_workers():
                worker.tell("count")
        if self._links or self._options.stay or any(each.clients for each in self._everybody()):
            self._needed_at = now
        if not self._leaving and now - self._needed_at >= self._options.linger:
            self._log.info("nobody needs NBD any more: no gateway runs, no client is connected")
            self._stop()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            for worker in self._everybody():
                self._log.warning("a worker that doesn't end is killed", process=worker.pid)
                worker.signal(signal.SIGKILL)
        for pool in self._pools:
            if pool.look():
                self._generation += 1
                self._problem = None
                self._log.info("new workers have taken over", generation=self._generation)

    def _pause(self, now: float) -> float:
        times = [self._count_at, *(pool.again_at for pool in self._pools if pool.again_at is not None)]
        if not self._begun:
            times.append(self._start_until)
        if not self._leaving:
            times.append(self._needed_at + self._options.linger)
        if self._kill_at is not None:
            times.append(self._kill_at)
        return max(min(times) - now, 0.0)

    # Workers

    def _all_workers(self) -> set[Worker]:
        return self._public.workers | self._private.workers

    def _everybody(self) -> set[Worker]:
        return self._all_workers() | self._orphans

    def _orphans_count(self) -> int:
        return len(self._orphans) if self._leaving == "stop" else 0

    def _fill(self, pool: Pool, now: float) -> None:
        try:
            started = pool.fill(now)
        except OSError as error:
            self._problem = f"nbdkit can't be started: {error.strerror}"
            self._log.error("a worker can't be started", why=str(error))
            if not self._begun:
                raise Refused(self._problem) from error
            return
        self._keep(pool, started)
        self._watch_demand(pool)

    def _keep(self, pool: Pool, started: list[Worker]) -> None:
        for worker in started:
            assert worker.leash is not None
            assert worker.log is not None
            self._watch(worker.pidfd, partial(self._ended, pool, worker))
            self._watch(worker.leash.fileno(), partial(self._hear, worker))
            self._watch(worker.log, partial(self._read_log, worker))
            self._log.info("worker started", process=worker.pid, private=pool.options.private)
        if started:
            self._remember_workers()

    def _watch_demand(self, pool: Pool) -> None:
        """A socket of a worker that isn't there yet is looked at until somebody comes."""
        for each in pool.sockets:
            fd = each.fileno()
            if fd < 0:
                continue
            if pool.waits_for_demand:
                self._watch(fd, partial(self._demanded, pool))
            else:
                self._forget(fd)

    def _demanded(self, pool: Pool) -> None:
        self._fill(pool, time.monotonic())

    def _hear(self, worker: Worker) -> None:
        if not worker.reports():
            assert worker.leash is not None
            self._forget(worker.leash.fileno())

    def _read_log(self, worker: Worker) -> None:
        lines = worker.lines()
        for line in lines or ():
            match worker.tracebacks.feed(line):
                case (told, None):
                    self._log.info("nbdkit says", process=worker.pid, line=told)
                case (told, str() as traceback):
                    self._log.error("nbdkit says", process=worker.pid, line=told, traceback=traceback)
        if lines is None:
            assert worker.log is not None
            self._forget(worker.log)
            worker.close_log()

    def _ended(self, pool: Pool, worker: Worker) -> None:
        self._forget(worker.pidfd)
        if worker.leash is not None:
            self._forget(worker.leash.fileno())
        if worker.log is not None:
            self._read_log(worker)
        if worker.log is not None:
            self._forget(worker.log)
        how = worker.reap()
        replaced = pool.is_being_replaced and worker not in pool.present
        if pool.ended(worker, time.monotonic()) and not self._leaving:
            reason = worker.said[-1] if worker.said else how
            if not self._begun:
                raise Refused(f"nbdkit doesn't start: {reason}")
            self._problem = f"a worker ended by itself: {reason}"
            if replaced:
                self._log.error("new workers don't start; the old ones stay", why=reason)
            else:
                self._log.error(
                    "a worker ended by itself and is started again", process=worker.pid, how=how, why=reason
                )
        else:
            self._log.info("worker ended", process=worker.pid, how=how)
        self._watch_demand(pool)
        self._remember_workers()

    # Workers of a supervisor that was killed

    def _find_orphans(self) -> None:
        try:
            with open(WORKERS, encoding="ascii") as file:
                marks = [tuple(map(int, line.split())) for line in file]
        except (OSError, ValueError):
            return
        for mark in marks:
            worker = find_again(*mark) if len(mark) == 2 else None
            if worker is not None:
                self._orphans.add(worker)
                self._watch(worker.pidfd, partial(self._orphan_ended, worker))
                self._log.info("a worker of the supervisor before serves its clients", process=worker.pid)

    def _orphan_ended(self, worker: Worker) -> None:
        self._forget(worker.pidfd)
        self._orphans.discard(worker)
        worker.reap()
        self._remember_workers()

    def _remember_workers(self) -> None:
        if self._lock < 0:
            return  # the list is that of the supervisor that has taken over
        lines = []
        for worker in self._everybody():
            with contextlib.suppress(OSError):
                lines.append("{} {}\n".format(*worker.mark))
        try:
            with open(f"{WORKERS}.new", "w", encoding="ascii") as file:
                file.writelines(lines)
            os.replace(f"{WORKERS}.new", WORKERS)
        except OSError as error:
            self._log.warning("the list of workers can't be written", why=str(error))

    # The end

    def _stop(self) -> None:
        """End after the requests that are in flight; the second time at once."""
        if self._leaving == "stop":
            self._kill_at = time.monotonic()
            return
        self._leave("stop")
        self._kill_at = time.monotonic() + self._options.grace
        for worker in self._orphans:
            worker.signal(signal.SIGTERM)

    def _leave(self, how: str) -> None:
        self._log.info("stopping" if how == "stop" else "another supervisor takes over")
        self._leaving = how
        for pool in self._pools:
            for each in pool.sockets:
                if each.fileno() >= 0:
                    self._forget(each.fileno())
            pool.stop(how)
        if self._control.fileno() >= 0:
            self._forget(self._control.fileno())
            self._control.close()
            for name in (CONTROL_SOCKET, PRIVATE_SOCKET):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
            if how == "drain":
                # Who comes next is to know of those that stay.
                self._remember_workers()
                os.close(self._lock)
                self._lock = -1

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

    # Events

    def _watch(self, fd: int, act: Callable[[], None]) -> None:
        self._forget(fd)
        self._selector.register(fd, selectors.EVENT_READ, act)

    def _forget(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def _watch_signals(self) -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

        def act() -> None:
            for number in os.read(reading, 64):
                if number == signal.SIGHUP:
                    self._renew(self._public.options.tls)
                else:
                    self._stop()

        self._watch(reading, act)

    def _accept(self) -> None:
        try:
            connected, _ = self._control.accept()
        except OSError:
            return
        link = _Link(connected)
        self._links.add(link)
        self._log.link = link.send
        self._watch(connected.fileno(), lambda: self._obey(link))
        link.send({"status": self._status()})

    def _drop(self, link: _Link) -> None:
        self._forget(link.socket.fileno())
        link.socket.close()
        self._links.discard(link)
        self._log.link = next(iter(self._links)).send if self._links else None

    def _obey(self, link: _Link) -> None:
        orders = link.orders()
        for order in orders or ():
            if order.get("do") == "stop":
                self._stop()
            elif order.get("do") == "drain":
                if not self._leaving:
                    self._leave("drain")
            elif order.get("do") == "renew":
                self._renew(order.get("tls"))
        if orders is None:
            self._drop(link)

    def _renew(self, tls: str | None) -> None:
        """New workers with the certificates as they are now; the old ones serve who is with them."""
        if self._leaving:
            return
        if (tls is None) != (self._public.options.tls is None):
            self._log.error("TLS can be switched on and off by a restart alone")
            return
        self._problem = None
        try:
            self._keep(self._public, self._public.replace_by(self._public.with_tls(tls)))
        except OSError as error:
            self._public.abandon_replacement()
            self._problem = f"new workers can't be started: {error}"
            self._log.error("new workers can't be started; the old ones stay", why=str(error))

    def _status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "options": self._options.shared,
            "stay": self._options.stay,
            "addresses": self._addresses,
            "tls": self._public.options.tls,
            "ready": self._begun,
            "leaving": self._leaving,
            "accepting": not self._leaving
            or not all(each.draining for pool in self._pools for each in pool.leaving),
            "generation": self._generation,
            "workers": len(self._all_workers()),
            "clients": sum(each.clients for each in self._everybody()),
            "problem": self._problem,
        }

    def _tell_status(self) -> None:
        status = self._status()
        if status == self._told:
            return
        self._told = status
        for link in set(self._links):
            if not link.send({"status": status}):
                self._drop(link)

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
        return Supervisor(options).run(announce)
    except Refused as refused:
        return _say(options.ready_fd, refused)


def _say(ready_fd: int | None, refused: Refused) -> int:
    if ready_fd is not None:
        _write(ready_fd, json.dumps({"refused": str(refused), "kind": refused.kind}))
    else:
        _write(2, f"vdi-gateway nbd: {refused}")
    return 1


def _write(fd: int | None, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1 if fd is None else fd, text.encode() + b"\n")
        if fd is not None and fd > 2:
            os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
