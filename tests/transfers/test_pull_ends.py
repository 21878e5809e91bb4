"""A later answer that says something else than the first did: the file comes whole, or an error is told."""

import subprocess

import pytest

from gateway.transfers.formats import BodyFormat
from tests.transfers.fetching import DATA, MIB, SHA256, fetched, refusal
from tests.transfers.pull_server import Connection, Handler, Request, file_of, serving
from tests.transfers.pulling import House, sum_of

CUT = MIB // 2


def one_after_the_other(*handlers: Handler) -> Handler:
    """The last one for all requests that are left."""
    left = list(handlers)

    def handler(request: Request, connection: Connection) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(request, connection)

    return handler


def cut_off() -> Handler:
    """A file in chunks, of which half a MiB comes."""
    return file_of(DATA, chunked=True, cuts=iter([CUT]))


def first_of(request: Request) -> int:
    return int(request.headers["range"].removeprefix("bytes=").rstrip("-"))


async def test_a_file_that_became_longer_before_its_first_byte_is_not_cut_to_the_old_length(
    house: House,
) -> None:
    def nothing(_request: Request, connection: Connection) -> None:
        connection.head(Content_Length=MIB, ETag='"v1"')

    with serving(one_after_the_other(nothing, file_of(DATA, tag='"v2"'))) as server:
        assert await house.refusal(server.url, SHA256, format=BodyFormat.RAW) == "PULL_ERROR_CHANGED"


def test_a_rest_of_unknown_total_is_taken_part_by_part() -> None:
    def part(request: Request, connection: Connection) -> None:
        first = first_of(request)
        if first == len(DATA):
            connection.head(416, Content_Range=f"bytes */{len(DATA)}", Content_Length=0)
            return
        body = DATA[first : first + MIB]
        content_range = f"bytes {first}-{first + len(body) - 1}/*"
        connection.head(206, Content_Range=content_range, Content_Length=len(body), ETag='"v1"')
        connection.send(body)

    with serving(one_after_the_other(cut_off(), part)) as server:
        assert fetched(server.url) == DATA


def close_delimited_rest(request: Request, connection: Connection) -> None:
    content_range = f"bytes {first_of(request)}-{len(DATA) - 1}/*"
    connection.head(206, Content_Range=content_range, ETag='"v1"')
    connection.send(DATA[first_of(request) :][:1000])


def close_delimited_whole(_request: Request, connection: Connection) -> None:
    connection.head()
    connection.send(DATA[: 2 * MIB])


@pytest.mark.parametrize("rest", [close_delimited_rest, close_delimited_whole])
def test_a_rest_whose_end_nobody_tells_is_no_end(rest: Handler) -> None:
    with serving(one_after_the_other(cut_off(), rest)) as server:
        assert refusal(server.url).code == "PULL_ERROR_BROKEN_OFF"


NOW = "Mon, 23 Nov 2026 04:00:01 GMT"
DATES = ["Tue, 17 Nov 2026 10:00:00 GMT", "Sun, 22 Nov 2026 10:00:00 GMT"]


@pytest.mark.parametrize("changed", [False, True])
def test_a_server_that_ignores_if_range_tells_a_change_by_the_date(changed: bool) -> None:
    def rest(request: Request, connection: Connection) -> None:
        first = first_of(request)
        headers = {"Date": NOW, "Last_Modified": DATES[changed]}
        content_range = f"bytes {first}-{len(DATA) - 1}/{len(DATA)}"
        connection.head(206, Content_Range=content_range, Content_Length=len(DATA) - first, **headers)
        connection.send((DATA[::-1] if changed else DATA)[first:])

    first = file_of(DATA, tag=None, cuts=iter([CUT]), Date=NOW, Last_Modified=DATES[0])
    with serving(one_after_the_other(first, rest)) as server:
        if changed:
            assert refusal(server.url).code == "PULL_ERROR_CHANGED"
        else:
            assert fetched(server.url) == DATA


def test_a_longer_file_that_comes_again_without_its_length_is_not_cut() -> None:
    first = file_of(DATA, tag=None, cuts=iter([MIB]))
    with serving(one_after_the_other(first, file_of(DATA + b"more", tag=None, chunked=True))) as server:
        assert refusal(server.url).code == "PULL_ERROR_CHANGED"
    first = file_of(DATA, tag=None, cuts=iter([MIB]))
    with serving(one_after_the_other(first, file_of(DATA, tag=None, chunked=True))) as server:
        assert fetched(server.url) == DATA


@pytest.mark.parametrize("packing", ["gzip", "xz", "zstd"])
async def test_a_cut_between_two_members_is_no_end(house: House, packing: str) -> None:
    def packed(data: bytes) -> bytes:
        return subprocess.run([packing, "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout

    def sending(body: bytes) -> Handler:
        def handler(_request: Request, connection: Connection) -> None:
            connection.head()
            connection.send(body)

        return handler

    one, two = packed(DATA[:MIB]), packed(DATA[MIB:])
    with serving(sending(one)) as server:
        assert await house.refusal(server.url) == "PULL_ERROR_LENGTH_REQUIRED"
    with serving(sending(one + two)) as server:
        vdi = await house.pull(server.url, sum_of(one + two))
        assert vdi.virtual_size == 4 * MIB
