"""Handlers that wait for something to tell, and the Unix socket."""

import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.limits import Limits
from gateway.core.peer import Peer
from gateway.http import server as server_module
from gateway.http.connection import Connection
from gateway.http.request import Request
from gateway.http.routes import Routes
from gateway.http.server import Listener, Server, listen, listen_locally
from gateway.http.wire import Wire
from tests.http.gate import Client

POST = b"POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\n\r\nx"


class Waiting:
    """A server whose only handler waits for the end of its connection."""

    def __init__(self) -> None:
        self.began = trio.Event()
        self.ended = trio.Event()
        self.server = Server(Routes({"/": {"POST": self.handle}}), Limits(refusal_drain_seconds=1.0))

    async def handle(self, connection: Connection, request: Request) -> None:
        await connection.read_body(10)
        self.began.set()
        await connection.ending()
        self.ended.set()
        await connection.respond(HTTPStatus.OK, request.address.encode())


@asynccontextmanager
async def served(*listeners: Listener) -> AsyncIterator[Waiting]:
    waiting = Waiting()
    async with trio.open_nursery() as nursery:
        await nursery.start(waiting.server.run, listeners)
        yield waiting
        nursery.cancel_scope.cancel()


def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_handler_that_waits_learns_that_its_client_has_gone(
    encrypted: bool, authority: trustme.CA, trust: ssl.SSLContext
) -> None:
    (bound,) = listen("127.0.0.1", 0)
    context = tls(authority)
    async with served(Listener(bound, (lambda: context) if encrypted else None)) as waiting:
        stream: trio.abc.Stream = await trio.open_tcp_stream("127.0.0.1", bound.getsockname()[1])
        if encrypted:
            stream = trio.SSLStream(stream, trust, server_hostname="localhost", https_compatible=True)
        await stream.send_all(POST)
        await waiting.began.wait()
        assert not waiting.ended.is_set()
        await stream.aclose()
        await waiting.ended.wait()


async def test_others_have_their_turn_between_records_of_tls_that_are_there(
    authority: trustme.CA, trust: ssl.SSLContext
) -> None:
    ours, theirs = trio.socket.socketpair()
    stream = trio.SSLStream(trio.SocketStream(theirs), trust, server_hostname="localhost")
    plain = socket.socket(fileno=ours.detach())
    wire = Wire(plain, tls(authority))
    turns, seen = 0, []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.do_handshake)
        await wire.handshake()
        await wait_all_tasks_blocked()
        for _ in range(50):
            await stream.send_all(b"x")

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(others)
        for _ in range(50):
            assert await wire.receive_some() == b"x"
            seen.append(turns)
        nursery.cancel_scope.cancel()
    wire.close()
    theirs.close()
    # Who comes first in a round of the loop differs from round to round.
    assert len(set(seen)) >= 25


async def test_the_next_request_does_not_hide_that_the_client_has_gone() -> None:
    (bound,) = listen("127.0.0.1", 0)
    async with served(Listener(bound)) as waiting:
        stream = await trio.open_tcp_stream("127.0.0.1", bound.getsockname()[1])
        await stream.send_all(POST)
        await waiting.began.wait()
        await stream.send_all(POST)
        await stream.aclose()
        await waiting.ended.wait()


async def test_a_handler_that_waits_answers_at_once_when_the_gateway_stops() -> None:
    (bound,) = listen("127.0.0.1", 0)
    async with served(Listener(bound)) as waiting:
        client = Client(await trio.open_tcp_stream("127.0.0.1", bound.getsockname()[1]))
        await client.send(POST)
        await waiting.began.wait()
        waiting.server.stop()
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        await client.stream.aclose()


async def test_who_takes_an_answer_slowly_gets_all_of_it_and_who_takes_nothing_is_given_up(
    mock_clock: MockClock,
) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    connection = Connection(Wire(ours), Limits(), Waiting().handle)
    answer, taken = bytes(4 << 20), 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.send, answer)
        while taken < len(answer):
            await wait_all_tasks_blocked()
            mock_clock.jump(0.9 * connection.limits.transfer_idle)
            taken += len(theirs.recv(1 << 20))

    async def in_vain() -> None:
        with pytest.raises(trio.TooSlowError):
            await connection.send(answer)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_vain)
        await wait_all_tasks_blocked()
        mock_clock.jump(connection.limits.transfer_idle)
    connection.wire.close()
    theirs.close()


async def test_the_unix_socket_takes_the_place_of_a_stale_one_and_is_private(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 40)
    directory.mkdir()
    path = directory / "xapi.sock"
    listen_locally(str(path)).close()
    bound = listen_locally(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    async with served(Listener(bound)) as waiting:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        opened = os.open(directory, os.O_PATH)
        await sock.connect(f"/proc/self/fd/{opened}/xapi.sock")
        os.close(opened)
        client = Client(trio.SocketStream(sock))
        await client.send(POST)
        await waiting.began.wait()
        waiting.server.stop()
        assert (await client.answer()).body == b"unix"
        await client.stream.aclose()


async def test_another_user_is_sent_away_from_the_unix_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "xapi.sock")
    bound = listen_locally(path)
    monkeypatch.setattr(server_module, "peer_of", lambda _: Peer(1, os.geteuid() + 12345))
    async with served(Listener(bound)) as waiting:
        stream = await trio.open_unix_socket(path)
        assert await stream.receive_some() == b""
        assert not waiting.began.is_set()
        await stream.aclose()
