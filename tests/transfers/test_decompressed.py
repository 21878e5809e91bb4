"""What gzip, xz and zstd have written is read, what they would refuse is refused, in little memory."""

import os
import random
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import repeat
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.transfers.body import BodyReader, TransferAborted
from gateway.transfers.decompressed import Compression, Decompressed, compression_of
from tests.transfers.test_import_raw import Pieces

MIB = 1 << 20
BAD = "IMPORT_ERROR_BAD_COMPRESSION"
PROGRAMS = {
    "gzip": ("gzip", "-c"),
    "xz": ("xz", "-c", "-T1"),
    "xz -9": ("xz", "-c9"),
    "xz --check=none": ("xz", "-c", "--check=none"),
    "xz blocks": ("xz", "-c", "--block-size=100000"),
    "zstd": ("zstd", "-c", "-q"),
    "zstd --long": ("zstd", "-c", "-q", "--long=27"),
    "zstd --no-check": ("zstd", "-c", "-q", "--no-check", "-19"),
    "zstd --fast": ("zstd", "-c", "-q", "--fast=5"),
    "pzstd": ("pzstd", "-c", "-q"),
}


@cache
def packed(data: bytes, *command: str) -> bytes:
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


@cache
def sample(noise: int = 300_000, zeroes: int = 2 * MIB, repeats: int = 20_000, sevens: int = MIB) -> bytes:
    chance = random.Random(5)
    return (
        chance.randbytes(noise)
        + bytes(zeroes)
        + b"the same again and again " * repeats
        + b"\x07" * sevens
        + chance.randbytes(7)
    )


def small_sample() -> bytes:
    """The same, over several blocks of each format still, for what is read a hundred times."""
    return sample(150_000, 200_000, 4000, 100_000)


def reader_of(data: bytes, lengths: Iterator[int] | None = None) -> BodyReader:
    outer = BodyReader(Pieces(data, lengths or repeat(1 << 16)), len(data))
    kind = compression_of(outer.peek(6))
    assert kind is not None
    return BodyReader(Decompressed(outer, kind), None, end_is_told=True)


def unpacked(data: bytes, lengths: Iterator[int] | None = None, piece: int = 100_003) -> bytes:
    reader = reader_of(data, lengths)
    found = bytearray()
    view = memoryview(bytearray(piece))
    while got := reader.fill(view):
        found += view[:got]
    return bytes(found)


def refusal(data: bytes) -> str:
    with pytest.raises(XenAPIError) as refused:
        unpacked(data)
    assert refused.value.code == BAD
    return refused.value.message


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("data", [b"", b"x", sample()], ids=["empty", "one", "sample"])
def test_what_a_program_packed_comes_out_as_it_was(name: str, data: bytes) -> None:
    body = packed(data, *PROGRAMS[name])
    assert unpacked(body) == data
    assert unpacked(body, repeat(1), piece=1 << 20) == data if len(body) < 1000 else True
    chance = random.Random(len(body))
    assert unpacked(body, iter(lambda: chance.randint(1, 9000), None), piece=4096) == data


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd"])
def test_one_behind_the_other_is_one_body(name: str) -> None:
    one, other = sample(), b"end" * 1000
    bodies = [packed(each, *PROGRAMS[name]) for each in (one, b"", other)]
    assert unpacked(b"".join(bodies)) == one + other
    assert packed(b"".join(bodies), PROGRAMS[name][0], "-dc") == one + other


def test_padding_is_as_the_programs_take_it() -> None:
    gzip, xz = packed(b"a", "gzip", "-c"), packed(b"b", "xz", "-c")
    assert unpacked(gzip + bytes(700)) == b"a"
    assert unpacked(xz + bytes(8) + xz) == b"bb"
    assert "multiple of 4" in refusal(xz + bytes(5))


def test_skippable_frames_of_zstd_are_skipped() -> None:
    frame = packed(b"data", "zstd", "-c", "-q")
    skipped = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    assert unpacked(skipped + frame + skipped + frame) == b"datadata"
    assert packed(skipped + frame, "zstd", "-dc") == b"data"
    assert "cut off" in refusal(frame + skipped[:-1])


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd"])
def test_what_is_cut_off_or_followed_by_something_else_is_refused(name: str) -> None:
    body = packed(small_sample(), *PROGRAMS[name])
    assert "something else" in refusal(body + b"garbage")
    assert "something else" in refusal(body + b"g")
    for cut in (*range(7, 60), *range(len(body) - 40, len(body)), *range(1000, len(body), len(body) // 11)):
        refusal(body[:cut])


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd"])
def test_damage_is_refused_or_without_effect(name: str) -> None:
    body = packed(small_sample(), *PROGRAMS[name])
    chance = random.Random(name)
    refused = 0
    for _ in range(60):
        data = bytearray(body)
        data[chance.randrange(6, len(data))] ^= 1 << chance.randrange(8)
        try:
            # The header of gzip has a name and a time that nothing depends on.
            assert unpacked(bytes(data)) == small_sample()
        except XenAPIError as error:
            assert error.code == BAD
            refused += 1
    assert refused > 50


def read_through(body: bytes) -> tuple[int, int]:
    """How many bytes are in it, and how many of memory they took at most."""
    reader = reader_of(body)
    view = memoryview(bytearray(MIB))
    tracemalloc.start()
    try:
        count = 0
        while got := reader.fill(view):
            count += got
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return count, peak


@pytest.mark.parametrize(
    "command", [("gzip", "-c9"), ("xz", "-c", "-1"), ("zstd", "-c", "-q", "-19")], ids=lambda each: each[0]
)
def test_a_bomb_takes_time_and_no_memory(command: tuple[str, ...]) -> None:
    with subprocess.Popen(("head", "-c", "24M", "/dev/zero"), stdout=subprocess.PIPE) as zeroes:
        body = subprocess.run(command, stdin=zeroes.stdout, stdout=subprocess.PIPE, check=True).stdout
    assert len(body) < MIB // 8
    count, peak = read_through(body)
    assert count == 24 * MIB
    assert peak < 8 * MIB


def zstd_of_zeroes(blocks: int) -> bytes:
    """A frame of blocks that are one byte each for 128 KiB, which no program writes so densely."""
    head = b"\x28\xb5\x2f\xfd" + bytes([0x00, (17 - 10) << 3])
    block = (128 << 10) << 3 | 1 << 1
    return head + b"".join(
        (block | (number == blocks - 1)).to_bytes(3, "little") + b"\0" for number in range(blocks)
    )


def test_the_densest_zstd_there_is_takes_no_memory() -> None:
    count, peak = read_through(zstd_of_zeroes(512))
    assert (count, peak < 8 * MIB) == (64 * MIB, True)


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd"])
def test_an_abort_ends_it_though_the_zeroes_to_come_need_no_more_of_the_outer_body(name: str) -> None:
    class Outer(Pieces):
        def abort(self) -> None: ...

    data = packed(bytes(8 * MIB), *PROGRAMS[name])
    kind = compression_of(data)
    assert kind is not None
    body = Decompressed(BodyReader(Outer(data, repeat(1 << 16)), len(data)), kind)
    with memoryview(bytearray(1000)) as view:
        assert body.recv_into(view)
        body.abort()
        with pytest.raises(TransferAborted):
            body.recv_into(view)


def test_what_wants_much_memory_is_refused() -> None:
    body = bytearray(packed(os.urandom(100_000), "xz", "-c", "-T1"))
    # A block's header: its length, flags, the filter with its one property, padding, CRC32.
    end = 12 + (body[12] + 1) * 4
    assert body[14:16] == b"\x21\x01"
    body[16] = 34  # a dictionary of 512 MiB, for which xz itself would need ten times as much
    body[end - 4 : end] = zlib.crc32(body[12 : end - 4]).to_bytes(4, "little")
    assert "192 MiB of memory" in refusal(bytes(body))
    window = bytearray(zstd_of_zeroes(2))
    window[5] = (28 - 10) << 3
    assert "128 MiB of memory" in refusal(bytes(window))
    single = b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + (1 << 40).to_bytes(8, "little")
    assert "128 MiB of memory" in refusal(single + b"\0" * 8)


def test_a_zstd_with_a_dictionary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for number in range(200):
        (tmp_path / "d" / str(number)).write_bytes(b"entry %d of many that are alike " % number * 20)
    train: Callable[..., object] = subprocess.run
    train(
        ["zstd", "-q", "--train", "-r", str(tmp_path / "d"), "-o", str(tmp_path / "dict")],
        check=True,
        capture_output=True,
    )
    body = packed(b"entry 7 of many", "zstd", "-c", "-q", "-D", str(tmp_path / "dict"))
    assert "dictionary" in refusal(body)


def test_other_beginnings_are_not_compressed() -> None:
    for begin in (b"", b"\x1f", b"\x1f\x8b", b"BZh9", b"QFI\xfb", bytes(6), b"\xfd7zXZ"):
        assert compression_of(begin) is None
    assert compression_of(b"\x4f\x2a\x4d\x18") is compression_of(b"\x60\x2a\x4d\x18") is None
    assert compression_of(b"\x1f\x8b\x08\0\0\0") is Compression.GZIP
