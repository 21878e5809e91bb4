"""Builds every object of the gateway, runs them in one trio nursery, and takes them down in order.

The only place that knows everything; imported by `vdi-gateway serve` alone. The trap is the order: the state
directory is locked before anything in it is touched, the addresses are bound before the slow steps, so that a
port in use is told at once, and the ready line comes last, when a client would be answered.
"""

import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Final

import structlog
import trio

from gateway.access.server import AccessServer
from gateway.administrator import AdministratorPassword
from gateway.certificates import ServerCertificate, ensure_server_certificate, own_names
from gateway.core.current_operations import CurrentOperations
from gateway.core.database import Database, DatabaseFailed, DatabaseUnusable
from gateway.core.events import Events
from gateway.core.leases import Leases
from gateway.core.limits import Limits
from gateway.core.log import configure
from gateway.core.nbd_service import NbdDoor
from gateway.core.records import Records
from gateway.core.refusals import Refusals
from gateway.core.sessions import Sessions
from gateway.core.tasks import Tasks
from gateway.core.threads import in_thread
from gateway.core.users import Users
from gateway.http.server import Listener, Server
from gateway.images.heap import use_one_heap
from gateway.listening import (
    OURS,
    ServeRefused,
    access_sockets,
    address_for_others,
    listen_all,
    listen_on_socket,
    urls_of,
)
from gateway.nbd import Nbd
from gateway.nbd_files import NbdFiles, NbdRefused
from gateway.options import OFF
from gateway.paths import routes_of
from gateway.reload import Configuration
from gateway.repository.inventory import Inventory
from gateway.state import ADMINISTRATOR, RunningGateway, StateDirectory, StateError
from gateway.systemd import notify
from gateway.tls import CertificateError, ReloadableContext
from gateway.xenapi.estate import Estate
from gateway.xenapi.host import software_version

VERSION: Final = version("vdi-gateway")

log = structlog.get_logger("gateway.app")

# Our own certificate is renewed a month before its end, so looking twice a day is enough.
RENEWAL_SECONDS = 12 * 3600.0


class _ToldToStop(Exception):  # noqa: N818  nothing has failed
    """A signal came before the gateway was ready."""


def serve(state_dir: str, configuration: Configuration, *, ready: Callable[[str], None]) -> None:
    """Runs until SIGTERM or SIGINT. `ready` gets one line once clients are answered. ServeRefused, if not."""
    os.umask(0o077)
    # Until somebody listens, SIGHUP would end the process, and systemd takes that for a wish.
    hung_up: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _frame: hung_up.append(number))
    config = configuration.current
    configure(config.log_level, form=config.log_format)
    use_one_heap()
    try:
        state = StateDirectory.take(state_dir)
    except StateError as error:
        raise ServeRefused(str(error)) from None
    with ExitStack() as opened:
        opened.callback(state.release)
        plain = listen_all(config.http, config.named("listen.http"), opened)
        encrypted = listen_all(config.https, config.named("listen.https"), opened)
        nbd = _nbd_files(configuration, state)
        try:
            with_tls = encrypted or (nbd is not None and nbd.tls)
            context = _context(configuration, state) if with_tls else None
            password = state.ensure_password()
        except (CertificateError, StateError) as error:
            raise ServeRefused(str(error)) from None
        except OSError as error:
            raise ServeRefused(f"{error.filename or state.path}: {error.strerror}; {OURS}") from error
        gateway = _Gateway(
            state=state,
            local=listen_on_socket(state.socket, opened),
            access=access_sockets(state, nbd, opened),
            nbd_files=nbd,
            plain=plain,
            encrypted=encrypted,
            context=context,
            password=password,
            ready=ready,
            configuration=configuration,
            hung_up=hung_up,
        )
        try:
            trio.run(gateway.run)
        except DatabaseFailed as error:
            raise ServeRefused(f"{state.database}: {error}") from None


def _nbd_files(configuration: Configuration, state: StateDirectory) -> NbdFiles | None:
    """What NBD needs; None where it isn't served."""
    config = configuration.started
    if config.nbd is None:
        return None
    try:
        return NbdFiles(state, config)
    except NbdRefused as refused:
        if config.nbd_asked_for:
            raise ServeRefused(str(refused)) from None
        log.warning("NBD is not served", why=str(refused))
        return None


def _context(configuration: Configuration, state: StateDirectory) -> ReloadableContext:
    config = configuration.started
    hosts = [host for host, _ in (*config.https, *((config.nbd,) if config.nbd else ()))]

    def find() -> ServerCertificate:
        given = configuration.current.certificate
        if given is None:
            # The machine may have got other addresses since the last time.
            return ensure_server_certificate(state.tls, own_names(hosts))
        chain, key = given
        return ServerCertificate(chain=chain, key=key, authority=None)

    return ReloadableContext(find)


async def _told_to_stop(signals: AsyncIterator[int]) -> None:
    async for number in signals:
        if number != signal.SIGHUP:  # what it would have read anew is being read
            _say_stopping(number)
            return


def _say_stopping(number: int) -> None:
    notify("STOPPING=1")
    log.info("stopping", signal=signal.Signals(number).name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gateway:
    """One run of the gateway, from a locked state directory and listening sockets to the end."""

    state: StateDirectory
    local: socket.socket
    access: list[socket.socket]
    nbd_files: NbdFiles | None
    plain: list[socket.socket]
    encrypted: list[socket.socket]
    context: ReloadableContext | None
    password: str
    ready: Callable[[str], None]
    configuration: Configuration
    hung_up: list[int]
    """SIGHUPs from before somebody listened to them."""

    @property
    def limits(self) -> Limits:
        """The limits in force: one object, whose values change."""
        return self.configuration.limits

    async def run(self) -> None:
        """Everything, until it is told to stop."""
        async with self._estate() as estate:
            # From here on there may be a process that has to be told of the end.
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                try:
                    nbd = await self._start_nbd(estate, signals)
                except _ToldToStop:
                    pass
                else:
                    await self._serve(estate, nbd, signals)
        log.info("stopped")

    async def _serve(self, estate: Estate, nbd: Nbd | None, signals: AsyncIterator[int]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(estate.tasks.run)
            nursery.start_soon(estate.sessions.run)
            access = AccessServer(
                estate.inventory,
                estate.tasks,
                estate.sessions,
                self.limits,
                administrator=ADMINISTRATOR,
                holds=estate.holds,
                nbd=estate.nbd,
                refusals=estate.refusals,
                publications=estate.publications,
            )
            for listener in self.access:
                nursery.start_soon(access.run, listener)
            if nbd is not None:
                nursery.start_soon(nbd.run)
            server = Server(routes_of(estate, self.limits, nursery), self.limits)
            nursery.start_soon(self._obey_signals, signals, server, nbd, nursery.cancel_scope)
            if self.context is not None:
                nursery.start_soon(self._renew, self.context, nbd)
            async with trio.open_nursery() as serving:
                await serving.start(server.run, self._listeners())
                self._say_ready(nbd)
            if nbd is not None:
                nbd.begin_stop()
                await nbd.stopped()
            nursery.cancel_scope.cancel()

    async def _start_nbd(self, estate: Estate, signals: AsyncIterator[int]) -> Nbd | None:
        """NBD, from its first client on; None where it isn't served. Raises ServeRefused, _ToldToStop."""
        if self.nbd_files is None:
            return None
        files, config = self.nbd_files, self.configuration.started
        nbd = Nbd(
            files,
            estate.nbd,
            version=VERSION,
            certificates=self._nbd_certificates if files.tls else None,
            shutdown_seconds=lambda: self.limits.shutdown_seconds,
        )
        try:
            if not await nbd.start(unless=partial(_told_to_stop, signals)):
                raise _ToldToStop
        except (NbdRefused, OSError) as refused:
            name = config.named("listen.nbd")
            if isinstance(refused, NbdRefused) and refused.is_address:
                raise ServeRefused(
                    f"{name}: {refused}; give a free port and an address of this machine with --nbd, or"
                    f" --nbd {OFF}"
                ) from None
            if config.nbd_asked_for:
                raise ServeRefused(f"{name}: {refused}") from None
            log.warning("NBD is not served", why=str(refused))
            return None
        return nbd

    def _nbd_certificates(self) -> tuple[str, str]:
        assert self.context is not None
        assert self.nbd_files is not None
        directory = self.nbd_files.certificates(self.context.certificate)
        return directory, os.path.join(directory, "server-cert.pem")

    @asynccontextmanager
    async def _estate(self) -> AsyncIterator[Estate]:
        """The core and the repositories, from the database upwards; taken down in the opposite order."""
        try:
            database = await Database.open(self.state.database)
        except DatabaseUnusable as error:
            raise ServeRefused(str(error)) from error
        except OSError as error:
            raise ServeRefused(
                f"{self.state.database}: {error.strerror}; make it readable and writable for this user"
            ) from error
        try:
            events = Events(entries=self.limits.event_entries)
            records = await Records.load(
                database,
                events,
                address=address_for_others([*self.encrypted, *self.plain]),
                software_version=software_version(VERSION),
            )
            tasks = await Tasks.load(database, events, limits=self.limits, resident_on=records.this_host.ref)
            users = await Users.load(database)
            administrator = AdministratorPassword(self.state, self.password)
            await administrator.apply(users)
            users.keep_passwords(administrator.keep)
            sessions = await Sessions.load(database, users, limits=self.limits)
            leases = Leases(self.limits, changed=partial(events.publish, "VDI", "mod"))
            async with Inventory.open(
                records, leases, events, who=self._who(), tasks=tasks, limits=self.limits
            ) as inventory:
                yield Estate(
                    records=records,
                    tasks=tasks,
                    users=users,
                    sessions=sessions,
                    inventory=inventory,
                    leases=leases,
                    events=events,
                    operations=CurrentOperations(events),
                    nbd=await NbdDoor.load(database, events, records.this_host),
                    refusals=Refusals(events),
                    pull_rules=lambda: self.configuration.current.pull_rules,
                    limits=self.limits,
                )
        finally:
            await database.aclose()

    def _who(self) -> str:
        return f"{socket.gethostname()}, process {os.getpid()}, state directory {self.state.path}"

    def _listeners(self) -> list[Listener]:
        listeners = [Listener(one) for one in (self.local, *self.plain)]
        if self.context is not None:
            listeners += [Listener(one, self.context.current) for one in self.encrypted]
        return listeners

    def _say_ready(self, nbd: Nbd | None) -> None:
        urls = self._announce()
        notify("READY=1")
        doors = (*urls.http, *urls.https, *(nbd.urls if nbd is not None else ()))
        self.ready(f"vdi-gateway {VERSION} ready: {' '.join(doors)}")

    def _announce(self) -> RunningGateway:
        """Tell the commands on this machine where the gateway is and whose certificate it has."""
        running = RunningGateway(
            pid=os.getpid(),
            http=urls_of("http", self.plain),
            https=urls_of("https", self.encrypted),
            authority=self.context.authority if self.context is not None and self.encrypted else None,
        )
        try:
            self.state.announce(running)
        except OSError as error:
            log.warning("the commands on this machine are not told where the gateway is", why=str(error))
        return running

    async def _obey_signals(
        self,
        signals: AsyncIterator[int],
        server: Server,
        nbd: Nbd | None,
        everything: trio.CancelScope,
    ) -> None:
        asked_to_stop = False
        # Reading a configuration may wait for the resolver of names; being told to stop doesn't wait for it.
        async with trio.open_nursery() as reloads:
            if self.hung_up:
                reloads.start_soon(self._reload, nbd)
            async for number in signals:
                if number == signal.SIGHUP:
                    reloads.start_soon(self._reload, nbd)
                elif asked_to_stop:
                    everything.cancel()
                else:
                    asked_to_stop = True
                    _say_stopping(number)
                    server.stop()
                    if nbd is not None:
                        nbd.begin_stop()

    async def _reload(self, nbd: Nbd | None) -> None:
        async with self.configuration.reloading:
            await self.configuration.reload()
            await self._reload_certificates(nbd)

    def _reload_certificate(self, context: ReloadableContext) -> None:
        before = context.authority
        context.reload()
        if context.authority != before:
            self._announce()

    async def _renew(self, context: ReloadableContext, nbd: Nbd | None) -> None:
        while True:
            await trio.sleep(RENEWAL_SECONDS)
            # A reload at the same time would make another pair in the same two files.
            async with self.configuration.reloading:
                if context.authority is not None:
                    await self._reload_certificates(nbd)

    async def _reload_certificates(self, nbd: Nbd | None) -> None:
        if self.context is not None:
            await in_thread(self._reload_certificate, self.context)
        if nbd is not None:
            await nbd.renew()
