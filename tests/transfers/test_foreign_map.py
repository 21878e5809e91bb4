"""Images that have their disk as it is: it is read from where qemu-img says that it lies. The oracle is what
qemu-img itself makes of the same image.
"""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.images.disk import Extent, ExtentKind
from gateway.images.errors import CorruptImage
from gateway.transfers import foreign_map
from gateway.transfers.foreign_map import MappedDisk, Unmapped
from gateway.transfers.import_foreign import Spool
from tests.transfers.test_import_foreign import House

MIB = 1 << 20
FREE_BYTES = 6 * MIB


@pytest.fixture(name="take")
def _take(tmp_path: Path) -> Callable[..., bytes]:
    (tmp_path / "house").mkdir()
    return House(tmp_path / "house").take


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What qemu-img was told to do, in order."""
    commands: list[str] = []
    run = Spool.run

    def recorded(
        spool: Spool, command: list[str], tell: Callable[[bytes], None] | None = None
    ) -> tuple[int, str]:
        commands.append(command[command.index("qemu-img") + 1])
        return run(spool, command, tell)

    monkeypatch.setattr(Spool, "run", recorded)
    return commands


def made(path: Path, form: str, size: int, *steps: str, options: str = "") -> bytes:
    """An image on which qemu-io has done something."""
    more = ["-o", options] if options else []
    subprocess.run(["qemu-img", "create", "-q", "-f", form, *more, path, str(size)], check=True)
    orders = [part for step in steps for part in ("-c", step)]
    subprocess.run(["qemu-io", "-f", form, *orders, path], check=True, stdout=subprocess.DEVNULL)
    return path.read_bytes()


def converted(path: Path, form: str) -> bytes:
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", path, raw], check=True)
    return raw.read_bytes().ljust(FREE_BYTES, b"\0")


def shuffled(seed: int, size: int) -> list[str]:
    """Writes of all sizes, over each other, with zeroes in between."""
    chance = random.Random(seed)
    steps = []
    for number in range(60):
        at = chance.randrange(0, size - 512) // 512 * 512
        length = min(chance.choice([512, 4096, 65536, 200_704]), (size - at) // 512 * 512)
        how = chance.choice(["-z", f"-P {1 + number % 250}", f"-P {1 + number % 250}"])
        steps.append(f"write {how} {at} {length}")
    return steps


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("qcow2", ""),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "extended_l2=on,cluster_size=128k"),
        ("qcow2", "compat=0.10"),
        ("vmdk", ""),
    ],
)
def test_clusters_in_any_order_are_read_from_the_body_alone(
    form: str, options: str, take: Callable[..., bytes], ran: list[str], tmp_path: Path
) -> None:
    size, path = 5 * MIB + 512, tmp_path / "x.image"
    body = made(path, form, size, *shuffled(len(options), size), options=options)
    assert take(body, form) == converted(path, form)
    assert ran == ["check", "map"]


def test_a_disk_that_ends_within_a_sector_and_a_file_within_its_last_cluster(
    take: Callable[..., bytes], ran: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.image"
    body = made(path, "qcow2", 1_000_000, "write -P 7 999936 64", "write -P 8 0 512")
    cut = body[: -(65536 - 700)]
    path.write_bytes(cut)
    expected = converted(path, "qcow2")
    assert expected[999_999] == 7
    assert expected[0] == 8
    assert take(cut, "qcow2") == expected
    assert ran == ["check", "map"]


def test_what_an_internal_snapshot_has_stays_in_it(take: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.image"
    made(path, "qcow2", 5 * MIB, "write -P 1 0 1M")
    subprocess.run(["qemu-img", "snapshot", "-c", "before", path], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 2 64k 64k", path], check=True)
    disk = take(path.read_bytes(), "qcow2")
    assert disk == converted(path, "qcow2")
    assert disk[65536] == 2


@pytest.mark.parametrize(("how", "most"), [("-c", foreign_map.MOST_RANGES), ("", 5)])
def test_what_is_compressed_or_in_many_pieces_is_written_by_qemu_img(
    how: str, most: int, take: Callable[..., bytes], ran: list[str], request: pytest.FixtureRequest
) -> None:
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(foreign_map, "MOST_RANGES", most)
    path: Path = request.getfixturevalue("tmp_path") / "x.image"
    steps = [f"write {how} -P 9 {start * 128}k 64k" for start in range(20)]
    body = made(path, "qcow2", 5 * MIB, *steps, "write -P 8 4M 4k")
    assert take(body, "qcow2") == converted(path, "qcow2")
    assert ran == ["check", "map", "convert"]


def line(start: int, length: int, **more: object) -> bytes:
    told: dict[str, object] = {"start": start, "length": length, "data": True, "zero": False, **more}
    parts = ", ".join(f'"{name}": {str(value).lower()}' for name, value in told.items())
    return b"[{" + parts.encode() + b"},"


@pytest.mark.parametrize(
    "lines",
    [
        [line(512, 512, offset=0)],
        [line(0, 512, offset=0), line(0, 512, offset=0)],
        [line(0, 512, offset=0), line(1024, 512, offset=0)],
        [line(0, 8192, offset=0)],
        [line(0, 0, offset=0)],
        [line(0, -512, offset=0)],
        [line(0, 512, offset=4096)],
        [line(0, 512, offset=-512)],
        [line(0, 512, offset=1 << 63)],
        [b'[{"start": 0, "length": 512}]'],
        [b"[{"],
        [b"[7]"],
    ],
)
def test_a_map_that_does_not_fit_its_file_is_not_believed(lines: list[bytes]) -> None:
    mapped = MappedDisk(-1, 4096, 4096, "x")
    with pytest.raises(CorruptImage):
        for told in lines:
            mapped.tell(told)


def test_a_range_ends_at_most_a_cluster_beyond_the_file() -> None:
    mapped = MappedDisk(-1, 8 * MIB, 4096, "x")
    mapped.tell(line(0, 2 * MIB, offset=0))
    with pytest.raises(CorruptImage):
        mapped.tell(line(2 * MIB, 4 * MIB, offset=0))


def test_a_map_that_ends_early_is_not_believed() -> None:
    mapped = MappedDisk(-1, 4096, 4096, "x")
    mapped.tell(line(0, 512, offset=0))
    with pytest.raises(CorruptImage):
        mapped.require_whole()
    mapped.tell(line(512, 3584, data=False, zero=True))
    mapped.tell(b"]\n")
    mapped.require_whole()


def test_data_without_a_place_ends_the_map() -> None:
    with pytest.raises(Unmapped):
        MappedDisk(-1, 4096, 4096, "x").tell(line(0, 512))


def test_extents_and_bytes_of_any_range_agree(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(1, 251)) * 40)  # ends within a sector
    fd = os.open(path, os.O_RDONLY)
    mapped = MappedDisk(fd, 8192, 10_000, "x")
    expected = bytearray(8192)
    told = 0
    for start, place in ((512, 9728), (1024, 0), (1536, 512), (4096, 0)):
        if start > told:
            mapped.tell(line(told, start - told, data=False, zero=True))
        mapped.tell(line(start, 512, offset=place))
        told = start + 512
        piece = path.read_bytes()[place : place + 512]
        expected[start : start + len(piece)] = piece
    mapped.tell(line(4608, 3584, data=False, zero=True))
    mapped.require_whole()
    chance = random.Random(3)
    for _ in range(300):
        offset = chance.randrange(8192)
        buffer = bytearray(b"\xee" * chance.randrange(8193 - offset))
        mapped.pread_into(buffer, offset)
        assert buffer == expected[offset : offset + len(buffer)]
        position = offset
        for extent in mapped.extents(offset, len(buffer)):
            assert extent.offset == position
            position += extent.length
            if extent.kind is ExtentKind.HOLE:
                assert not any(expected[extent.offset : position])
        assert position == offset + len(buffer)
    assert list(mapped.extents(1024, 1024)) == [Extent(1024, 1024, ExtentKind.DATA)]
    os.close(fd)


def test_a_program_whose_lines_are_not_wanted_any_more_is_killed(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "x"), MIB)
    heard: list[bytes] = []

    def tell(said: bytes) -> None:
        heard.append(said)
        if len(heard) == 3:
            raise Unmapped

    with pytest.raises(Unmapped):
        spool.run(["sh", "-c", "echo a; echo b; echo c; exec sleep 1000"], tell)
    assert heard == [b"a", b"b", b"c"]


def test_a_program_that_says_much_on_both_ways_is_heard_out(tmp_path: Path) -> None:
    heard: list[bytes] = []
    both = "yes out | head -n 100000 & yes err | head -n 100000 >&2; wait; echo last >&2; exit 5"
    code, said = Spool(str(tmp_path / "x"), MIB).run(["sh", "-c", both], heard.append)
    assert code == 5
    assert said.endswith("err\nlast\n")
    assert heard == [b"out"] * 100_000 + [b""]
