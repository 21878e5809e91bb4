"""Where a file is fetched from: redirections, names and addresses, TLS; and an abort wherever it waits."""

import os
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from gateway.transfers.body import TransferAborted
from gateway.transfers.pull import Pull
from gateway.transfers.pull_connection import Client
from gateway.transfers.pull_socket import Interrupt, Patience
from gateway.transfers.pull_source import ImageURL, PullRules
from tests.transfers.fetching import DATA, MIB, NO_PATIENCE, SHA256, fetched, refusal
from tests.transfers.pull_server import LOOPBACK, Connection, Handler, Request, file_of, serving


def redirect(location: str, number: int = 302) -> Handler:
    return lambda _request, connection: connection.head(number, Location=location, Content_Length=0)


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
def test_a_redirection_is_followed_without_the_password(number: int) -> None:
    with serving(file_of(DATA)) as last, serving(redirect(last.url + "/there", number)) as server:
        url = server.url.replace("//", "//me:secret@")
        assert fetched(url) == DATA
        assert "authorization" in server.requests[0].headers
        assert "authorization" not in last.requests[0].headers
        assert last.requests[0].target == "/there"


def test_redirections_end() -> None:
    with serving(redirect("/again")) as server:
        error = refusal(server.url)
        assert (error.code, len(server.requests)) == ("PULL_ERROR_REDIRECT", 6)


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://a b/", "gopher://x"])
def test_a_redirection_to_something_else_is_refused(location: str) -> None:
    with serving(redirect(location)) as server:
        assert refusal(server.url).code == "PULL_ERROR_REDIRECT"


@pytest.mark.parametrize("place", ["10.1.2.3", "169.254.169.254", "[::1]", "[::ffff:7f00:1]", "127.0.0.2"])
def test_each_redirection_is_held_against_the_rules(place: str) -> None:
    url = f"http://{place}:9/latest/meta-data/"
    with serving(redirect(url)) as server:
        error = refusal(server.url)
    assert error.code == "PULL_ERROR_ADDRESS_REFUSED"
    assert error.params[0] == str(ImageURL.parse(url))  # Python 3.13 writes such IPv6 addresses otherwise


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0"])
def test_the_loopback_is_refused_under_all_its_names(host: str) -> None:
    with serving(file_of(DATA)) as server:
        port = server.url.rpartition(":")[2]
        error = refusal(f"http://{host}:{port}/", rules=PullRules())
        assert (error.code, server.requests) == ("PULL_ERROR_ADDRESS_REFUSED", [])


def test_a_name_that_means_another_address_the_second_time_gains_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = iter(["127.0.0.1", "169.254.169.254"])

    def resolve(_host: str, port: int, **_more: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(places), port))]

    with serving(file_of(DATA, cuts=iter([MIB, MIB]))) as server:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        port = server.url.rpartition(":")[2]
        error = refusal(f"http://rebind.example:{port}/", rules=PullRules.of(["rebind.example"]))
    assert (error.code, error.params[1]) == ("PULL_ERROR_ADDRESS_REFUSED", "169.254.169.254")


def test_of_several_addresses_the_permitted_one_that_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(_host: str, port: int, **_more: object) -> list[object]:
        places = ["10.0.0.1", "127.0.0.9", "127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in places]

    with serving(file_of(DATA)) as server:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        port = server.url.rpartition(":")[2]
        assert fetched(f"http://a.example:{port}/", rules=PullRules.of(["127.0.0.0/8"])) == DATA


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ending = threading.Event()

    def resolve(*_arguments: object, **_more: object) -> list[object]:
        ending.wait()
        return []

    pipes: list[tuple[int, int]] = []
    make = os.pipe2

    def noted(flags: int) -> tuple[int, int]:
        pipes.append(make(flags))
        return pipes[-1]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(os, "pipe2", noted)
    try:
        error = refusal("http://a.example/", patience=NO_PATIENCE)
        for read_end, _ in pipes:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(read_end)
    finally:
        ending.set()
    assert (error.code, "in time" in error.message) == ("PULL_ERROR_UNREACHABLE", True)
    assert pipes


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def context_of(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def trusting(authority: trustme.CA, tmp_path: Path) -> PullRules:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return PullRules.of(LOOPBACK, str(tmp_path / "ca.pem"))


def test_over_tls_it_comes_and_goes_on_too(authority: trustme.CA, tmp_path: Path) -> None:
    rules = trusting(authority, tmp_path)
    cuts = iter([MIB, MIB, len(DATA)])
    with serving(file_of(DATA, cuts=cuts), context_of(authority, "127.0.0.1")) as server:
        assert fetched(server.url, SHA256, rules=rules) == DATA
        assert len(server.requests) == 3


def test_a_body_without_an_end_that_tls_did_not_end_is_no_whole_one(
    authority: trustme.CA, tmp_path: Path
) -> None:
    def handler(_request: Request, connection: Connection) -> None:
        connection.head(Connection="close")
        connection.send(DATA[:MIB])

    with serving(handler, context_of(authority, "127.0.0.1")) as server:
        error = refusal(server.url, SHA256, rules=trusting(authority, tmp_path))
    assert error.code in ("PULL_ERROR_BROKEN_OFF", "PULL_ERROR_CHANGED")


def test_a_certificate_of_nobody_or_of_somebody_else_is_refused(
    authority: trustme.CA, tmp_path: Path
) -> None:
    rules = trusting(authority, tmp_path)
    with serving(file_of(DATA), context_of(authority, "127.0.0.1")) as server:
        error = refusal(server.url)
        assert (error.code, "can't be used" in error.message) == ("PULL_ERROR_CERTIFICATE", False)
        assert server.requests == []
    with serving(file_of(DATA), context_of(authority, "other.example")) as server:
        assert refusal(server.url, rules=rules).code == "PULL_ERROR_CERTIFICATE"
        assert server.requests == []
    with serving(file_of(DATA)) as server:
        error = refusal(server.url.replace("http:", "https:"), rules=rules, patience=NO_PATIENCE)
        assert error.code == "PULL_ERROR_UNREACHABLE"
    with serving(redirect("http://127.0.0.1/"), context_of(authority, "127.0.0.1")) as server:
        assert refusal(server.url, rules=rules).code == "PULL_ERROR_REDIRECT"
    missing = PullRules.of(LOOPBACK, str(tmp_path / "missing.pem"))
    with serving(file_of(DATA), context_of(authority, "127.0.0.1")) as server:
        assert "missing.pem" in refusal(server.url, rules=missing).message


def silent_resolver(monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable[[], None]]:
    asked, ending = threading.Event(), threading.Event()

    def resolve(*_arguments: object, **_more: object) -> list[object]:
        asked.set()
        ending.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return "http://a.example/", ending.set


@pytest.mark.parametrize("place", ["resolver", "connect", "tls", "head", "body", "pause"])
def test_an_abort_wakes_it_wherever_it_waits(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt = Interrupt()
    patience = Patience(connect=1000, idle=1000, pauses=(1000.0,))
    client = Client(PullRules.of(LOOPBACK), patience, interrupt)
    ended: list[BaseException] = []
    waiting = threading.Event()
    wait = Interrupt.wait

    def noted(self: Interrupt, fd: int | None, events: int, seconds: float) -> bool:
        # Ready descriptors are no waiting; those that stay silent are.
        if wait(self, fd, events, 0.3):
            return True
        waiting.set()
        return wait(self, fd, events, seconds)

    monkeypatch.setattr(Interrupt, "wait", noted)

    def handler(_request: Request, connection: Connection) -> None:
        if place == "body":
            connection.head(Content_Length=100)
        if place != "pause":
            connection.wait_for_end()

    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    with full, socket.create_connection(full.getsockname()), serving(handler) as server:
        url, end = server.url, threading.Event().set
        if place == "resolver":
            url, end = silent_resolver(monkeypatch)
        elif place == "tls":
            url = f"https://127.0.0.1:{full.getsockname()[1]}"
        elif place == "connect":
            # The queue of those that wait to be accepted is full.
            others = [socket.socket() for _ in range(3)]
            for other in others:
                other.setblocking(False)
                other.connect_ex(full.getsockname())
            url = f"http://127.0.0.1:{full.getsockname()[1]}"
        pull = Pull(ImageURL.parse(url), client)

        def work() -> None:
            try:
                pull.open()
                pull.finish()
            except BaseException as error:  # noqa: BLE001  the test looks at it
                ended.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert waiting.wait(30)
        pull.abort()
        thread.join(30)
        end()
        pull.close()
        interrupt.close()
        if place == "connect":
            for other in others:
                other.close()
    assert [type(error) for error in ended] == [TransferAborted]


@pytest.mark.parametrize("chunked", [False, True])
def test_an_abort_ends_it_where_it_never_waits_because_bytes_are_there(chunked: bool) -> None:
    sent = threading.Event()

    def handler(request: Request, connection: Connection) -> None:
        file_of(bytes(20_000), chunked=chunked)(request, connection)
        sent.set()
        connection.wait_for_end()

    interrupt = Interrupt()
    client = Client(PullRules.of(LOOPBACK), Patience(), interrupt)
    with serving(handler) as server, memoryview(bytearray(1000)) as view:
        pull = Pull(ImageURL.parse(server.url), client)
        pull.open()
        assert pull.recv_into(view)
        assert sent.wait(30)
        pull.abort()
        with pytest.raises(TransferAborted):
            pull.recv_into(view)
        pull.close()
    interrupt.close()
