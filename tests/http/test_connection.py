"""Heads, small bodies, keep-alive, limits: what one connection may do, and what it may not."""

import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
import trio
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.core.limits import Limits
from gateway.http.connection import Connection
from gateway.http.request import BadRequest, Request, parse_cookies, parse_head
from gateway.http.routes import Routes
from gateway.http.rpc import XML, LargeBodies, Reply, rpc_handler
from gateway.http.wire import Wire
from tests.http.gate import Client, Gate, open_gate, until


async def test_rpc_paths_and_their_exact_content_types(gate: Gate) -> None:
    for path in ("/", "/RPC2", "/xmlrpc", "/anything/else", "/RPC2/"):
        answer = await gate.ask("POST", path, body=b"<x/>")
        assert (answer.status, answer.headers["content-type"], answer.body) == (200, "text/xml", b"http:<x/>")
    answer = await gate.ask("POST", "/jsonrpc", body=b"{}")
    assert (answer.headers["content-type"], answer.body) == ("application/json", b"http:{}")


async def test_rpc_over_tls(gate: Gate, trust: ssl.SSLContext) -> None:
    assert (await gate.ask("POST", "/", body=b"x", trust=trust)).body == b"https:x"


async def test_requests_on_one_connection_pipelined_or_not(gate: Gate) -> None:
    request = b"POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\n\r\n"
    async with gate.client() as client:
        await client.send(request + b"a" + request + b"b" + request[:20])
        assert [(await client.answer()).body for _ in range(2)] == [b"http:a", b"http:b"]
        await client.send(request[20:] + b"c\r\n\r\n" + request + b"d")
        assert [(await client.answer()).body for _ in range(2)] == [b"http:c", b"http:d"]


async def test_others_have_their_turn_between_requests_that_came_at_once() -> None:
    turns, seen = 0, []

    async def count(_request: Request, _connection: Connection) -> bytes:
        seen.append(turns)
        return b""

    async with trio.open_nursery() as nursery:

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(others)
        await talk(
            b"POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\n\r\nx" * 50,
            rpc(lambda _body: count),
        )
        nursery.cancel_scope.cancel()
    # Who comes first in a round of the loop differs from round to round.
    assert len(seen) == 50
    assert len(set(seen)) >= 25


async def test_continue_is_sent_only_to_who_waits_for_it(gate: Gate) -> None:
    async with gate.client() as client:
        await client.head("POST", "/", {"content-length": "1", "expect": "100-Continue"})
        assert (await client.answer()).status == 100
        await client.send(b"x")
        assert (await client.answer()).body == b"http:x"


async def test_http_1_0_and_connection_close_end_the_connection(gate: Gate) -> None:
    for version, headers in (("1.0", {}), ("1.1", {"connection": "Close"})):
        async with gate.client() as client:
            await client.head("POST", "/", {"content-length": "1", **headers}, version)
            await client.send(b"x")
            answer = await client.answer()
            assert answer.headers["connection"] == "close"
            assert await client.rest() == b""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/unknown", 404),
        ("GET", "/", 405),
        ("HEAD", "/unknown", 404),
        ("PUT", "/import_raw_vdix", 404),
        ("GET", "/import_raw_vdi", 405),
        ("POST", "/import_raw_vdi", 405),
        ("DELETE", "/export_raw_vdi/x", 405),
        ("BREW", "/import_raw_vdi", 501),
        ("PUT", "http://gateway:80/import_raw_vdi", 403),
        ("PUT", "/import_raw_vdi/disk.raw", 403),
        ("OPTIONS", "*", 404),
    ],
)
async def test_routes(gate: Gate, method: str, path: str, status: int) -> None:
    answer = await gate.ask(method, path, {"content-length": "0"})
    assert answer.status == status
    if status == 405:
        assert answer.headers["allow"]


async def test_limits_of_heads_and_bodies(gate: Gate) -> None:
    async with gate.client() as client:
        await client.head("GET", "/", {"x": "y" * (65 << 10)})
        assert (await client.answer()).status == 431
    async with gate.client() as client:
        await client.send(b"G" * (70 << 10))
        assert (await client.answer()).status == 431
    async with gate.client() as client:
        await client.head("POST", "/", {"content-length": str(5 << 20)})
        assert (await client.answer()).status == 413
    for headers in ({}, {"transfer-encoding": "chunked"}):
        async with gate.client() as client:
            await client.head("POST", "/", headers)
            assert (await client.answer()).status == 411


async def test_a_slow_head_is_408_and_silence_is_closed(tmp_path: Path) -> None:
    async with open_gate(tmp_path, header_seconds=0.1, keepalive_idle=0.1) as gate:
        async with gate.client() as client:
            await client.send(b"GET / HT")
            assert (await client.answer()).status == 408
        async with gate.client() as client:
            assert await client.rest() == b""
        async with gate.client() as client:
            await client.head("GET", "/")
            await client.answer()
            assert await client.rest() == b""


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01", b"\0", b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]
)
async def test_garbage_is_400(gate: Gate, garbage: bytes) -> None:
    async with gate.client() as client:
        await client.send(garbage)
        answer = await client.answer()
        assert (answer.status, answer.text.count("\n")) == (400, 1)


async def test_plain_http_on_the_tls_port_is_closed(gate: Gate) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", gate.tls_port)
    async with stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
    assert (await gate.ask("POST", "/", body=b"x")).status == 200


async def test_too_many_connections_are_told(tmp_path: Path) -> None:
    async with open_gate(tmp_path, connections=1) as gate:
        async with gate.client() as first:
            await first.head("GET", "/")
            await first.answer()
            async with gate.client() as second:
                answer = await second.answer()
                assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        await until(lambda: not gate.server.connection_count)
        assert (await gate.ask("POST", "/", body=b"x")).status == 200


async def test_one_address_cannot_take_all_connections(tmp_path: Path) -> None:
    async with open_gate(tmp_path, connections_per_address=1) as gate:
        async with gate.client() as first:
            await first.head("GET", "/")
            await first.answer()
            async with gate.client() as second:
                assert (await second.answer()).status == 503
            elsewhere = await trio.open_tcp_stream("127.0.0.1", gate.port, local_address="127.0.0.2")
            async with elsewhere:
                await Client(elsewhere).head("GET", "/")
                assert (await Client(elsewhere).answer()).status == 405
        await until(lambda: not gate.server.connection_count)
        assert gate.server._by_network == {}
        assert (await gate.ask("POST", "/", body=b"x")).status == 200


async def test_an_ipv6_network_counts_as_one_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a client's address is must be said here: this machine has no such network.
    comers = iter(["2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1"])
    monkeypatch.setattr("gateway.http.server.peer_address", lambda _: next(comers))
    async with open_gate(tmp_path, connections_per_address=1) as gate:
        async with gate.client() as first:
            await first.head("GET", "/")
            await first.answer()
            async with gate.client() as neighbour:
                assert (await neighbour.answer()).status == 503
            async with gate.client() as elsewhere:
                await elsewhere.head("GET", "/")
                assert (await elsewhere.answer()).status == 405


async def test_a_stopping_server_closes_idle_connections_at_once(tmp_path: Path) -> None:
    async with open_gate(tmp_path, shutdown_seconds=60.0) as gate:
        async with gate.client() as client:
            await client.head("GET", "/")
            await client.answer()
            gate.server.stop()
            assert await client.rest() == b""


async def test_secrets_are_masked_in_the_log(gate: Gate) -> None:
    with structlog.testing.capture_logs() as logs:
        await gate.ask(
            "PUT", gate.target("x") + "&%73ession_id=" + gate.session, {"authorization": "Basic s3cr"}
        )
    assert any(entry["event"] == "request" for entry in logs)
    assert gate.session.partition(":")[2] not in str(logs)
    assert "s3cr" not in str(logs)


async def test_the_log_keeps_the_begin_of_a_long_target_alone(gate: Gate) -> None:
    with structlog.testing.capture_logs() as logs:
        await gate.ask("GET", f"/{'x' * 30_000}")
        await gate.ask("GET", f"/x?a={'y' * 30_000}&session_id={gate.session}")
    targets = [entry["target"] for entry in logs if entry["event"] == "request"]
    assert [(len(target), target[:5], target[-1]) for target in targets] == [
        (1001, "/xxxx", "…"),
        (1001, "/x?a=", "…"),
    ]


async def test_an_unexpected_failure_is_500_without_details() -> None:
    async def fail(_request: Request, _connection: Connection) -> bytes:
        raise ValueError("the secret detail")

    with structlog.testing.capture_logs() as logs:
        said = await talk(
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
            rpc(lambda _body: fail),
        )
    assert said.startswith(b"HTTP/1.1 500 ")
    assert b"secret" not in said
    assert any(entry["log_level"] == "error" for entry in logs)


async def test_who_has_no_memory_for_the_end_of_a_connection_ends_that_alone(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_memory(_wire: Wire, _limit: int, _seconds: float) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr(Wire, "half_close_and_drain", no_memory)
        async with gate.client() as client:
            await client.head("POST", "/", {"connection": "close", "content-length": "1"})
            await client.send(b"x")
            assert (await client.answer()).body == b"http:x"
            assert await client.rest() == b""
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["connection failed"]
    assert (await gate.ask("POST", "/", body=b"y")).body == b"http:y"


def test_cookies() -> None:
    assert parse_cookies("a=1; b=2;c = 3") == {"a": "1", "b": "2", "c ": " 3"}
    assert parse_cookies("a=1&b=%20x&a=2") == {"a": "1", "b": " x"}
    assert parse_cookies("a=1&2;b") == {"a": "1&2", "b": ""}
    assert parse_cookies("") == {}


@pytest.mark.parametrize(
    "fields",
    [
        b"transfer-encoding: gzip,\r\n chunked\r\n",
        b"transfer-encoding: gzip\r\nx: y\r\nTransfer-Encoding:chunked\r\n",
        b"transfer-encoding:\r\n\tgzip,\r\n chunked \r\n",
    ],
)
def test_all_of_a_transfer_encoding_is_seen(fields: bytes) -> None:
    head = b"PUT / HTTP/1.1\r\nhost: x\r\n" + fields + b"z: y\r\n\r\n"
    request, _ = parse_head(head, scheme="http", address="x", largest=len(head) + 1)
    assert request.transfer_encoding == "gzip, chunked"
    assert request.headers["z"] == "y"


def test_a_header_is_no_request_line() -> None:
    head = b"Transfer-Encoding: chunked\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n"
    with pytest.raises(BadRequest):
        parse_head(head, scheme="http", address="x", largest=len(head) + 1)


async def talk(data: bytes, routes: Routes) -> bytes:
    """What a connection over a socket pair answers to these bytes and an end of file."""
    limits = Limits(header_seconds=2, keepalive_idle=2, transfer_idle=2, refusal_drain_seconds=0.5)
    ours, theirs = socket.socketpair()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Connection(Wire(theirs), limits, routes.handle).run)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            async with stream:
                said = b""
                try:
                    await stream.send_all(data)
                    await stream.send_eof()
                except trio.BrokenResourceError:
                    pass
                try:
                    while more := await stream.receive_some():
                        said += more
                except trio.BrokenResourceError:
                    pass
    return said


def rpc(read: Callable[[bytes], Reply]) -> Routes:
    return Routes({"/": {"POST": rpc_handler(read, XML, LargeBodies())}})


def _echo(body: bytes) -> Reply:
    async def answer(_request: Request, _connection: Connection) -> bytes:
        return body

    return answer


ROUTES = rpc(_echo)
WORDS = st.sampled_from(
    [
        b"GET", b"POST", b"PUT", b" ", b"/", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n", b"\r\n\r\n", b":",
        b"host: x", b"content-length: 3", b"content-length:", b"transfer-encoding: chunked", b"\0", b"\xff",
        b"expect: 100-continue", b"connection: keep-alive", b"abc", b"cookie: a=%zz;&=;", b"?a=%&b&=c", b"5",
    ]
)  # fmt: skip


@given(st.one_of(st.binary(max_size=300), st.lists(WORDS, max_size=30).map(b"".join)))
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_any_bytes_get_answers_or_the_end_and_never_a_failure(data: bytes) -> None:
    with structlog.testing.capture_logs() as logs:
        said = trio.run(talk, data, ROUTES)
    assert not [entry for entry in logs if entry["log_level"] == "error"], logs
    assert said == b"" or said.startswith(b"HTTP/1.1 ")


@given(st.one_of(st.binary(max_size=300), st.lists(WORDS, max_size=30).map(b"".join)))
@settings(max_examples=300)
def test_any_head_is_parsed_or_refused(data: bytes) -> None:
    try:
        request, _ = parse_head(data + b"\r\n\r\n", scheme="http", address="1", largest=1 << 16)
    except BadRequest as bad:
        assert 400 <= bad.status < 600
    else:
        assert request.method


async def test_any_bytes_as_a_tls_handshake(authority: trustme.CA) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    for data in (
        b"",
        b"\x16\x03\x01",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        b"\x16\x03\x01\x00\x05" + bytes(50),
    ):
        ours, theirs = socket.socketpair()
        with ours, trio.fail_after(10):
            ours.send(data)
            ours.shutdown(socket.SHUT_WR)
            await Connection(Wire(theirs, context), Limits(), ROUTES.handle).run()
