"""Pieces of a disk, each behind its place."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import XenAPIError
from gateway.transfers.body import BodyEnded, BodyReader
from gateway.transfers.import_chunked import ChunkedDisk
from tests.transfers.test_import_raw import Memory, Pieces

SIZE = 300_000
END = bytes(12)


def piece(offset: int, data: bytes) -> bytes:
    return struct.pack("<QI", offset, len(data)) + data


def take(body: bytes, seed: int = 0, fill: bytes = b"\xee") -> bytes:
    chance = random.Random(seed)
    disk = Memory(SIZE, fill)
    lengths = iter(lambda: chance.choice([1, 13, 5000, SIZE]), None)

    def fits(size: int) -> None:
        if size > SIZE:
            raise XenAPIError("VDI_TOO_SMALL", "x", str(SIZE))

    incoming = ChunkedDisk(BodyReader(Pieces(body, lengths), None), SIZE, fits)
    assert incoming.patches
    incoming.receive(disk)
    return bytes(disk.data)


PIECES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 200_000), st.integers(0, 2)), max_size=5)


@given(PIECES, st.integers(0, 1000))
def test_pieces_in_any_order_and_the_later_one_counts(pieces: list[tuple[int, int, int]], seed: int) -> None:
    expected = bytearray(b"\xee" * SIZE)
    body = b""
    for offset, length, value in pieces:
        data = bytes([value]) * min(length, SIZE - offset)
        if data or offset:  # nothing at 0 is the end
            body += piece(offset, data)
            expected[offset : offset + len(data)] = data
    assert take(body + END + b"whatever comes behind the end", seed) == expected


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (piece(SIZE - 1, b"ab"), "VDI_TOO_SMALL"),
        (piece((1 << 64) - 1, b"a"), "VDI_TOO_SMALL"),
        (struct.pack("<QI", 0, 1 << 31), "IMPORT_ERROR_CORRUPT_IMAGE"),
    ],
)
def test_a_piece_that_is_no_part_of_the_disk_is_refused_by_its_head(body: bytes, code: str) -> None:
    with pytest.raises(XenAPIError) as caught:
        take(piece(0, b"x") + body[:12])
    assert caught.value.code == code


@pytest.mark.parametrize("body", [b"", b"\0", piece(5, b"abc"), piece(5, b"abc")[:-1], END[:-1]])
def test_without_the_end_mark_something_is_missing(body: bytes) -> None:
    with pytest.raises(BodyEnded) as caught:
        take(body)
    assert caught.value.count == len(body) < caught.value.needed
