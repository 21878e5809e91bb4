"""A file is fetched over real connections: whatever the server does, it comes whole or an error is told."""

import os
import random
import socket
from collections.abc import Iterator
from itertools import chain, repeat

import pytest

from gateway.transfers.pull_socket import Patience
from tests.transfers.fetching import DATA, EAGER, MIB, NO_PATIENCE, SHA256, fetched, refusal
from tests.transfers.pull_server import Connection, Handler, Request, file_of, serving


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
