"""A file is fetched over real connections: whatever the server does, it comes whole or an error is told."""

import hashlib
import os
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
import trustme

from gateway.core.errors import XenAPIError
from gateway.transfers.body import TransferAborted
from gateway.transfers.pull import Checksum, Pull
from gateway.transfers.pull_connection import Client
from gateway.transfers.pull_socket import Interrupt, Patience
from gateway.transfers.pull_source import ImageURL, PullRules
from tests.transfers.pull_server import LOOPBACK, Connection, Handler, Request, file_of, serving

MIB = 1 << 20
DATA = random.Random(3).randbytes(3 * MIB + 77)
EAGER = Patience(connect=10, idle=10, pauses=(0.0, 0.0, 0.0))
NO_PATIENCE = Patience(connect=0.3, idle=0.3, pauses=(0.0,))
SHA256 = Checksum("sha256", hashlib.sha256(DATA).hexdigest())


def fetched(
    url: str,
    checksum: Checksum | None = None,
    *,
    rules: PullRules | None = None,
    patience: Patience = EAGER,
    pieces: int = 300_000,
) -> bytes:
    interrupt = Interrupt()
    pull = Pull(ImageURL.parse(url), Client(rules or PullRules.of(LOOPBACK), patience, interrupt))
    found = bytearray()
    try:
        pull.open(checksum)
        view = memoryview(bytearray(pieces))
        while got := pull.recv_into(view):
            found += view[:got]
        pull.finish()
        assert pull.received == len(found)
        assert pull.checksum == Checksum("sha256", hashlib.sha256(found).hexdigest())
        assert pull.fraction() == (1.0 if pull.length else 0.0)
    finally:
        pull.close()
        interrupt.close()
    return bytes(found)


def refusal(url: str, checksum: Checksum | None = None, **more: object) -> XenAPIError:
    with pytest.raises(XenAPIError) as refused:
        fetched(url, checksum, **more)  # type: ignore[arg-type]
    return refused.value


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("pieces", [1 << 20, 5000])
def test_a_file_comes_as_it_is(chunked: bool, pieces: int) -> None:
    with serving(file_of(DATA, chunked=chunked)) as server:
        assert fetched(server.url + "/a?b=c", SHA256, pieces=pieces) == DATA
        (request,) = server.requests
    assert request.target == "/a?b=c"
    assert request.headers["host"] == server.url.removeprefix("http://")
    assert request.headers["accept-encoding"] == "identity"


def test_an_empty_file_has_an_end() -> None:
    with serving(file_of(b"")) as server:
        assert fetched(server.url) == b""


def cuts_of(seed: int) -> Iterator[int]:
    chance = random.Random(seed)
    return chain((chance.randrange(1, 600_000) for _ in range(6)), repeat(len(DATA)))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("tag", ['"v1"', None, 'W/"v1"'])
@pytest.mark.parametrize("seed", range(3))
def test_it_goes_on_where_a_connection_broke(chunked: bool, tag: str | None, seed: int) -> None:
    cuts = cuts_of(seed)
    if tag != '"v1"':
        # All of it comes again: each attempt must get further.
        cuts = iter([700_000, 1_500_000, 2_000_000, len(DATA) + 1])
    with serving(file_of(DATA, tag=tag, cuts=cuts, chunked=chunked)) as server:
        assert fetched(server.url, SHA256) == DATA
        asked = ["range" in request.headers for request in server.requests]
    assert len(asked) >= 4
    assert any(asked) is (tag == '"v1"')


def test_a_server_that_knows_no_ranges_sends_it_again() -> None:
    cuts = iter([1_000_000, 2_000_000, len(DATA)])
    with serving(file_of(DATA, ranges=False, cuts=cuts)) as server:
        assert fetched(server.url) == DATA
        assert ["range" in request.headers for request in server.requests] == [False, True, True]


def test_a_date_serves_as_well_as_a_tag_if_it_is_old_enough() -> None:
    for date, expected in (("Tue, 17 Nov 2026 10:00:00 GMT", True), ("Mon, 23 Nov 2026 04:00:00 GMT", False)):
        cuts = iter([1_000_000, len(DATA)])
        now = "Mon, 23 Nov 2026 04:00:01 GMT"
        handler = file_of(DATA, tag=None, cuts=cuts, Date=now, Last_Modified=date)
        with serving(handler) as server:
            assert fetched(server.url) == DATA
            assert (server.requests[1].headers.get("if-range") == date) is expected


def test_a_date_that_cannot_be_sent_back_is_not_used() -> None:
    cuts = iter([1_000_000, len(DATA)])
    later, earlier = "Mon, 23 Nov 2026 04:00:01 GMT", "Tue, 17 Nov 2026 10:00:00 GMT (\xc3\xa9)"
    with serving(file_of(DATA, tag=None, cuts=cuts, Date=later, Last_Modified=earlier)) as server:
        assert fetched(server.url) == DATA
        assert "range" not in server.requests[1].headers


def changing(after: Handler, before: Handler) -> Handler:
    """Another file from the second request on."""
    count = iter(range(1000))

    def handler(request: Request, connection: Connection) -> None:
        (before if next(count) == 0 else after)(request, connection)

    return handler


OTHER = DATA[: 2 * MIB] + os.urandom(len(DATA) - 2 * MIB)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_file_that_changes_is_one_or_the_other(chunked: bool) -> None:
    first = file_of(DATA, cuts=iter([MIB]), chunked=chunked)
    with serving(changing(file_of(OTHER, tag='"v2"', chunked=chunked), first)) as server:
        # What came before is the begin of the new one, too.
        assert fetched(server.url) == OTHER
    first = file_of(DATA, cuts=iter([MIB]), chunked=chunked)
    with serving(changing(file_of(OTHER[::-1], tag='"v2"', chunked=chunked), first)) as server:
        assert refusal(server.url).code == "PULL_ERROR_CHANGED"
    first = file_of(DATA, cuts=iter([MIB]), chunked=chunked)
    with serving(changing(file_of(DATA[:1000], tag='"v2"', chunked=chunked), first)) as server:
        assert refusal(server.url).code == "PULL_ERROR_CHANGED"


def test_a_tag_that_goes_with_other_bytes_is_found_out_by_length_or_checksum() -> None:
    longer = DATA + b"more"
    with serving(changing(file_of(longer), file_of(DATA, cuts=iter([MIB])))) as server:
        assert refusal(server.url).code == "PULL_ERROR_CHANGED"
    wrong = bytes(len(DATA))
    with serving(changing(file_of(wrong), file_of(DATA, cuts=iter([MIB])))) as server:
        error = refusal(server.url, SHA256)
    assert (error.code, error.params[1]) == ("PULL_ERROR_CHECKSUM", str(SHA256))


def test_a_rest_that_is_not_the_one_asked_for_is_refused() -> None:
    def wrong(request: Request, connection: Connection) -> None:
        connection.head(206, Content_Range=f"bytes 0-9/{len(DATA)}", Content_Length=10, ETag='"v1"')
        connection.send(DATA[:10])

    with serving(changing(wrong, file_of(DATA, cuts=iter([MIB])))) as server:
        assert refusal(server.url).code == "PULL_ERROR_NOT_HTTP"


def test_a_rest_that_is_longer_than_the_file_ends_with_the_file() -> None:
    def longer(request: Request, connection: Connection) -> None:
        first = int(request.headers["range"].removeprefix("bytes=").rstrip("-"))
        content_range = f"bytes {first}-{len(DATA) - 1}/{len(DATA)}"
        connection.head(206, Content_Range=content_range, Transfer_Encoding="chunked", ETag='"v1"')
        connection.chunk(DATA[first:] + bytes(MIB))
        connection.send(b"0\r\n\r\n")

    for pieces in (1 << 20, 5000):
        with serving(changing(longer, file_of(DATA, cuts=iter([MIB])))) as server:
            assert fetched(server.url, SHA256, pieces=pieces) == DATA


def test_a_rest_in_parts_is_taken_part_by_part() -> None:
    def parts(request: Request, connection: Connection) -> None:
        first = int(request.headers["range"].removeprefix("bytes=").rstrip("-"))
        last = min(first + 200_000, len(DATA)) - 1
        connection.head(
            206,
            Content_Range=f"bytes {first}-{last}/{len(DATA)}",
            Content_Length=last + 1 - first,
            ETag='"v1"',
        )
        connection.send(DATA[first : last + 1])

    with serving(changing(parts, file_of(DATA, cuts=iter([MIB])))) as server:
        assert fetched(server.url, SHA256) == DATA


def test_a_length_that_is_too_large_is_no_success() -> None:
    def handler(_request: Request, connection: Connection) -> None:
        connection.head(Content_Length=len(DATA) + 5, ETag='"v1"')
        connection.send(DATA)

    def honest_about_ranges(request: Request, connection: Connection) -> None:
        (file_of(DATA) if "range" in request.headers else handler)(request, connection)

    with serving(handler) as server:
        error = refusal(server.url)
        assert (error.code, error.params[1]) == ("PULL_ERROR_BROKEN_OFF", str(len(DATA)))
    with serving(honest_about_ranges) as server:
        assert refusal(server.url).code == "PULL_ERROR_CHANGED"


def test_attempts_that_bring_nothing_end() -> None:
    with serving(file_of(DATA, cuts=chain([MIB], repeat(0)))) as server:
        error = refusal(server.url)
        assert (error.code, error.params[1]) == ("PULL_ERROR_BROKEN_OFF", str(MIB))
        assert len(server.requests) == 1 + len(EAGER.pauses)
    with serving(lambda _request, _connection: None) as server:
        assert refusal(server.url).code == "PULL_ERROR_BROKEN_OFF"
        assert len(server.requests) == 1 + len(EAGER.pauses)


def status(number: int) -> Handler:
    return lambda _request, connection: connection.head(number, Content_Length=0)


@pytest.mark.parametrize("number", [204, 206, 304, 400, 401, 403, 404, 410, 416, 418, 501, 999])
def test_a_status_that_says_no_is_told_at_once(number: int) -> None:
    with serving(status(number)) as server:
        error = refusal(server.url + "/x")
        assert (error.code, error.params) == ("PULL_ERROR_STATUS", (server.url + "/x", str(number)))
        assert len(server.requests) == 1


@pytest.mark.parametrize("number", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(number: int) -> None:
    with serving(changing(file_of(DATA), status(number))) as server:
        assert fetched(server.url) == DATA
    with serving(status(number)) as server:
        assert refusal(server.url).params[1] == str(number)
        assert len(server.requests) == 1 + len(EAGER.pauses)


def test_nobody_there_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = refusal(f"http://127.0.0.1:{port}/", patience=Patience(pauses=(1000.0,)))
    assert error.code == "PULL_ERROR_UNREACHABLE"
    assert "Connection refused" in error.message
    error = refusal("http://no-such-host.invalid/", patience=Patience(pauses=(1000.0,)))
    assert error.code == "PULL_ERROR_UNREACHABLE"
    assert "can't be resolved" in error.message


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"<html>\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 5\r\n\r\n12345",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
        b"HTTP/1.1 100 Go on\r\n\r\n" * 20,
    ],
)
def test_what_is_no_answer_is_refused(answer: bytes) -> None:
    def handler(_request: Request, connection: Connection) -> None:
        connection.send(answer)
        connection.wait_for_end()

    with serving(handler) as server:
        assert refusal(server.url).code == "PULL_ERROR_NOT_HTTP"


def test_an_information_before_the_answer_is_passed_over() -> None:
    def handler(request: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 103 Early\r\nLink: <x>\r\n\r\n")
        file_of(DATA)(request, connection)

    with serving(handler) as server:
        assert fetched(server.url) == DATA


def test_a_body_that_ends_with_the_connection_is_taken_with_a_checksum() -> None:
    def handler(_request: Request, connection: Connection) -> None:
        connection.head(Connection="close")
        connection.send(DATA)

    with serving(handler) as server:
        assert fetched(server.url, SHA256) == DATA


def dribbling(head: bytes) -> Handler:
    def handler(_request: Request, connection: Connection) -> None:
        connection.send(head)
        while not connection.ending.wait(0.02):
            connection.send(b"x")

    return handler


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", b""]
)
def test_a_byte_now_and_then_is_not_enough(head: bytes) -> None:
    with serving(dribbling(head)) as server:
        assert refusal(server.url, patience=NO_PATIENCE).code in (
            "PULL_ERROR_BROKEN_OFF",
            "PULL_ERROR_NOT_HTTP",
        )


def test_silence_ends() -> None:
    with serving(lambda _request, connection: connection.wait_for_end()) as server:
        error = refusal(server.url, patience=NO_PATIENCE)
        assert (error.code, len(server.requests)) == ("PULL_ERROR_BROKEN_OFF", 2)


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
    with serving(redirect(f"http://{place}:9/latest/meta-data/")) as server:
        error = refusal(server.url)
    assert error.code == "PULL_ERROR_ADDRESS_REFUSED"
    assert error.params[0] == f"http://{place}:9/latest/meta-data/"


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

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        error = refusal("http://a.example/", patience=NO_PATIENCE)
    finally:
        ending.set()
    assert (error.code, "in time" in error.message) == ("PULL_ERROR_UNREACHABLE", True)


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
        assert refusal(server.url).code == "PULL_ERROR_CERTIFICATE"
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
