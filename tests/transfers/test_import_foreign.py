"""Images that qemu-img reads: what a hostile one gets to do, and what is left of it."""

import errno
import os
import random
import struct
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from uuid import UUID

import pytest

from gateway.core.errors import XenAPIError
from gateway.images.raw import RawDisk
from gateway.transfers.body import BodyEnded, BodyReader, TransferAborted
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_foreign import ForeignImage, Spool, begin_foreign
from tests.transfers.test_import_raw import Pieces

MIB = 1 << 20
SIZE = 5 * MIB + 512
UNSUPPORTED, CORRUPT = (f"IMPORT_ERROR_{code}_IMAGE" for code in ("UNSUPPORTED", "CORRUPT"))
KINDS = {
    "qcow2": ("qcow2", []),
    "compressed": ("qcow2", ["-c"]),
    "vhdx": ("vhdx", []),
    "vmdk": ("vmdk", []),
    "stream": ("vmdk", ["-o", "subformat=streamOptimized"]),
}


def disk_data() -> bytes:
    data = bytearray(SIZE)
    data[MIB : 2 * MIB] = random.Random(1).randbytes(MIB)
    data[-512:] = b"\x07" * 512
    return bytes(data)


@cache
def sample(kind: str) -> bytes:
    form, options = KINDS[kind]
    directory = Path(os.environ["PYTEST_SAMPLES"])
    raw, image = directory / "x.raw", directory / f"x.{kind}"
    raw.write_bytes(disk_data())
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, *options, raw, image], check=True)
    return image.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def samples(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PYTEST_SAMPLES"] = str(tmp_path_factory.mktemp("samples"))


class House:
    """A directory for the spool and a disk to fill."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spool = Spool(str(directory / "import"), 64 * MIB)

    def take(self, body: bytes, form: str, *, length: int | None = -1) -> bytes:
        """The disk that comes of it. Whatever happens, nothing is left beside it."""
        reader = BodyReader(
            Pieces(body, iter(lambda: MIB, None)), len(body) if length == -1 else length, end_is_told=True
        )
        path = self.directory / "disk"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.ftruncate(fd, 6 * MIB)
        disk = RawDisk(fd, 6 * MIB, read_only=False, path=str(path))

        def fits(size: int) -> None:
            if size > disk.size:
                raise XenAPIError("VDI_TOO_SMALL", "x", str(disk.size))

        try:
            incoming = begin_foreign(reader, BodyFormat(form), fits, self.spool)
            assert isinstance(incoming, ForeignImage)
            incoming.receive(disk)
            assert incoming.fraction() == pytest.approx(1.0)
        finally:
            disk.close()
            self.spool.remove()
            assert [left.name for left in self.directory.iterdir()] == ["disk"]
        return path.read_bytes()


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., bytes]:
    return House(tmp_path).take


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [True, False])
def test_the_disk_is_what_it_was(kind: str, known: bool, take: Callable[..., bytes]) -> None:
    body = sample(kind)
    length = len(body) if known else None
    assert take(body, KINDS[kind][0], length=length) == disk_data().ljust(6 * MIB, b"\0")


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_it_is_premature_or_corrupt(kind: str, take: Callable[..., bytes]) -> None:
    body = sample(kind)
    with pytest.raises(BodyEnded):
        take(body[:-1000], KINDS[kind][0], length=len(body))
    # qemu-img itself writes files that end within their last cluster.
    for cut in (3, 100, 700, 3000, len(body) // 2, len(body) - 140_000):
        with pytest.raises(XenAPIError) as caught:
            take(body[:cut], KINDS[kind][0])
        assert caught.value.code in (CORRUPT, UNSUPPORTED)


def changed(kind: str, *changes: tuple[int, bytes]) -> bytes:
    data = bytearray(sample(kind))
    for offset, value in changes:
        data[offset : offset + len(value)] = value
    return bytes(data)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


QCOW2 = [
    ([(8, u64(512)), (16, u32(11)), (512, b"/etc/passwd")], UNSUPPORTED),
    ([(16, u32(11))], UNSUPPORTED),
    ([(72, u64(4))], UNSUPPORTED),  # a data file
    ([(72, u64(2))], CORRUPT),
    ([(72, u64(1 << 40))], UNSUPPORTED),
    ([(32, u32(1))], UNSUPPORTED),  # encrypted
    ([(32, u32(2))], UNSUPPORTED),
    ([(4, u32(1))], UNSUPPORTED),
    ([(4, u32(9))], UNSUPPORTED),
    ([(20, u32(31))], CORRUPT),
    ([(20, u32(0))], CORRUPT),
    ([(24, u64(1 << 63))], CORRUPT),
    ([(24, u64(0))], CORRUPT),
    ([(24, u64(6 * MIB + 1))], "VDI_TOO_SMALL"),
    ([(36, u32(0xFFFFFFFF))], CORRUPT),
    ([(36, u32(0))], CORRUPT),
    ([(40, u64(1))], CORRUPT),
    ([(40, u64(1 << 55))], CORRUPT),
    ([(56, u32(0xFFFFFFFF))], CORRUPT),
    ([(56, u32(0))], CORRUPT),
    ([(60, u32(60000))], UNSUPPORTED),
]


@pytest.mark.parametrize(("changes", "code"), QCOW2)
def test_a_qcow2_that_wants_more_than_its_file(
    changes: list[tuple[int, bytes]], code: str, take: Callable[..., bytes]
) -> None:
    with pytest.raises(XenAPIError) as caught:
        take(changed("qcow2", *changes), "qcow2")
    assert caught.value.code == code
    assert "/import" not in str(caught.value)


def test_what_the_head_shows_is_refused_before_the_rest_has_come(take: Callable[..., bytes]) -> None:
    head = changed("qcow2", (24, u64(6 * MIB + 1)))[: 4 * MIB].ljust(4 * MIB, b"\0")
    with pytest.raises(XenAPIError, match="VDI_TOO_SMALL"):
        take(head, "qcow2", length=60 * MIB)


def vmdk_text(old: bytes, new: bytes, kind: str = "vmdk") -> bytes:
    data = sample(kind)
    assert old in data[:10240]
    return data.replace(old, new.ljust(len(old), b"\n")[: len(old)], 1)


def hinting(offset: int) -> bytes:
    return changed("vmdk", (offset, b'parentFileNameHint="/etc/passwd"\n'))


def with_footer(offset: int, value: int) -> bytes:
    """An image whose footer tells its directory, as VMware writes it, with one number in it changed."""
    data = bytearray(sample("stream"))
    footer = bytearray(data[:512])
    struct.pack_into("<Q", footer, offset, value)
    struct.pack_into("<Q", data, 56, (1 << 64) - 1)
    data += bytes(-len(data) % 512)
    return bytes(data + struct.pack("<QII", 1, 0, 3).ljust(512, b"\0") + footer + bytes(512))


def test_a_vmdk_whose_footer_tells_where_its_directory_is(take: Callable[..., bytes]) -> None:
    (directory,) = struct.unpack_from("<Q", sample("stream"), 56)
    assert take(with_footer(56, directory), "vmdk") == disk_data().ljust(6 * MIB, b"\0")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (lambda: changed("vmdk", (12, bytes(8))), UNSUPPORTED),  # the extents count then
        (lambda: changed("vmdk", (28, bytes(8))), UNSUPPORTED),
        (lambda: changed("vmdk", (20, struct.pack("<Q", 3))), CORRUPT),
        (lambda: changed("vmdk", (44, struct.pack("<I", 1 << 30))), CORRUPT),
        (lambda: changed("vmdk", (12, struct.pack("<Q", 1 << 33))), "VDI_TOO_SMALL"),
        (lambda: vmdk_text(b"parentCID=ffffffff", b"parentCID=12345678"), UNSUPPORTED),
        (lambda: vmdk_text(b"monolithicSparse", b"monolithicFlat"), UNSUPPORTED),
        (lambda: hinting(9000), UNSUPPORTED),
        (lambda: hinting(700), UNSUPPORTED),
        (lambda: with_footer(12, 0), CORRUPT),
        (lambda: with_footer(12, 1 << 40), CORRUPT),
        (lambda: with_footer(56, (1 << 64) - 1), CORRUPT),
        (lambda: with_footer(0, 7), CORRUPT),
    ],
)
def test_a_vmdk_that_wants_more_than_its_file(
    body: Callable[[], bytes], code: str, take: Callable[..., bytes]
) -> None:
    with pytest.raises(XenAPIError) as caught:
        take(body(), "vmdk")
    assert caught.value.code == code


def test_a_vhdx_with_a_parent_or_too_large_is_refused(take: Callable[..., bytes]) -> None:
    body = sample("vhdx")
    head = body.index(b"metadata" + bytes(2))
    places = {}
    for index in range(struct.unpack_from("<H", body, head + 10)[0]):
        guid, offset = struct.unpack_from("<16sI", body, head + 32 + 32 * index)
        places[UUID(bytes_le=guid)] = head + offset
    parameters = places[UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")]
    size = places[UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")]
    for place, value, code in (
        (parameters + 4, struct.pack("<I", 2), UNSUPPORTED),
        (parameters, struct.pack("<I", 3 * MIB), CORRUPT),
        (size, struct.pack("<Q", 0), CORRUPT),
        (size, struct.pack("<Q", 1 << 40), "VDI_TOO_SMALL"),
        (192 << 10, b"none", CORRUPT),
        (head, b"none", CORRUPT),
    ):
        with pytest.raises(XenAPIError) as caught:
            take(changed("vhdx", (place, value)), "vhdx")
        assert caught.value.code == code


def crc32c(data: bytes | bytearray) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def with_table_at_the_end(body: bytes) -> bytes:
    """The same VHDX as after Hyper-V has enlarged it: its block allocation table is the last of the file."""
    moved = bytearray(body.ljust(-(-len(body) // MIB) * MIB, b"\0"))
    end = len(moved)
    for place in (192 << 10, 256 << 10):
        table = moved[place : place + (64 << 10)]
        entry = table.index(UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le)
        offset, length = struct.unpack_from("<QI", table, entry + 16)
        struct.pack_into("<Q", table, entry + 16, end)
        table[4:8] = bytes(4)
        struct.pack_into("<I", table, 4, crc32c(table))
        moved[place : place + (64 << 10)] = table
    return bytes(moved) + body[offset : offset + length]


def test_a_vhdx_that_ends_within_its_table_is_not_whole(take: Callable[..., bytes]) -> None:
    body = with_table_at_the_end(sample("vhdx"))
    assert take(body, "vhdx") == disk_data().ljust(6 * MIB, b"\0")
    for left in (0, 8, 16, 512, MIB - 1):
        with pytest.raises(XenAPIError) as caught:
            take(body[: len(body) - MIB + left], "vhdx")
        assert caught.value.code == CORRUPT


def with_log(*, entry: bool) -> bytes:
    """A VHDX whose headers say that it has a log: with an entry in it that has to be replayed, or empty.

    [MS-VHDX] 2.2.2 and 2.3.1.
    """
    body, guid = bytearray(sample("vhdx")), b"\x11" * 16
    length = offset = 0
    for place in (64 << 10, 128 << 10):
        header = body[place : place + 4096]
        header[48:64] = guid
        header[4:8] = bytes(4)
        struct.pack_into("<I", header, 4, crc32c(header))
        body[place : place + 4096] = header
        length, offset = struct.unpack_from("<IQ", header, 68)
    assert length >= 4096
    if entry:
        fields = (b"loge", 0, 4096, 0, 1, 0, 0, guid, len(body), len(body))
        log = bytearray(struct.pack("<4sIIIQII16sQQ", *fields).ljust(4096, b"\0"))
        struct.pack_into("<I", log, 4, crc32c(log))
        body[offset : offset + 4096] = log
    return bytes(body)


def test_a_vhdx_whose_log_has_to_be_replayed_is_refused_in_words(take: Callable[..., bytes]) -> None:
    with pytest.raises(XenAPIError, match="qemu-img check -r all") as caught:
        take(with_log(entry=True), "vhdx")
    assert caught.value.code == UNSUPPORTED
    assert take(with_log(entry=False), "vhdx") == disk_data().ljust(6 * MIB, b"\0")


def test_an_image_with_a_real_backing_file_shows_none_of_it(
    take: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("secret")
    secret, image = directory / "secret.raw", directory / "x.qcow2"
    secret.write_bytes(b"secret" * 100_000)
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, image]
    subprocess.run(command, check=True)
    with pytest.raises(XenAPIError) as caught:
        take(image.read_bytes(), "qcow2")
    assert caught.value.code == UNSUPPORTED


def test_an_abort_kills_the_program_that_reads(tmp_path: Path) -> None:
    import threading

    spool = Spool(str(tmp_path / "x"), MIB)
    threading.Timer(0.2, spool.abort).start()
    with pytest.raises(TransferAborted):
        spool.run(["sleep", "1000"])
    with pytest.raises(TransferAborted):
        spool.run(["true"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_image_for_which_there_is_no_room_is_not_called_damaged(
    take: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def converts_nothing(spool: Spool, command: list[str], tell: object = None) -> tuple[int, str]:
        return (
            (1, f"qemu-img: error while writing: {os.strerror(number)}") if "convert" in command else (0, "")
        )

    monkeypatch.setattr(Spool, "run", converts_nothing)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        take(sample("vhdx"), "vhdx")
    assert caught.value.errno == number


def test_a_program_that_takes_too_much_is_ended(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "x"), MIB)
    code, _ = spool.run(["prlimit", "--cpu=1", "--", "sh", "-c", "while :; do :; done"])
    assert code < 0


def fuzz(seed: int, take: Callable[..., bytes]) -> None:
    chance = random.Random(seed)
    kind = chance.choice(list(KINDS))
    data = bytearray(sample(kind))
    for _ in range(chance.randint(1, 6)):
        reach = chance.choice([128, 1024, 70_000, 400_000, len(data)])
        at = chance.randrange(min(reach, len(data)))
        value = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        data[at : at + chance.choice([1, 4])] = bytes([value]) * chance.choice([1, 4])
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]
    try:
        found = take(bytes(data), KINDS[kind][0])
    except (XenAPIError, BodyEnded):
        return
    assert len(found) == 6 * MIB


@pytest.mark.parametrize("seed", range(25))
def test_damage_ends_in_one_known_error_or_in_bytes_of_the_disk(
    seed: int, take: Callable[..., bytes]
) -> None:
    fuzz(seed, take)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 120))
def test_much_damage(seed: int, take: Callable[..., bytes]) -> None:
    for step in range(40):
        fuzz(seed * 1000 + step, take)
