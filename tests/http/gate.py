"""The HTTP door on the real rooms below it, in the test's own trio loop, and a client that speaks bytes."""

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import trio

from gateway.core.database import Database
from gateway.core.events import Events
from gateway.core.leases import Leases
from gateway.core.limits import Limits
from gateway.core.passwords import Passwords
from gateway.core.records import VDI, Records
from gateway.core.roles import Role
from gateway.core.sessions import Sessions
from gateway.core.tasks import Task, Tasks
from gateway.core.users import Users
from gateway.http.connection import Connection
from gateway.http.disk_request import DiskServices
from gateway.http.export_raw_vdi import ExportRawVDI
from gateway.http.import_raw_vdi import ImportRawVDI
from gateway.http.request import Request
from gateway.http.routes import Routes
from gateway.http.rpc import JSON, XML, LargeBodies, Reply, rpc_handler
from gateway.http.server import Listener, Server, listen
from gateway.images.chain import open_chain_files, open_disk
from gateway.images.files import FILES, FileCalls
from gateway.repository.coalescer import PAUSED_KEY
from gateway.repository.inventory import Inventory

MIB = 1 << 20
LIMITS = Limits(
    lease_wait=0.2,
    transfer_idle=5.0,
    header_seconds=5.0,
    keepalive_idle=5.0,
    excess_wait=0.3,
    refusal_drain_seconds=2.0,
    refusal_drain_bytes=8 * MIB,
    shutdown_seconds=1.0,
    password_delay_first=0.001,
    password_delay_maximum=0.01,
)


@dataclass
class Answer:
    """One answer; `whole` says that as many bytes came as its head promised."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    @property
    def text(self) -> str:
        return self.body.decode()


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until the condition holds; the test's time-out ends what never comes."""
    while True:
        if condition():
            return
        await trio.sleep(0.005)


class Client:
    """One connection. `tls` is the context and the server's name."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def head(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, version: str = "1.1"
    ) -> None:
        lines = [f"{method} {target} HTTP/{version}", "host: test"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        await self.send("\r\n".join([*lines, "", ""]).encode())

    async def _more(self) -> bool:
        try:
            data = await self.stream.receive_some(1 << 20)
        except trio.BrokenResourceError:
            data = b""
        self._buffer += data
        return bool(data)

    async def answer_head(self) -> tuple[int, dict[str, str]]:
        while b"\r\n\r\n" not in self._buffer:
            assert await self._more(), f"no answer but {self._buffer!r}"
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer = bytearray(rest)
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer_body(self, length: int) -> bytes:
        while len(self._buffer) < length and await self._more():
            pass
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return body

    async def answer(self, *, to_head: bool = False) -> Answer:
        status, headers = await self.answer_head()
        length = 0 if to_head or status in {100, 304} else int(headers["content-length"])
        body = await self.answer_body(length)
        return Answer(status, headers, body, len(body) == length)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        while await self._more():
            pass
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    async def half_close(self) -> None:
        assert isinstance(self.stream, trio.SocketStream)
        await self.stream.send_eof()


class Gate:
    """A running server and what stands behind it."""

    def __init__(self, inventory: Inventory, tasks: Tasks, users: Users, sessions: Sessions) -> None:
        self.inventory = inventory
        self.tasks = tasks
        self.users = users
        self.sessions = sessions
        self.sr = ""
        self.directory = Path()
        self.port = 0
        self.tls_port = 0
        self.session = ""
        self.heard: list[bytes] = []
        self.services: DiskServices
        self.server: Server

    @asynccontextmanager
    async def client(self, trust: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
        stream: trio.abc.Stream
        if trust is None:
            stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        else:
            plain = await trio.open_tcp_stream("127.0.0.1", self.tls_port)
            stream = trio.SSLStream(plain, trust, server_hostname="localhost")
        try:
            yield Client(stream)
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        trust: ssl.SSLContext | None = None,
    ) -> Answer:
        """One request on a connection of its own; the body may fail to go out where it is refused."""
        async with self.client(trust) as client:
            given = dict(headers or {})
            if body or method == "PUT":
                given.setdefault("content-length", str(len(body)))
            await client.head(method, target, given)
            with suppress(trio.BrokenResourceError):
                await client.send(body)
            return await client.answer(to_head=method == "HEAD")

    async def vdi(self, size: int = 4 * MIB, image_format: str = "vhd", **fields: Any) -> VDI:
        ref = await self.inventory.vdi_create(
            sr=self.sr, virtual_size=size, sm_config={"image-format": image_format}
        )
        if fields:
            await self.inventory.records.vdis.change(ref, **fields)
        return self.inventory.records.vdis.get(ref)

    async def ended(self, task: str) -> Task:
        """The task, once it has ended."""
        await until(lambda: self.tasks.get(task).status.is_final)
        return self.tasks.get(task)

    async def task(self, user: str = "root") -> Task:
        return await self.tasks.create("of the test", user=user, client_made=True)

    def target(self, vdi: VDI | str | None, action: str = "import_raw_vdi", **parameters: str) -> str:
        """The path and query; the session is given unless `session_id` is."""
        query = {"session_id": self.session, **parameters}
        if vdi is not None:
            query["vdi"] = vdi if isinstance(vdi, str) else vdi.ref
        return f"/{action}?{urlencode({key: value for key, value in query.items() if value})}"

    def content(self, vdi: VDI) -> bytes:
        """What the image file holds now, read without any lease."""
        path = self.inventory.repository_of(vdi.ref).image_path(vdi.uuid)
        disk = open_disk(open_chain_files(path, writable=False))
        buffer = bytearray(disk.size)
        disk.pread_into(buffer, 0)
        disk.close()
        return bytes(buffer)

    def staged(self) -> list[str]:
        return [path.name for path in (self.directory / ".vdi-gateway" / "staging").iterdir()]


def routes(services: DiskServices, heard: list[bytes]) -> Routes:
    """RPC paths answer what they have read; `heard` gets the first byte of each body in that order."""

    def _echo(body: bytes) -> Reply:
        heard.append(body[:1])

        async def answer(request: Request, _connection: Connection) -> bytes:
            return request.scheme.encode() + b":" + body

        return answer

    large = LargeBodies()
    rpc = rpc_handler(_echo, XML, large)
    return Routes(
        {
            "/": {"POST": rpc},
            "/jsonrpc": {"POST": rpc_handler(_echo, JSON, large)},
            "/import_raw_vdi": {"PUT": ImportRawVDI(services)},
            "/export_raw_vdi": {"GET": ExportRawVDI(services)},
        }
    )


@asynccontextmanager
async def open_gate(
    directory: Path,
    tls: ssl.SSLContext | None = None,
    *,
    files: FileCalls = FILES,
    coalesces: bool = False,
    **changed_limits: float,
) -> AsyncIterator[Gate]:
    limits = replace(LIMITS, **changed_limits)  # type: ignore[arg-type]
    events = Events()
    database = await Database.open(str(directory / "gateway.sqlite3"))
    records = await Records.load(database, events)
    users = await Users.load(database, Passwords(memory_kib=64, passes=1))
    await users.create("root", "secret", Role.POOL_ADMIN)
    await users.create("alice", "secret", Role.VM_ADMIN)
    await users.create("reader", "secret", Role.READ_ONLY)
    sessions = await Sessions.load(database, users, limits=limits)
    tasks = await Tasks.load(database, events, limits=limits)
    leases, coalescing = Leases(limits), tasks if coalesces else None
    async with Inventory.open(
        records, leases, events, who="test", files=files, tasks=coalescing, limits=limits
    ) as inventory:
        gate = Gate(inventory, tasks, users, sessions)
        gate.directory = directory / "sr"
        gate.sr = await inventory.sr_create("local", str(gate.directory))
        gate.session = await sessions.login("root", "secret", address="test")
        gate.services = DiskServices.for_limits(inventory, tasks, sessions, limits)
        gate.server = Server(routes(gate.services, gate.heard), limits)
        listeners = [Listener(one) for one in listen("127.0.0.1", 0)]
        gate.port = listeners[0].socket.getsockname()[1]
        if tls is not None:
            listeners += [Listener(one, lambda: tls) for one in listen("127.0.0.1", 0)]
            gate.tls_port = listeners[-1].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tasks.run)
            await nursery.start(gate.server.run, listeners)
            yield gate
            nursery.cancel_scope.cancel()
    await database.aclose()


def chain(gate: Gate, vdi: VDI) -> list[str]:
    """The uuids of a VDI and of all that it stands on."""
    names: list[str] = []
    uuid: str | None = vdi.uuid
    while uuid is not None:
        names.append(uuid)
        uuid = gate.inventory.records.vdis.by_uuid(uuid).sm_config.get("vhd-parent")
    return names


async def coalesce(gate: Gate) -> None:
    """Merge all that can be, in the SR of a gate that coalesces when a test says so."""
    coalescers = gate.inventory._coalescers
    assert coalescers is not None
    await gate.inventory.records.srs.change(gate.sr, other_config={})
    await coalescers.of(gate.sr).coalesce()
    await gate.inventory.records.srs.change(gate.sr, other_config={PAUSED_KEY: "true"})
