"""The bytes within chunks, whatever pieces they come in; h11 as the oracle of what a body is."""

import random

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.chunked_body import ChunkedBody
from gateway.transfers.body import BodyReader
from tests.transfers.test_import_raw import Pieces


def received(body: bytes, seed: int = 0) -> tuple[bytes, bool]:
    """What comes out, and whether its end was told."""
    chance = random.Random(seed)
    reader = BodyReader(
        ChunkedBody(Pieces(body, iter(lambda: chance.choice([1, 2, 7, 5000]), None))), None, end_is_told=True
    )
    data = bytearray()
    with memoryview(bytearray(4096)) as view:
        while got := reader.fill(view[: chance.choice([1, 100, 4096])]):
            data += view[:got]
    return bytes(data), not reader.broken


def by_h11(pieces: list[bytes]) -> bytes:
    client = h11.Connection(h11.CLIENT)
    head = [("host", "x"), ("transfer-encoding", "chunked")]
    client.send(h11.Request(method="PUT", target="/", headers=head))
    parts = [client.send(h11.Data(data=piece)) or b"" for piece in pieces]
    return b"".join(parts) + (client.send(h11.EndOfMessage()) or b"")


@given(st.lists(st.binary(max_size=9000), max_size=6), st.integers(0, 1000))
def test_what_h11_sends_comes_out(pieces: list[bytes], seed: int) -> None:
    body = by_h11(pieces)
    assert received(body + b"GET / HTTP/1.1\r\n", seed) == (b"".join(pieces), True)
    for cut in {0, 1, len(body) // 2, len(body) - 1}:
        data, told = received(body[:cut], seed)
        assert b"".join(pieces).startswith(data)
        assert not told


@pytest.mark.parametrize(
    ("body", "data", "told"),
    [
        (b"3;a=b\r\nabc\r\n00\r\nx: y\r\n\r\n", b"abc", True),
        (b"3\nabc\n0\n\n", b"abc", True),
        (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", True),
        (b"3\r\nabcd\r\n0\r\n\r\n", b"abc", False),
        (b"x\r\nabc", b"", False),
        (b"-1\r\nabc", b"", False),
        (b"0x3\r\nabc", b"", False),
        (b"\r\n3\r\nabc", b"", False),
        (b"f" * 16 + b"\r\nabc", b"", False),
        (b"1;" + b"x" * 500, b"", False),
        (b"0\r\n" + b"x: y\r\n" * 100, b"", False),
    ],
)
def test_what_a_body_says_of_itself_is_believed_or_it_is_broken(body: bytes, data: bytes, told: bool) -> None:
    assert received(body) == (data, told)


@given(st.binary(max_size=60), st.integers(0, 100))
def test_any_bytes_end_in_data_or_a_reset(body: bytes, seed: int) -> None:
    data, _ = received(body, seed)
    assert len(data) <= len(body)


def test_whether_more_comes() -> None:
    body = ChunkedBody(Pieces(b"2\r\nab\r\n0\r\n\r\n", iter(lambda: 100, None)))
    assert [body.more_within(1) for _ in range(3)] == [True, True, False]
    assert not ChunkedBody(Pieces(b"x", iter(lambda: 100, None))).more_within(1)
