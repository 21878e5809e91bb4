import os
import random
import struct
import subprocess
import uuid
import zlib
from pathlib import Path

import pytest

from fuse_mount.partitions import Partition, read_table
from tests.fuse_mount.partition_tables import GIB, MIB, Reads, made, places, told

LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def test_a_gpt_is_told_from_the_two_ends_in_bytes_with_names_and_uuids(tmp_path: Path) -> None:
    own = str(uuid.uuid4()).upper()
    disk = made(
        tmp_path / "disk",
        4 << 40,
        f'label: gpt\nstart=2048, size=1GiB, type={LINUX}, uuid={own}, name="root"\n'
        "start=8000000000, size=2MiB, type=swap\n",
    )
    reads = Reads(disk)
    first, second = reads.partitions()
    assert first == Partition(1, MIB, GIB, LINUX, "root", own)
    assert places((second,)) == [(2, 8000000000 * 512, 2 * MIB)]
    assert second.name == ""
    assert reads.further == []


@pytest.mark.parametrize(
    "name", ['a"b\\c', "grüße, 大", "\U0001f600", "tab\there", "\x01\x7f", "$(id)`id`", "x" * 36]
)
def test_the_name_of_a_partition_may_be_anything(tmp_path: Path, name: str) -> None:
    disk = made(tmp_path / "disk", 16 * MIB, "label: gpt\nsize=1MiB\n")
    data = bytearray(disk.read_bytes())
    data[1024 + 56 : 1024 + 128] = name.encode("utf-16-le").ljust(72, b"\0")[:72]
    data[528:532] = b"\0" * 4
    struct.pack_into("<I", data, 512 + 88, zlib.crc32(data[1024 : 1024 + 128 * 128]))
    struct.pack_into("<I", data, 512 + 16, zlib.crc32(data[512 : 512 + 92]))
    disk.write_bytes(data)
    [found] = Reads(disk).partitions()
    assert found.name == name
    assert (found.offset, found.length) == (MIB, MIB)


def test_a_name_of_halves_of_characters_is_no_obstacle(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk", 16 * MIB, "label: gpt\nsize=1MiB\n")
    data = bytearray(disk.read_bytes())
    data[1024 + 56 : 1024 + 60] = b"\x00\xd8a\x00"
    struct.pack_into("<I", data, 512 + 88, zlib.crc32(data[1024 : 1024 + 128 * 128]))
    data[528:532] = b"\0" * 4
    struct.pack_into("<I", data, 512 + 16, zlib.crc32(data[512 : 512 + 92]))
    disk.write_bytes(data)
    [found] = Reads(disk).partitions()
    assert found.offset == MIB


@pytest.mark.parametrize("damaged", ["the header", "the entries", "the beginning of the disk but its MBR"])
def test_a_gpt_whose_beginning_is_damaged_is_told_by_its_backup(tmp_path: Path, damaged: str) -> None:
    disk = made(tmp_path / "disk", 64 * MIB, "label: gpt\nsize=5MiB\nsize=6MiB\n")
    start, end = {"the header": (512, 1024), "the entries": (1024, 2048)}.get(damaged, (512, MIB))
    with disk.open("r+b") as file:
        file.seek(start)
        file.write(b"\xa5" * (end - start))
    assert places(Reads(disk).partitions()) == [(1, MIB, 5 * MIB), (2, 6 * MIB, 6 * MIB)]


def test_a_gpt_whose_disk_became_larger_is_told(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk", 16 * MIB, "label: gpt\nsize=5MiB\n")
    os.truncate(disk, 64 * MIB)
    assert places(Reads(disk).partitions()) == [(1, MIB, 5 * MIB)]


def test_all_128_entries_of_a_gpt_are_told(tmp_path: Path) -> None:
    script = "label: gpt\n" + "".join(f"start={2048 + 8 * n}, size=8\n" for n in range(128))
    disk = made(tmp_path / "disk", 64 * MIB, script)
    found = Reads(disk).partitions()
    assert places(found) == [(n + 1, MIB + 4096 * n, 4096) for n in range(128)]


def test_a_gpt_for_sectors_of_4_kib_is_told(tmp_path: Path) -> None:
    disk = made(
        tmp_path / "disk", 64 * MIB, "g\nn\n\n\n+8M\nn\n\n\n+4M\nx\nn\n2\nzwei\nr\nw\n", program="fdisk"
    )
    first, second = Reads(disk).partitions()
    assert places((first, second)) == [(1, MIB, 8 * MIB), (2, 9 * MIB, 4 * MIB)]
    assert (first.type, second.name) == (LINUX, "zwei")
    assert read_table(str(disk), 64 * MIB).sector == 4096


def test_what_protects_a_gpt_that_is_gone_is_no_partition(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk", 64 * MIB, "label: gpt\nsize=5MiB\n")
    with disk.open("r+b") as file:
        for offset in (512, 63 * MIB):
            file.seek(offset)
            file.write(bytes(MIB - 512) if offset == 512 else bytes(MIB))
    assert Reads(disk).partitions() == ()
    assert read_table(str(disk), 64 * MIB).label == ""


LOGICAL = """label: dos
start=2048, size=8192, type=83
start=16384, size=60000000, type=f
start=60100000, size=2048, type=82
"""


def test_logical_partitions_all_over_the_disk_are_told(tmp_path: Path) -> None:
    starts = [20480 + 1_000_000 * n for n in range(50)]
    script = LOGICAL + "".join(f"{5 + n}: start={start}, size=4096\n" for n, start in enumerate(starts))
    disk = made(tmp_path / "disk", 40 * GIB, script.replace("start=60100000", "3: start=60100000"))
    reads = Reads(disk)
    found = reads.partitions()
    assert places(found) == told(disk)
    assert [each.offset for each in found if each.number >= 5] == [start * 512 for start in starts]
    assert len(reads.further) == 50
    table = read_table(str(disk), reads.size)
    assert table.partitions == found
    assert [each.number for each in found if table.is_container(each)] == [2]


def test_without_further_reads_logical_partitions_are_told_as_far_as_the_ends_tell_them(
    tmp_path: Path,
) -> None:
    script = (
        "label: dos\nstart=64, size=60000000, type=f\n5: start=128, size=1024\n6: start=6000000, size=1024\n"
    )
    disk = made(tmp_path / "disk", 40 * GIB, script)
    assert places(Reads(disk).partitions(further=False))[:2] == told(disk)[:2]
    assert places(Reads(disk).partitions()) == told(disk)


def chained(path: Path, links: list[int], size: int = GIB) -> Path:
    """An MBR whose extended partition begins at sector 4096, with links in that order."""

    def entry(kind: int, start: int, length: int) -> bytes:
        return struct.pack("<B3sB3sII", 0, b"\0\0\0", kind, b"\0\0\0", start, length)

    base, length = 4096, size // 512 - 4096
    with path.open("wb") as file:
        file.truncate(size)
        file.write(b"\0" * 446 + entry(5, base, length) + b"\0" * 48 + b"\x55\xaa")
        for here, following in zip(links, [*links[1:], None], strict=True):
            file.seek(here * 512)
            link = entry(5, following - base, 4096) if following is not None else b"\0" * 16
            file.write(b"\0" * 446 + entry(0x83, 2048, 2048) + link + b"\0" * 32 + b"\x55\xaa")
    return path


def test_logical_partitions_whose_chain_leads_backwards_are_told(tmp_path: Path) -> None:
    links = [4096, 1_600_000, 20_000, 900_000, 10_000]
    disk = chained(tmp_path / "disk", links)
    found = Reads(disk).partitions()
    assert [each.offset for each in found[1:]] == [(link + 2048) * 512 for link in links]
    assert places(found) == told(disk)


def test_a_chain_of_logical_partitions_that_goes_round_ends(tmp_path: Path) -> None:
    disk = chained(tmp_path / "disk", [4096, 1_000_000, 4096])
    with disk.open("r+b") as file:
        file.seek(4096 * 512 + 462 + 8)
        file.write(struct.pack("<I", 1_000_000 - 4096))
        file.seek(1_000_000 * 512 + 462)
        file.write(struct.pack("<B3sB3sII", 0, b"", 5, b"", 1, 4096))
        file.seek(4097 * 512)
        file.write(b"\0" * 462 + struct.pack("<B3sB3sII", 0, b"", 5, b"", 1, 4096) + b"\0" * 32 + b"\x55\xaa")
    reads = Reads(disk)
    assert reads.partitions()[0].type == "5"
    assert len(reads.further) < 60


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1023, 1024, 4096, MIB - 1, 5 * MIB + 77, 3 << 40])
def test_a_disk_without_a_table_has_no_partitions(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(size)
    assert Reads(disk).partitions() == ()


@pytest.mark.parametrize("size", [MIB, MIB + 512, 2 * MIB - 512, 2 * MIB + 512, 3 * MIB + 77])
@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_the_table_of_a_small_disk_is_told(tmp_path: Path, size: int, label: str) -> None:
    disk = made(
        tmp_path / "disk", size - size % 512, f"label: {label}\nstart=64, size=128\nstart=512, size=256\n"
    )
    os.truncate(disk, size)
    expected = [(1, 64 * 512, 128 * 512), (2, 512 * 512, 256 * 512)]
    if label == "dos" or size % 512 == 0:
        assert places(Reads(disk).partitions()) == expected


def test_partitions_are_cut_to_the_disk_and_left_out_beyond_it(tmp_path: Path) -> None:
    script = "label: dos\nstart=2048, size=2048\nstart=8192, size=8192\nstart=20000, size=2048\n"
    disk = made(tmp_path / "disk", 16 * MIB, script)
    os.truncate(disk, 6 * MIB)
    assert places(Reads(disk).partitions()) == [(1, MIB, MIB), (2, 4 * MIB, 2 * MIB)]


def test_partitions_that_overlap_are_told_as_they_are(tmp_path: Path) -> None:
    disk = made(tmp_path / "disk", 16 * MIB, "label: dos\nstart=2048, size=8192\nstart=12288, size=2048\n")
    with disk.open("r+b") as file:
        file.seek(446 + 16 + 8)
        file.write(struct.pack("<I", 4096))
    assert places(Reads(disk).partitions()) == [(1, MIB, 4 * MIB), (2, 2 * MIB, MIB)]


def test_a_filesystem_without_a_table_has_no_partitions(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(disk)], check=True)
    assert Reads(disk).partitions() == ()


@pytest.mark.parametrize("seed", range(20))
def test_garbage_behind_a_boot_signature_is_no_error(tmp_path: Path, seed: int) -> None:
    noise = random.Random(seed)
    data = bytearray(noise.randbytes(4 * MIB))
    data[510:512] = b"\x55\xaa"
    if seed % 2:
        data[446:510] = b"".join(
            struct.pack(
                "<B3sB3sII",
                noise.choice((0, 0x80)),
                b"",
                noise.choice((5, 0xF, 0x83, 0xEE, 0)),
                b"",
                noise.randrange(1 << noise.choice((12, 32))),
                noise.randrange(1 << noise.choice((12, 32))),
            )
            for _ in range(4)
        )
    if seed % 4 == 3:
        data[512:520] = b"EFI PART"
    disk = tmp_path / "disk"
    disk.write_bytes(data)
    for each in Reads(disk).partitions():
        assert 0 <= each.offset < each.offset + each.length <= 4 * MIB
