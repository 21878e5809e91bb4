"""A VHD as it comes: any order of blocks, any bitmaps, and nothing but one known error from a broken one."""

import os
import random
import struct
import subprocess
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import SECTOR, TAP_LITTLE_ENDIAN_BITMAPS, UNUSED, DiskType, Footer
from gateway.transfers.body import BodyEnded, BodyReader
from gateway.transfers.import_vhd import begin_vhd
from tests.images.disks import libvhdi_reads, make_child, open_leaf
from tests.transfers.test_import_raw import Memory, Pieces
from tests.transfers.vhd_files import (
    Block,
    content,
    footer_of,
    random_blocks,
    vhd_file,
    with_footer,
    with_header,
)

MIB = 1 << 20
FULL = (1 << 4096) - 1


def pieces(seed: int = 0) -> Iterator[int]:
    chance = random.Random(seed)
    return iter(lambda: chance.choice([1, 100, 4096, 70000, 3 * MIB]), None)


def anything_fits(_size: int) -> None: ...


def take(file: bytes, old: bytes | int, *, length: int | None = -1, seed: int = 0) -> bytes:
    """What a disk that held `old` (or so many zeroes) holds after the import."""
    disk = Memory(old if isinstance(old, int) else len(old))
    if isinstance(old, bytes):
        disk.data[:] = old
    reader = BodyReader(Pieces(file, pieces(seed)), len(file) if length == -1 else length)
    incoming = begin_vhd(reader, anything_fits)
    assert incoming.patches is not isinstance(old, int)
    incoming.receive(disk)
    assert reader.position == getattr(incoming, "expected", reader.length) or length is None
    return bytes(disk.data)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", [DiskType.DYNAMIC, DiskType.DIFFERENCING])
def test_blocks_in_any_order_with_any_bitmaps(kind: DiskType, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    block_size = chance.choice([4096, 64 << 10, 512 << 10, 2 * MIB, 4 * MIB])
    size = chance.randrange(1, 6 * block_size // 4096) * 4096 + chance.choice([0, 512, 2048])
    blocks = random_blocks(chance, size, block_size)
    order = list(blocks)
    chance.shuffle(order)
    gap = chance.choice([0, 0, 512, 7 * 512])
    file = vhd_file(size, blocks, kind=kind, block_size=block_size, order=order, gap=gap)
    known = chance.random() < 0.7
    if kind is DiskType.DYNAMIC:
        found = take(file, size, length=-1 if known else None, seed=seed)
        assert found == content(bytes(size), blocks, block_size)
    else:
        old = chance.randbytes(size)
        found = take(file, old, length=-1 if known else None, seed=seed)
        assert found == content(old, blocks, block_size)


@pytest.mark.parametrize("seed", range(4))
def test_libvhdi_reads_the_same_from_the_file(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    size = 12 * MIB
    blocks = {block: Block(FULL, chance.randbytes(2 * MIB)) for block in range(6) if chance.random() < 0.6}
    order = list(blocks)
    chance.shuffle(order)
    file = vhd_file(size, blocks, order=order)
    (tmp_path / "x.vhd").write_bytes(file)
    assert take(file, size) == libvhdi_reads([tmp_path / "x.vhd"])


def test_our_own_delta_is_the_patch_that_libvhdi_sees(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    create_dynamic(str(base), 8 * MIB)
    disk = open_leaf(base, writable=True)
    disk.pwrite(os.urandom(5 * MIB), MIB)
    disk.close()
    old = libvhdi_reads([base])
    make_child(child, base)
    disk = open_leaf(child, writable=True)
    for offset, length in ((0, 512), (MIB + 4096, 8192), (3 * MIB, 3 * MIB)):
        disk.pwrite(os.urandom(length), offset)
    disk.zero(6 * MIB, MIB, trim=True)
    disk.close()
    assert take(child.read_bytes(), old) == libvhdi_reads([child, base])


@pytest.mark.parametrize("form", ["-f vpc -o subformat=dynamic,force_size=on", None])
def test_an_empty_disk_needs_no_length(form: str | None, tmp_path: Path) -> None:
    path, size = tmp_path / "x.vhd", 5 * MIB
    if form is None:
        create_dynamic(str(path), size)
    else:
        subprocess.run(["qemu-img", "create", "-q", *form.split(), path, str(size)], check=True)
    assert take(path.read_bytes(), size, length=None) == bytes(size)


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_what_qemu_wrote(subformat: str, tmp_path: Path) -> None:
    raw, vhd = tmp_path / "x.raw", tmp_path / "x.vhd"
    data = bytearray(9 * MIB + 512 * 3)
    data[3 * MIB : 4 * MIB] = os.urandom(MIB)
    data[-512:] = os.urandom(512)
    raw.write_bytes(data)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={subformat},force_size=on"]
    subprocess.run([*command, raw, vhd], check=True)
    assert take(vhd.read_bytes(), len(data)) == data


@pytest.mark.parametrize("size", [9 * MIB + 512, 12 * MIB])
def test_a_size_that_was_rounded_up_to_cylinders_needs_room_for_the_data_alone(
    size: int, tmp_path: Path
) -> None:
    raw, vhd = tmp_path / "x.raw", tmp_path / "x.vhd"
    data = bytearray(size)
    data[3 * MIB : 4 * MIB] = os.urandom(MIB)
    data[-512:] = os.urandom(512)
    raw.write_bytes(data)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vpc", raw, vhd], check=True)
    rounded = Footer.unpack(vhd.read_bytes()[:512], "x").current_size
    assert rounded > size
    sizes = []

    def fits(wanted: int) -> None:
        sizes.append(wanted)
        if wanted > room:
            raise XenAPIError("VDI_TOO_SMALL", "x", str(room))

    def import_into(room: int) -> bytes:
        disk = Memory(room)
        file = vhd.read_bytes()
        incoming = begin_vhd(BodyReader(Pieces(file, pieces()), len(file)), fits, room=room)
        assert incoming.virtual_size == min(room, rounded)
        incoming.receive(disk)
        return bytes(disk.data)

    for room in (rounded + 512, rounded, size):
        assert import_into(room) == data.ljust(room, b"\0")
    # Here data would be lost, which shows late; then it is more than a cylinder, which shows at once.
    for room, asked in ((size - 512, rounded), (size - MIB, rounded)):
        with pytest.raises(XenAPIError, match="VDI_TOO_SMALL"):
            import_into(room)
        assert sizes.pop() == asked


def test_the_first_tapdisk_wrote_its_bits_the_other_way_round() -> None:
    footer = replace(footer_of(2 * MIB), creator=b"tap\0", creator_version=TAP_LITTLE_ENDIAN_BITMAPS)
    data = os.urandom(2 * MIB)
    mask = 0b01100000 << 4088
    file = vhd_file(2 * MIB, {0: Block(mask, data)}, footer=footer)
    assert take(file, 2 * MIB) == bytes(5 * 512) + data[5 * 512 : 7 * 512] + bytes(2 * MIB - 7 * 512)


def test_a_last_block_and_a_footer_that_are_cut_short() -> None:
    size = 2 * MIB + 1024
    blocks = {block: Block(FULL, os.urandom(2 * MIB)) for block in range(2)}
    file = vhd_file(size, blocks)
    cut = file[: -512 - (2 * MIB - 1024)] + file[-512:]
    for whole in (file, cut, cut[:-1]):
        assert take(whole, size) == content(bytes(size), blocks)


def test_a_disk_of_two_tebibytes_without_data_is_read_at_once() -> None:
    size = 2040 << 30
    file = vhd_file(size, {})
    disk = Memory(0)
    reader = BodyReader(Pieces(file, pieces()), len(file))
    incoming = begin_vhd(reader, anything_fits)
    assert incoming.virtual_size == size
    incoming.receive(disk)
    assert disk.writes == []


def error_of(file: bytes, *, length: int | None = -1, room: int | None = None) -> XenAPIError | BodyEnded:
    def fits(size: int) -> None:
        if room is not None and size > room:
            raise XenAPIError("VDI_TOO_SMALL", "x", str(room))

    reader = BodyReader(Pieces(file, pieces()), len(file) if length == -1 else length)
    with pytest.raises((XenAPIError, BodyEnded)) as caught:
        incoming = begin_vhd(reader, fits)
        incoming.receive(Memory(incoming.virtual_size))
    assert isinstance(caught.value, (XenAPIError, BodyEnded))
    return caught.value


SAMPLE = vhd_file(8 * MIB, {0: Block(FULL, b"\x01" * 2 * MIB), 2: Block(FULL, b"\x02" * 2 * MIB)})


def entry(block: int, value: int) -> bytes:
    data = bytearray(SAMPLE)
    struct.pack_into(">I", data, 1536 + 4 * block, value)
    return bytes(data)


CORRUPT, UNSUPPORTED, WRONG = (
    f"IMPORT_ERROR_{code}" for code in ("CORRUPT_IMAGE", "UNSUPPORTED_IMAGE", "WRONG_FORMAT")
)


# By name, for what pytest would make of the bytes is no name.
BROKEN: dict[str, tuple[bytes, str | None]] = {
    "nothing": (b"", None),
    "cut in the footer's copy": (SAMPLE[:100], None),
    "cut in the header": (SAMPLE[:1000], None),
    "cut in the table": (SAMPLE[:1540], None),
    "cut in a block": (SAMPLE[: 3 * MIB], None),
    "without the last footer": (SAMPLE[:-512], None),
    "cut in the last block": (SAMPLE[:-600], None),
    "wrong byte in the last footer": (SAMPLE[:-1] + b"\xff", CORRUPT),
    "zeroes for a last footer": (SAMPLE[:-512] + bytes(512), CORRUPT),
    "last footer of another size": (SAMPLE[:-512] + footer_of(4 * MIB).pack(), CORRUPT),
    "wrong byte in the footer's copy": (SAMPLE[:10] + b"\xff" + SAMPLE[11:], CORRUPT),
    "wrong byte in the header": (SAMPLE[:600] + b"\xff" + SAMPLE[601:], CORRUPT),
    "table in front of itself": (with_header(SAMPLE, 16, ">Q", 512), UNSUPPORTED),
    "table between sectors": (with_header(SAMPLE, 16, ">Q", 1537), CORRUPT),
    "table beyond any file": (with_header(SAMPLE, 16, ">Q", 1 << 62), CORRUPT),
    "table behind the end": (with_header(SAMPLE, 16, ">Q", 1 << 40), None),
    "fewer entries than blocks": (with_header(SAMPLE, 28, ">I", 3), CORRUPT),
    "blocks of 1000 bytes": (with_header(SAMPLE, 32, ">I", 1000), UNSUPPORTED),
    "blocks of no bytes": (with_header(SAMPLE, 32, ">I", 0), UNSUPPORTED),
    "header between sectors": (with_footer(SAMPLE, footer_of(8 * MIB, data_offset=1)), CORRUPT),
    "header beyond any file": (with_footer(SAMPLE, footer_of(8 * MIB, data_offset=1 << 63)), CORRUPT),
    "header behind the end": (with_footer(SAMPLE, footer_of(8 * MIB, data_offset=1 << 40)), None),
    "size of 0": (with_footer(SAMPLE, footer_of(0)), CORRUPT),
    "size between sectors": (with_footer(SAMPLE, footer_of(8 * MIB + 1)), CORRUPT),
    "size of 3000 GiB": (with_footer(SAMPLE, footer_of(3000 << 30)), CORRUPT),
    "fixed by its first footer": (with_footer(SAMPLE, footer_of(8 * MIB, DiskType.FIXED)), CORRUPT),
    "block over the footer": (entry(1, 0), CORRUPT),
    "block over the table": (entry(1, 3), CORRUPT),
    "block over another": (entry(1, 4), CORRUPT),
    "block far behind the others": (entry(1, 4 + 4000), CORRUPT),
    "block behind the end": (entry(1, UNUSED - 1), None),
    "no beginning, but a last footer": (SAMPLE[512:], CORRUPT),
    "zeroes": (bytes(4 * MIB), WRONG),
    "zeroes and a bit more": (bytes(4 * MIB + 7), WRONG),
    "fixed and larger than its footer says": (
        b"\x05" * 4 * MIB + footer_of(2 * MIB, DiskType.FIXED).pack(),
        CORRUPT,
    ),
    "fixed with a wrong byte in its footer": (
        b"\x05" * 4 * MIB + footer_of(4 * MIB, DiskType.FIXED).pack()[:-1] + b"\1",
        CORRUPT,
    ),
}


@pytest.mark.parametrize(("file", "code"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_told_by_its_code(file: bytes, code: str | None) -> None:
    error = error_of(file)
    assert (error.code if isinstance(error, XenAPIError) else None) == code
    error_of(file, length=None)


@pytest.mark.parametrize("file", [SAMPLE, bytes(8 * MIB) + footer_of(8 * MIB, DiskType.FIXED).pack()])
def test_a_disk_that_is_too_large_is_refused_by_its_header(file: bytes) -> None:
    body = Pieces(file, pieces())
    reader = BodyReader(body, len(file))

    def fits(size: int) -> None:
        raise XenAPIError("VDI_TOO_SMALL", str(size))

    with pytest.raises(XenAPIError) as caught:
        begin_vhd(reader, fits)
    assert caught.value.params == (str(8 * MIB),)
    assert reader.received <= 1024


def test_a_length_that_the_table_contradicts_is_refused_before_the_first_block() -> None:
    reader = BodyReader(Pieces(SAMPLE, pieces()), len(SAMPLE) - MIB)
    with pytest.raises(BodyEnded) as caught:
        begin_vhd(reader, anything_fits)
    assert (caught.value.needed, caught.value.count) == (len(SAMPLE), len(SAMPLE) - MIB)
    assert reader.position <= 2048


def test_a_table_out_of_order_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.transfers.import_vhd._MOST_SORTED", 50_000)
    entries = 100_000
    file = bytearray(vhd_file(entries * 4096, {}, block_size=4096))
    file[1536 : 1536 + 4 * entries] = struct.pack(f">{entries}I", *range(entries, 0, -1))
    reader = BodyReader(Pieces(bytes(file), iter(lambda: MIB, None)), None)
    tracemalloc.start()
    try:
        with pytest.raises(XenAPIError) as caught:
            begin_vhd(reader, anything_fits)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(file)  # half of it is the test's
    finally:
        tracemalloc.stop()
    assert caught.value.code == UNSUPPORTED


def damaged(chance: random.Random) -> bytes:
    data = bytearray(SAMPLE if chance.random() < 0.8 else SAMPLE[: chance.randrange(len(SAMPLE))])
    for _ in range(chance.randint(1, 4)):
        where = chance.choice([512, 1536, 1552, 2048, len(data)])
        at = chance.randrange(min(where, len(data))) if data else 0
        if data:
            data[at] = chance.randrange(256)
    file = bytes(data)
    if chance.random() < 0.5 and len(file) > 2048:
        offset, form = chance.choice([(8, ">Q"), (16, ">Q"), (28, ">I"), (32, ">I")])
        value = chance.choice([0, 1, 511, 512, 1 << 31, UNUSED, chance.getrandbits(22)])
        file = with_header(file, offset, form, value)
    return file


def fuzz(seed: int) -> None:
    chance = random.Random(seed)
    file = damaged(chance)
    reader = BodyReader(Pieces(file, pieces(seed)), len(file) if chance.random() < 0.6 else None)
    disk = Memory(8 * MIB)

    def fits(size: int) -> None:
        if size > disk.size:
            raise XenAPIError("VDI_TOO_SMALL", "x", str(disk.size))

    try:
        incoming = begin_vhd(reader, fits)
        assert incoming.virtual_size <= disk.size
        incoming.receive(disk)
    except (XenAPIError, BodyEnded):
        return
    assert len(disk.data) == disk.size
    assert not any(offset % SECTOR or offset + length > disk.size for offset, length in disk.writes)


@pytest.mark.parametrize("seed", range(150))
def test_damage_ends_in_one_known_error_or_in_sectors_of_the_disk(seed: int) -> None:
    fuzz(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1040))
def test_much_damage(seed: int) -> None:
    for step in range(250):
        fuzz(seed * 1000 + step)
