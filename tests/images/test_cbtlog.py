import struct
from pathlib import Path

import pytest

from gateway.images.cbtlog import (
    CbtHeader,
    CbtLog,
    all_changed,
    bitmap_bytes,
    clipped,
    read_header,
    read_log,
    united,
)
from gateway.images.errors import CorruptImage

PARENT = "00010203-0405-0607-0809-0a0b0c0d0e0f"
CHILD = "f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff"
MIB = 1 << 20


def test_the_file_is_xenservers_byte_for_byte(tmp_path: Path) -> None:
    # Block 0, block 9 and block 31 of 4 MiB: in the file the lowest bit of a byte is its first block.
    bits = bytes([0b10000000, 0b01000000, 0, 0b00000001, 0, 0, 0, 0])
    log = CbtLog(CbtHeader(PARENT, CHILD, consistent=True, size=4 * MIB), bits)
    header, bitmap = log.pack()
    assert header == (
        bytes(range(16))
        + bytes(range(0xF0, 0x100))
        + struct.pack("<i", 1)
        + bytes(4)
        + struct.pack("<Q", 4 * MIB)
    )
    assert len(header) == 48
    assert bitmap == bytes([0b00000001, 0b00000010, 0, 0b10000000, 0, 0, 0, 0])
    path = tmp_path / "disk.cbtlog"
    path.write_bytes(header + bitmap)
    assert read_log(str(path)) == log
    assert read_header(str(path)) == log.header


def test_a_log_without_neighbours_names_uuids_of_zeroes() -> None:
    header, bitmap = CbtLog.empty(2 * MIB).pack()
    assert header == bytes(40) + struct.pack("<Q", 2 * MIB)
    assert bitmap == bytes(4)
    assert CbtHeader.unpack(header, "log") == CbtHeader(None, None, consistent=False, size=2 * MIB)


@pytest.mark.parametrize(
    ("size", "length"), [(512, 1), (65536 * 8, 1), (65536 * 8 + 512, 2), (2 << 40, 4 << 20)]
)
def test_the_bitmap_is_as_long_as_cbt_util_makes_it(size: int, length: int) -> None:
    assert bitmap_bytes(size) == length


@pytest.mark.parametrize(
    "content",
    [b"", bytes(47), bytes(48), CbtLog.empty(2 * MIB).pack()[0] + bytes(3), b"\xff" * 64],
    ids=["empty", "short header", "no size", "short bitmap", "rubbish"],
)
def test_what_is_no_log_is_one_known_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "disk.cbtlog"
    path.write_bytes(content)
    with pytest.raises(CorruptImage):
        read_log(str(path))


def test_bits_are_united_and_clipped_at_the_end_of_the_disk() -> None:
    assert united(b"\x80", b"\x01\x80") == b"\x81\x80"
    assert clipped(b"\xff\xff\xff\xff", 65536 * 9 + 512) == b"\xff\xc0\0\0"
    assert clipped(b"\xff\xff", 65536 * 8) == b"\xff\0"
    assert all_changed(65536 * 3) == b"\xe0"
    log = CbtLog.empty(65536 * 3).add(b"\xff\xff\xff\xff")
    assert log.bits == b"\xe0"


def test_a_log_grows_and_shrinks_with_its_disk() -> None:
    log = CbtLog.empty(2 * MIB).add(b"\xff\0\0\x01")
    larger = log.resized(4 * MIB)
    assert larger.bits == b"\xff\0\0\x01" + bytes(4)
    assert larger.header.size == 4 * MIB
    assert larger.resized(65536 * 4).bits == b"\xf0"
