"""Bytes of a disk that may have the footer of a fixed VHD behind them, with and without a length."""

import os
import random

import pytest

from gateway.core.errors import XenAPIError
from gateway.images.vhd.format import DiskType
from gateway.transfers.body import BodyEnded, BodyReader
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_flat import begin_flat
from tests.transfers.test_import_raw import Memory, Pieces
from tests.transfers.vhd_files import footer_of

MIB = 1 << 20
ROOM = 4 * MIB
RAW, VHD, AUTO = BodyFormat.RAW, BodyFormat.VHD, BodyFormat.AUTO
FOOTER = footer_of(2 * MIB, DiskType.FIXED).pack()
DATA = os.urandom(2 * MIB)


def take(
    body: bytes,
    wanted: BodyFormat,
    *,
    known: bool = True,
    room: int | None = ROOM,
    told: bool = True,
    broken: bool = False,
) -> bytes:
    """The disk. `room` None: a new one, of the size that it needs."""

    def fits(size: int) -> None:
        if room is not None and size > room:
            raise XenAPIError("VDI_TOO_SMALL", "x", str(room))

    chance = random.Random(len(body))
    pieces = Pieces(body, iter(lambda: chance.choice([1, 511, 4096, MIB, 3 * MIB]), None), reset=broken)
    reader = BodyReader(pieces, len(body) if known else None, end_is_told=told)
    flat = begin_flat(reader, fits, room=room, wanted=wanted, is_new=room is None)
    disk = Memory(flat.virtual_size if room is None else room)
    flat.receive(disk)
    assert not flat.patches
    return bytes(disk.data)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("wanted", [VHD, AUTO])
def test_a_footer_is_no_part_of_the_disk(wanted: BodyFormat, known: bool) -> None:
    expected = DATA.ljust(ROOM, b"\0")
    assert take(DATA + FOOTER, wanted, known=known) == expected
    # The footer itself tells the end.
    assert take(DATA + FOOTER, wanted, known=known, told=False) == expected


def test_a_footer_of_old_programs_lacks_its_last_byte() -> None:
    assert take(DATA + FOOTER[:-1], VHD) == DATA.ljust(ROOM, b"\0")
    assert take(DATA + FOOTER[:-1], VHD, room=None) == DATA


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("length", [1, 511, 512, 513, 70_001, MIB, ROOM - 512, ROOM])
def test_without_a_footer_all_of_it_is_the_disk(length: int, known: bool) -> None:
    body = (DATA + DATA)[:length]
    for wanted in (RAW, AUTO):
        assert take(body, wanted, known=known) == body.ljust(ROOM, b"\0")


def test_what_looks_like_a_footer_and_is_none_is_part_of_the_disk() -> None:
    for tail in (footer_of(MIB, DiskType.FIXED).pack(), footer_of(2 * MIB).pack(), FOOTER[:-1] + b"x"):
        assert take(DATA + tail, AUTO) == (DATA + tail).ljust(ROOM, b"\0")
        with pytest.raises(XenAPIError) as caught:
            take(DATA + tail, VHD)
        assert caught.value.code == "IMPORT_ERROR_CORRUPT_IMAGE"
    assert take(DATA + FOOTER, RAW) == (DATA + FOOTER).ljust(ROOM, b"\0")


def test_a_new_disk_has_the_size_that_is_needed() -> None:
    assert take(DATA + FOOTER, VHD, room=None) == take(DATA + FOOTER, AUTO, room=None) == DATA
    assert take(DATA + FOOTER, RAW, room=None) == DATA + FOOTER
    assert take(DATA[:-5], AUTO, room=None) == DATA[:-5]
    with pytest.raises(XenAPIError) as caught:
        take(DATA + bytes(512), AUTO, room=None)
    assert caught.value.code == "IMPORT_ERROR_WRONG_FORMAT"
    with pytest.raises(XenAPIError) as caught:
        take(DATA, RAW, room=None, known=False)
    assert caught.value.code == "IMPORT_ERROR_SIZE_REQUIRED"


@pytest.mark.parametrize("wanted", [RAW, VHD, AUTO])
@pytest.mark.parametrize("known", [True, False])
def test_more_than_the_disk_holds_is_refused(wanted: BodyFormat, known: bool) -> None:
    for length in (ROOM + 1, ROOM + 512, ROOM + 1024, 9 * MIB):
        body = bytes(length - 1) + b"\1"
        with pytest.raises(XenAPIError) as caught:
            take(body, wanted, known=known)
        assert caught.value.code in ("VDI_TOO_SMALL", "IMPORT_ERROR_WRONG_FORMAT")
        assert caught.value.code == "VDI_TOO_SMALL" or wanted is VHD


def test_an_end_that_nobody_told_is_believed_only_of_a_full_disk() -> None:
    assert take(DATA + DATA, AUTO, known=False, told=False) == DATA + DATA
    with pytest.raises(XenAPIError) as caught:
        take(DATA, AUTO, known=False, told=False)
    assert caught.value.error_info == ["IMPORT_ERROR_LENGTH_REQUIRED", str(ROOM), str(2 * MIB)]
    with pytest.raises(BodyEnded):
        take(DATA, AUTO, known=False, told=True, broken=True)


def test_a_vhd_of_half_sectors_or_nothing_is_none() -> None:
    for body in (b"", b"x" * 100, FOOTER, DATA + b"123" + FOOTER):
        with pytest.raises((BodyEnded, XenAPIError)):
            take(body, VHD)
