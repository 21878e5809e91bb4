"""Damaged and hostile VHDs: whatever bytes stand in the metadata, reading ends in an ImageError or in bytes
of the same chain or zeroes; never in another file's bytes, another exception, or memory without bound."""

import os
import random
import resource
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.images.errors import ImageError
from gateway.images.vhd.check import check_directory, check_vhd, repair_vhd
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import SECTOR, checksum
from tests.images.disks import inspect, make_child, open_leaf

BLOCK = 4096
SIZE = 12 * BLOCK
SECRET = b"bytes of another disk!! " * 256
MEMORY = 24 << 20  # bytes; the files here are far smaller

Flip = tuple[int, int]  # a place in the metadata, and the new byte


@dataclass(frozen=True)
class Family:
    """A leaf over a base, and strangers in the same directory; `places` are the metadata of each file."""

    directory: Path
    intact: dict[str, bytes]
    places: dict[str, list[int]]

    def restore(self) -> None:
        for name, content in self.intact.items():
            (self.directory / name).write_bytes(content)


def metadata_places(path: Path) -> list[int]:
    image = inspect(path)
    assert image.header is not None
    with path.open("rb") as source:
        bat = struct.unpack(f">{image.blocks}I", os.pread(source.fileno(), 4 * image.blocks, 1536))
    length = path.stat().st_size
    places = [
        *range(512),
        *range(512, 1536),
        *range(1536, image.header.table_end),
        *range(length - 512, length),
    ]
    batmap = image.header.table_end
    places += range(batmap, batmap + 1024)
    for locator in image.header.locators:
        places += range(locator.data_offset, locator.data_offset + locator.data_length)
    for entry in bat:
        if entry != 0xFFFFFFFF:
            places += range(entry * SECTOR, entry * SECTOR + 8)
    return places


def make_family(directory: Path, *, raw: bool) -> Family:
    rng = random.Random(1)
    base = directory / ("base.raw" if raw else "base.vhd")
    if raw:
        base.write_bytes(rng.randbytes(SIZE))
    else:
        create_dynamic(str(base), SIZE, block_size=BLOCK)
        disk = open_leaf(base, writable=True)
        for block in (0, 1, 5, 11):
            disk.pwrite(rng.randbytes(BLOCK - SECTOR), block * BLOCK)
        disk.close()
    leaf = directory / "leaf.vhd"
    make_child(leaf, base, block_size=BLOCK)
    disk = open_leaf(leaf, writable=True)
    for block in (1, 2, 7):
        disk.pwrite(rng.randbytes(SECTOR * 3), block * BLOCK + SECTOR)
    disk.close()
    create_dynamic(str(directory / "strange.vhd"), SIZE, block_size=BLOCK)
    disk = open_leaf(directory / "strange.vhd", writable=True)
    disk.pwrite((SECRET * 9)[:SIZE], 0)
    disk.close()
    (directory / "strange.raw").write_bytes((SECRET * 9)[:SIZE])
    vhds = [path for path in (leaf, base) if path.suffix == ".vhd"]
    return Family(
        directory,
        {path.name: path.read_bytes() for path in (leaf, base)},
        {path.name: metadata_places(path) for path in vhds},
    )


@pytest.fixture(scope="module")
def vhd_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("flipped"), raw=False)


@pytest.fixture(scope="module")
def raw_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("flipped"), raw=True)


def seal(content: bytearray) -> None:
    """Make the checksums right, as an attacker would."""
    if len(content) >= 2048:
        for offset, length, position in ((0, 512, 64), (512, 1024, 36), (len(content) - 512, 512, 64)):
            part = content[offset : offset + length]
            struct.pack_into(">I", content, offset + position, checksum(part, position))


def sectors(content: bytes) -> set[bytes]:
    return {content[i : i + SECTOR] for i in range(0, len(content), SECTOR)}


def look(leaf: Path, allowed: set[bytes]) -> bool:
    """Read what can be read; every sector has to come from the chain's own files. False: it was refused."""
    try:
        disk = open_leaf(leaf)
    except ImageError:
        return False
    try:
        size = disk.size
        reach = 2 * SIZE
        for start in {0, max(0, (size - reach) // SECTOR * SECTOR)}:
            for offset in range(start, min(start + reach, size) // SECTOR * SECTOR, SECTOR):
                buffer = bytearray(SECTOR)
                try:
                    disk.pread_into(buffer, offset)
                except ImageError:
                    continue
                assert bytes(buffer) in allowed, f"sector {offset // SECTOR} comes from nowhere"
        try:
            for extent in disk.extents(0, min(size, reach)):
                assert extent.length > 0
            list(disk.segments(0, min(size, reach)))
        except ImageError:
            pass
    finally:
        disk.close()
    return True


def judge(family: Family, flips: dict[str, list[Flip]], *, sealed: bool) -> bool:
    family.restore()
    allowed = {bytes(SECTOR)}
    for name, content in family.intact.items():
        changed = bytearray(content)
        for place, value in flips.get(name, ()):
            changed[place] = value
        if sealed and name in family.places:
            seal(changed)
        (family.directory / name).write_bytes(changed)
        allowed |= sectors(bytes(changed))
    leaf = family.directory / "leaf.vhd"
    tracemalloc.start()
    try:
        readable = look(leaf, allowed)
        for name in family.places:
            check_vhd(str(family.directory / name))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY
    try:
        disk = open_leaf(leaf, writable=True)
    except ImageError:
        return readable
    try:
        disk.pwrite(b"\xaa" * min(2000, disk.size), max(0, min(disk.size, 5 * BLOCK) - 2000))
        disk.flush()
    except ImageError:
        pass
    finally:
        disk.close()
    return readable


def draw_flips(family: Family, rng: random.Random) -> dict[str, list[Flip]]:
    name = rng.choice(list(family.places))
    count = rng.choice((1, 1, 2, 4, 8))
    values = (0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256))
    return {name: [(rng.choice(family.places[name]), rng.choice(values)) for _ in range(count)]}


def seeded(family: Family, rounds: int, seed: int) -> tuple[int, int]:
    rng = random.Random(seed)
    readable = 0
    for number in range(rounds):
        flips = draw_flips(family, rng)
        try:
            readable += judge(family, flips, sealed=number % 2 == 0)
        except BaseException as error:
            error.add_note(f"{flips}, sealed: {number % 2 == 0}")
            raise
    return readable, rounds - readable


@pytest.mark.parametrize("family_name", ["vhd_family", "raw_family"])
def test_flipped_metadata_is_refused_or_shows_bytes_of_the_same_chain(
    request: pytest.FixtureRequest, family_name: str
) -> None:
    readable, refused = seeded(request.getfixturevalue(family_name), 150, seed=1)
    assert readable > 20  # both ways out are taken: the test looks at something
    assert refused > 20


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("family_name", ["vhd_family", "raw_family"])
def test_flipped_metadata_in_many_rounds(request: pytest.FixtureRequest, family_name: str, seed: int) -> None:
    seeded(request.getfixturevalue(family_name), 2000, seed)


FIELDS: dict[str, tuple[int, str]] = {
    "footer data offset": (16, ">Q"),
    "footer current size": (48, ">Q"),
    "footer disk type": (60, ">I"),
    "header table offset": (512 + 16, ">Q"),
    "header entries": (512 + 28, ">I"),
    "header block size": (512 + 32, ">I"),
    "header parent id": (512 + 40, ">Q"),
    "locator code": (512 + 576, ">I"),
    "locator space": (512 + 576 + 4, ">I"),
    "locator length": (512 + 576 + 8, ">I"),
    "locator offset": (512 + 576 + 16, ">Q"),
    "first entry": (1536, ">I"),
    "second entry": (1540, ">I"),
}
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 511, 512, 1024, 1536, 4096, 1 << 21, 1 << 31, (1 << 32) - 1, 1 << 41]),
    st.sampled_from([1 << 62, (1 << 63) - 1, (1 << 64) - 512, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), NUMBERS, min_size=1, max_size=4))
@example({"footer current size": 2040 << 30, "header block size": 1 << 31, "header entries": 1020})
@example({"footer current size": 2040 << 30, "header entries": (1 << 32) - 1, "header block size": 4096})
@example({"header block size": 1 << 31})
@example({"footer current size": 0})
@example({"footer disk type": 2})
@example({"footer disk type": 3})
@example({"header table offset": 1024})
@example({"locator length": (1 << 32) - 1})
def test_hostile_fields_with_right_checksums(vhd_family: Family, fields: dict[str, int]) -> None:
    for name in vhd_family.places:
        flips: list[Flip] = []
        length = len(vhd_family.intact[name])
        for field, number in fields.items():
            offset, layout = FIELDS[field]
            data = struct.pack(layout, number & ((1 << (8 * struct.calcsize(layout))) - 1))
            flips += [(offset + i, byte) for i, byte in enumerate(data)]
            if offset < 512:
                flips += [(length - 512 + offset + i, byte) for i, byte in enumerate(data)]
        judge(vhd_family, {name: flips}, sealed=True)


def replaced(content: bytes, rng: random.Random) -> bytes:
    """A file of which some parts are overwritten, cut out, or pushed apart."""
    changed = bytearray(content)
    for _ in range(rng.randrange(4)):
        at = rng.choice((rng.randrange(len(changed) + 1), rng.randrange(2048), max(0, len(changed) - 512)))
        new = rng.choice((b"", bytes(512), b"\xff" * 4, rng.randbytes(rng.randrange(600))))
        changed[at : at + rng.choice((0, len(new), 512, 1024))] = new
    return bytes(changed)


def test_any_bytes_at_all_are_checked_and_repaired_without_a_crash(vhd_family: Family) -> None:
    vhd_family.restore()
    path = vhd_family.directory / "leaf.vhd"
    rng = random.Random(3)
    healthy = 0
    for _ in range(150):
        path.write_bytes(replaced(vhd_family.intact["leaf.vhd"], rng))
        check_directory(str(vhd_family.directory))
        first = repair_vhd(str(path))
        second = repair_vhd(str(path))
        assert second.problems == first.problems  # a second repair finds no more to do
        assert second.repaired == ()
        healthy += not first.problems
    assert healthy > 10


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1023, 1024, 1536, 2048, 4096, 9000])
def test_a_file_cut_anywhere_is_refused_or_reads_as_before(vhd_family: Family, length: int) -> None:
    vhd_family.restore()
    content = vhd_family.intact["leaf.vhd"]
    (vhd_family.directory / "leaf.vhd").write_bytes(content[:length])
    own = sectors(content) | sectors(vhd_family.intact["base.vhd"]) | {bytes(SECTOR)}
    look(vhd_family.directory / "leaf.vhd", own)
    check_vhd(str(vhd_family.directory / "leaf.vhd"))


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))


def huge_claims(content: bytearray) -> None:
    struct.pack_into(">Q", content, 48, 2040 << 30)
    struct.pack_into(">I", content, 512 + 28, (1 << 32) - 1)


def huge_blocks(content: bytearray) -> None:
    struct.pack_into(">I", content, 512 + 32, 1 << 31)


def huge_locators(content: bytearray) -> None:
    for number in range(8):
        struct.pack_into(">IIII", content, 512 + 576 + 24 * number, 0x57326B75, 1 << 31, 0xFFFFFFFF, 0)


@pytest.mark.parametrize("claim", [huge_claims, huge_blocks, huge_locators])
def test_huge_claims_over_a_huge_sparse_file_need_no_memory(
    vhd_family: Family, claim: Callable[[bytearray], None]
) -> None:
    vhd_family.restore()
    path = vhd_family.directory / "leaf.vhd"
    content = bytearray(vhd_family.intact["leaf.vhd"])
    claim(content)
    content[-512:] = content[:512]
    seal(content)
    path.write_bytes(content[:-512])
    with path.open("r+b") as out:
        out.seek(3 << 40)
        out.write(content[-512:])
    program = (
        "import sys\n"
        "from gateway.images.chain import open_chain_files, open_disk\n"
        "from gateway.images.errors import ImageError\n"
        "from gateway.images.vhd.check import check_vhd\n"
        "print(len(check_vhd(sys.argv[1]).problems))\n"
        "try:\n"
        "    disk = open_disk(open_chain_files(sys.argv[1], writable=False))\n"
        "    disk.pread_into(bytearray(16384), 0)\n"
        "except ImageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=limited,
    )
    path.unlink()
    assert done.returncode == 0, done.stderr
