import time
import uuid
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.images.errors import CorruptImage, ImageError, ImageTooLarge, UnsupportedImage
from gateway.images.vhd.format import (
    BLOCK_SIZE,
    EPOCH,
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_VIRTUAL_SIZE,
    BatmapHeader,
    DiskType,
    DynamicHeader,
    Footer,
    ParentLocator,
    check_virtual_size,
    checksum,
    geometry,
    round_up_virtual_size,
    vhd_timestamp,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
UUIDS = st.uuids()
FOOTERS = st.builds(
    Footer,
    current_size=U64,
    disk_type=st.sampled_from(DiskType),
    unique_id=UUIDS,
    timestamp=U32,
    data_offset=U64,
    original_size=U64,
    geometry=st.tuples(st.integers(0, 65535), st.integers(0, 255), st.integers(0, 255)),
    features=U32,
    version=st.integers(0x10000, 0x1FFFF),
    creator=st.binary(min_size=4, max_size=4),
    creator_version=U32,
    creator_os=st.binary(min_size=4, max_size=4),
    saved=st.integers(0, 255),
    hidden=st.booleans(),
    reserved=st.binary(min_size=426, max_size=426),
)
LOCATORS = st.builds(ParentLocator, U32, U32, U32, U64, U32)
HEADERS = st.builds(
    DynamicHeader,
    table_offset=U64,
    max_table_entries=U32,
    block_size=st.integers(12, 28).map(lambda power: 1 << power),
    parent_id=UUIDS,
    parent_timestamp=U32,
    parent_name=st.binary(min_size=512, max_size=512),
    locators=st.tuples(*[LOCATORS] * 8),
    version=st.integers(0x10000, 0x1FFFF),
    data_offset=U64,
    reserved=U32,
    padding=st.binary(min_size=256, max_size=256),
)


@given(FOOTERS)
def test_footer_survives_packing(footer: Footer) -> None:
    assert Footer.unpack(footer.pack(), "x") == footer
    assert len(footer.pack()) == FOOTER_SIZE


@given(HEADERS)
def test_header_survives_packing(header: DynamicHeader) -> None:
    assert DynamicHeader.unpack(header.pack(), "x") == header
    assert len(header.pack()) == HEADER_SIZE


@given(st.builds(BatmapHeader, U64, U32, U32, U32, st.binary(min_size=484, max_size=484)))
def test_batmap_header_survives_packing(batmap: BatmapHeader) -> None:
    assert BatmapHeader.unpack(batmap.pack(), "x") == batmap


@given(st.binary(max_size=1100), st.booleans())
@example(b"conectix" + bytes(503), True)
@example(b"conectix" + bytes(504), False)
@example(b"cxsparse" + bytes(1016), False)
def test_any_bytes_unpack_or_are_an_image_error(data: bytes, with_sum: bool) -> None:
    for kind, place in ((Footer, 64), (DynamicHeader, 36), (BatmapHeader, None), (ParentLocator, None)):
        raw = bytearray(data)
        if with_sum and place is not None and len(raw) >= place + 4:
            raw[place : place + 4] = checksum(raw, place).to_bytes(4, "big")
        try:
            kind.unpack(bytes(raw), "x")
        except ImageError as error:
            assert error.path == "x"
            assert str(error).startswith("x: ")


@given(FOOTERS, st.integers(0, 511), st.integers(1, 255))
def test_one_changed_byte_of_a_footer_is_noticed(footer: Footer, place: int, change: int) -> None:
    data = bytearray(replace(footer, hidden=False).pack())
    data[place] ^= change
    if place == 85 and footer.creator[:3] == b"tap" and footer.creator_version in (1, 0x10001):
        return
    with pytest.raises(ImageError):
        Footer.unpack(bytes(data), "x")


@pytest.mark.parametrize(
    ("version", "accepted"), [(1, True), (0x10001, True), (0x10002, False), (0x10003, False)]
)
def test_hidden_flag_without_new_checksum_is_accepted_from_old_tapdisk_only(
    version: int, accepted: bool
) -> None:
    footer = replace(Footer.new(BLOCK_SIZE, DiskType.DYNAMIC), creator_version=version)
    data = bytearray(footer.pack())
    data[85] = 1
    if accepted:
        assert Footer.unpack(bytes(data), "x").hidden
    else:
        with pytest.raises(CorruptImage, match="checksum"):
            Footer.unpack(bytes(data), "x")


def test_hidden_flag_is_part_of_the_checksum_we_write() -> None:
    footer = Footer.new(BLOCK_SIZE, DiskType.DYNAMIC).with_hidden(True)
    data = footer.pack()
    assert data[85] == 1
    assert int.from_bytes(data[64:68], "big") == checksum(data, 64)


def test_a_footer_of_511_bytes_is_read() -> None:
    footer = Footer.new(BLOCK_SIZE, DiskType.DYNAMIC)
    assert Footer.unpack(footer.pack()[:511], "x") == footer


def test_unknown_versions_types_and_block_sizes_are_unsupported() -> None:
    footer = replace(Footer.new(BLOCK_SIZE, DiskType.DYNAMIC), version=0x20000)
    with pytest.raises(UnsupportedImage, match="version"):
        Footer.unpack(footer.pack(), "x")
    data = bytearray(Footer.new(BLOCK_SIZE, DiskType.DYNAMIC).pack())
    data[63] = 6
    data[64:68] = checksum(data, 64).to_bytes(4, "big")
    with pytest.raises(UnsupportedImage, match="type 6"):
        Footer.unpack(bytes(data), "x")
    for block_size in (0, 512, 2048, 3 << 20, 512 << 20):
        with pytest.raises(UnsupportedImage, match="block size"):
            DynamicHeader.unpack(DynamicHeader(1536, 1, block_size).pack(), "x")


@given(st.integers(0, 4 << 40))
@example(MAX_VIRTUAL_SIZE)
@example(2 << 20)
def test_geometry_never_exceeds_the_size_and_fits_its_fields(size: int) -> None:
    cylinders, heads, per_track = geometry(size)
    assert cylinders * heads * per_track * 512 <= size
    assert cylinders <= 65535
    assert heads <= 16
    assert per_track <= 255


def test_geometry_is_that_of_the_specification() -> None:
    assert geometry(1 << 30) == (2080, 16, 63)
    assert geometry(2 << 20) == (60, 4, 17)
    assert geometry(MAX_VIRTUAL_SIZE) == (65535, 16, 255)


def test_a_new_footer_is_signed_as_tapdisk_does_and_not_from_the_future() -> None:
    footer = Footer.new(BLOCK_SIZE, DiskType.DYNAMIC)
    assert (footer.creator, footer.creator_version, footer.features) == (b"tap\0", 0x00010003, 2)
    assert footer.unique_id.variant == uuid.RFC_4122
    assert footer.timestamp + EPOCH <= time.time()


def test_timestamps_are_never_in_the_future_nor_before_the_epoch() -> None:
    assert vhd_timestamp(time.time() + 1e6) + EPOCH <= time.time()
    assert vhd_timestamp(0) == 0


def test_virtual_sizes_round_up_to_two_mebibytes() -> None:
    assert [round_up_virtual_size(size) for size in (0, 1, 2 << 20, (2 << 20) + 1)] == [
        2 << 20,
        2 << 20,
        2 << 20,
        4 << 20,
    ]


def test_a_size_over_2040_gib_is_too_large_and_says_what_to_do() -> None:
    check_virtual_size(MAX_VIRTUAL_SIZE, "x")
    with pytest.raises(ImageTooLarge, match=r"2040 GiB.*use a raw image"):
        check_virtual_size(MAX_VIRTUAL_SIZE + 512, "x")
