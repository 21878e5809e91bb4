"""Any bytes through the real socket: one known answer each, and the process lives and stays small."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import RunningGateway
from tests.system.site import MIB, Site

# Of a gateway that nobody has logged in to; 500 is an import's answer to who has.
KNOWN = frozenset({200, 204, 400, 401, 403, 404, 405, 408, 411, 413, 417, 431, 501, 503, 505})
GROWTH_KIB = 64 << 10
LARGEST_BODY = 4 * MIB

thorough = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def exchange(gateway: RunningGateway, data: bytes) -> bytes:
    """Everything that comes back for `data` and an end of file; what comes after a reset is nothing."""
    parts = urlsplit(gateway.url)
    received = []
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                received.append(piece)
        except (ConnectionResetError, BrokenPipeError):
            pass
    return b"".join(received)


def answers(stream: bytes) -> list[tuple[int, str, bytes]]:
    """Status, content type and body of each answer in `stream`, which holds whole ones and nothing else."""
    found = []
    while stream:
        head, _, stream = stream.partition(b"\r\n\r\n")
        match = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]*(\r\n[!-~]+: [ -~]*)*", head)
        assert match is not None, head
        if match[1] == b"100":
            continue
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields[b"content-length"])
        assert len(stream) >= length
        found.append((int(match[1]), fields.get(b"content-type", b"").decode(), stream[:length]))
        stream = stream[length:]
    return found


def memory(gateway: RunningGateway) -> int:
    """The gateway's resident memory at its highest since it was last forgotten, in KiB."""
    status = Path(f"/proc/{gateway.pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1])


@contextmanager
def bounded(gateway: RunningGateway) -> Iterator[None]:
    """The process is the same afterwards, answers, and never took much more memory than before."""
    pid = gateway.pid
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): forget the peak
    before = memory(gateway)
    yield
    assert memory(gateway) - before < GROWTH_KIB
    assert gateway.running
    assert gateway.pid == pid
    assert gateway.call("host.get_all")


@pytest.fixture
def quiet(site: Site) -> Iterator[RunningGateway]:
    """The gateway; no failure of its own may be in its log afterwards."""
    before = site.gateway.log()
    with bounded(site.gateway):
        yield site.gateway
    assert '"level": "error"' not in site.gateway.log().removeprefix(before)


# No HEAD: its answers tell lengths of bodies that don't follow.
methods = st.sampled_from([b"GET", b"PUT", b"POST", b"DELETE", b"OPTIONS", b"BREW"])
paths = st.sampled_from(
    [b"/", b"/jsonrpc", b"/import_raw_vdi?vdi=x", b"/export_raw_vdi?vdi=%00&format=vhd", b"*"]
)
targets = st.one_of(
    paths, paths, st.from_regex(rb"/[a-z_%?&=]{0,60}", fullmatch=True), st.binary(max_size=40)
)
versions = st.sampled_from([b"HTTP/1.1"] * 4 + [b"HTTP/1.0", b"HTTP/9.9", b""])
known_fields = st.sampled_from(
    [
        b"Host: x",
        b"Content-Length: 3",
        b"Content-Length: -1",
        b"Content-Length: 1e3",
        b"Content-Length: 99999999999999999999999",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: \x0bchunked",
        b"Expect: 100-continue",
        b"Connection: close",
        b"Connection: upgrade",
        b"Authorization: Basic eA==",
        b"Range: bytes=0-",
        b"Cookie: session_id=%00",
        b" folded",
    ]
)
fields = st.one_of(known_fields, known_fields, known_fields, st.binary(max_size=60))


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Something between a request and noise, perhaps with more behind it."""
    line = [draw(methods), draw(targets), draw(versions)]
    host = draw(st.sampled_from([[b"Host: x"], [b"Host: x"], []]))
    lines = [b" ".join(line), *host, *draw(st.lists(fields, max_size=3)), b"", b""]
    ending = draw(st.sampled_from([b"\r\n", b"\r\n", b"\n", b"\r"]))
    return ending.join(lines) + draw(st.binary(max_size=80))


@thorough
@given(data=st.one_of(st.binary(max_size=300), heads(), heads(), st.lists(heads(), max_size=3).map(b"".join)))
@example(data=b"\r\n" * 40_000)
@example(data=b"A" * 200_000)
@example(data=b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n")
def test_any_bytes_get_known_answers(quiet: RunningGateway, data: bytes) -> None:
    found = answers(exchange(quiet, data))
    # A head that is whole has an answer, even one that makes no sense; who promised a body and left has none.
    promised = re.search(rb"(?i)content-length|transfer-encoding", data)
    assert found or promised or not re.search(rb"\n\r?\n", data.lstrip(b"\r\n"))
    for status, _, body in found:
        assert status in KNOWN
        assert HTTPStatus(status)
        assert len(body) < 100_000


deep = 2_000_000
bodies = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(str.encode),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    ).map(lambda value: json.dumps(value).encode()),
    st.builds(
        lambda method, parameters: json.dumps(
            {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        ).encode(),
        st.sampled_from(["VDI.create", "event.from", "session.login_with_password", "system.listMethods"])
        | st.text(max_size=20),
        st.lists(st.text(max_size=5) | st.integers() | st.lists(st.integers(), max_size=2), max_size=4),
    ),
    st.lists(
        st.sampled_from(
            [
                b"<methodCall>",
                b"</methodCall>",
                b"<methodName>VDI.get_all</methodName>",
                b"<params>",
                b"</params>",
                b"<param>",
                b"</param>",
                b"<value>",
                b"</value>",
                b"<i4>9</i4>",
                b"<int>x</int>",
                b"<struct><member><name>a</name>",
                b"</member></struct>",
                b"<array><data>",
                b"</data></array>",
                b"&amp;",
                b"&lol;",
                b'<?xml version="1.0" encoding="utf-7"?>',
                b"<!DOCTYPE x [<!ENTITY a 'b'>]>",
                b"\xff",
            ]
        ),
        max_size=12,
    ).map(b"".join),
)


@thorough
@given(data=bodies, path=st.sampled_from(["/", "/RPC2", "/xmlrpc", "/jsonrpc"]))
@example(data=b"[" * deep, path="/jsonrpc")
@example(data=b'{"a":' * (deep // 5), path="/jsonrpc")
@example(data=b"<value><array><data>" * (deep // 20), path="/")
@example(data=b"<a>" * (deep // 3), path="/")
@example(data=b"<a/>" * (deep // 4), path="/")
@example(data=b"9" * deep, path="/jsonrpc")
@example(data=b"x" * (LARGEST_BODY + 1), path="/")
@example(
    data=b"<!DOCTYPE a [<!ENTITY a '" + b"a" * 1000 + b"'><!ENTITY b '" + b"&a;" * 1000 + b"'>]><a>&b;</a>",
    path="/",
)
def test_any_body_of_a_call_gets_one_answer(quiet: RunningGateway, data: bytes, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    [(status, content_type, body)] = answers(exchange(quiet, head.encode() + data))
    if len(data) > LARGEST_BODY:
        assert status == 413
        return
    assert status == 200
    assert len(body) < 100_000
    if path == "/jsonrpc":
        assert content_type == "application/json"
        answer = json.loads(body)
        assert ("error" in answer) or ("result" in answer)
    else:
        assert content_type == "text/xml"
        assert ElementTree.fromstring(body).tag == "methodResponse"
