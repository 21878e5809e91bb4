"""disk.vhd and disk.qcow2 beside what curl gets of the same VDI."""

import errno
import os
import random
import subprocess
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from fuse_mount.disk_file import OpenFile
from fuse_mount.disks import Disks, Part
from fuse_mount.errnos import errno_of
from gateway.images.errors import ImageTooLarge
from tests.fuse_mount.served_site import chained_vdi, disks_of, served_site
from tests.images.disks import make_child
from tests.images.exports import scribble
from tests.system.site import MIB, Site, Vdi, depth

PARTS = [Part.VHD, Part.QCOW2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with served_site(tmp_path_factory.mktemp("site")) as site:
        yield site


def exported(site: Site, vdi: Vdi, part: Part, directory: Path) -> bytes:
    path = directory / f"{vdi.uuid}.{part.value}"
    url = site.export_url(vdi, format=part.value)
    subprocess.run(["curl", "-sS", "--fail", "-o", str(path), url], check=True)
    return path.read_bytes()


async def read_all(file: OpenFile, piece: int) -> bytes:
    read = bytearray()
    while data := await file.read(len(read), piece):
        read += data
    return bytes(read)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("size", "image_format"),
    [(9 * MIB + 512, "vhd"), (5 * MIB + 1537, "raw"), (64 * MIB, "vhd")],
)
async def test_every_byte_is_that_of_the_export_over_http(
    site: Site, tmp_path: Path, part: Part, size: int, image_format: str
) -> None:
    vdi = await trio.to_thread.run_sync(partial(chained_vdi, site, size, image_format))
    if image_format == "vhd":
        assert depth(site, vdi) == 3
    disks = disks_of(site)
    file = await disks.open(vdi.uuid, part, write=False)
    whole = await read_all(file, MIB)
    assert file.size == len(whole)
    assert whole == exported(site, vdi, part, tmp_path)
    choose = random.Random(1)
    for _ in range(200):
        offset, length = choose.randrange(len(whole) + 10), choose.choice([1, 511, 4096, 100_000])
        assert bytes(await file.read(offset, length)) == whole[offset : offset + length]
    await file.close()
    await disks.close()


@pytest.mark.parametrize("seed", range(6))
async def test_images_of_odd_sizes_with_blocks_of_any_size_and_a_raw_root(
    site: Site, tmp_path: Path, seed: int
) -> None:
    vdi = await trio.to_thread.run_sync(foreign_vdi, site, seed)
    disks = disks_of(site)
    for part in PARTS:
        file = await disks.open(vdi.uuid, part, write=False)
        assert await read_all(file, 300_000) == exported(site, vdi, part, tmp_path)
        await file.close()


def foreign_vdi(site: Site, seed: int) -> Vdi:
    """A chain that others have put into the SR."""
    choose = random.Random(seed)
    size = choose.randrange(5 * MIB // 512, 14 * MIB // 512) * 512
    names = [str(uuid.UUID(int=choose.getrandbits(128), version=4)) for _ in range(3)]
    path = site.directory / f"{names[0]}.raw"
    path.touch()
    os.truncate(path, size - choose.choice([0, 100]))
    scribble(path, choose)
    for name, block_size in zip(names[1:], (64 << 10, choose.choice([2, 4]) * MIB), strict=True):
        child = site.directory / f"{name}.vhd"
        make_child(child, path, size=size, block_size=block_size)
        path = child
        scribble(path, choose)
    site.gateway.call("SR.scan", site.repository)
    reference = site.gateway.call("VDI.get_by_uuid", names[-1])
    return Vdi(reference, names[-1], int(site.gateway.call("VDI.get_virtual_size", reference)), path)


@pytest.mark.parametrize("part", PARTS)
async def test_an_empty_disk_is_a_file_without_data(site: Site, tmp_path: Path, part: Part) -> None:
    vdi, disks = site.create_vdi(), disks_of(site)
    file = await disks.open(vdi.uuid, part, write=False)
    assert await read_all(file, 100) == exported(site, vdi, part, tmp_path)
    await file.close()


async def test_all_files_of_a_vdi_are_read_under_one_lease_and_counted(site: Site) -> None:
    vdi, disks = await trio.to_thread.run_sync(chained_vdi, site), disks_of(site)
    files = [await disks.open(vdi.uuid, part, write=False) for part in (*PARTS, Part.RAW, *PARTS)]
    assert list(site.gateway.call("VDI.get_current_operations", vdi.ref).values()) == ["read"]
    total = 0
    for file in files:
        total += len(await file.read(0, file.size))
    for file in files:
        await file.close()
    results = [
        record["result"]
        for record in site.gateway.call("task.get_all_records").values()
        if record["other_config"].get("vdi") == vdi.uuid and record["name_label"] == "fuse read"
    ]
    assert results == [f"{total} bytes read, 0 bytes written"]


async def test_a_new_content_is_another_file(site: Site, tmp_path: Path) -> None:
    vdi, disks = site.create_vdi(), disks_of(site)
    old = await disks.open(vdi.uuid, Part.VHD, write=False)
    url = site.import_url(vdi)
    command = ["curl", "-sS", "--fail-with-body", "-X", "PUT", "--data-binary", "@-", url]
    await trio.run_process(command, stdin=b"n" * vdi.size, capture_stdout=True)
    new = await disks.open(vdi.uuid, Part.VHD, write=False)
    assert await read_all(new, MIB) == exported(site, vdi, Part.VHD, tmp_path)
    assert new.size > old.size
    await old.close()
    await new.close()


async def test_a_vdi_that_is_replaced_between_the_lease_and_the_question_is_opened_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi, disks = site.create_vdi(), disks_of(site)
    url = site.import_url(vdi)
    command = ["curl", "-sS", "--fail-with-body", "-X", "PUT", "--data-binary", "@-", url]
    layout = Disks._layout
    times = 0

    async def replaced(self: Disks, held: object, sparse: object) -> object:
        nonlocal times
        times += 1
        if times == 1:
            await trio.run_process(command, stdin=b"m" * vdi.size, capture_stdout=True)
        return await layout(self, held, sparse)  # type: ignore[arg-type]

    monkeypatch.setattr(Disks, "_layout", replaced)
    file = await disks.open(vdi.uuid, Part.VHD, write=False)
    assert times == 2
    assert await read_all(file, MIB) == exported(site, vdi, Part.VHD, tmp_path)
    await file.close()
    assert disks.held == {}


async def test_a_lease_that_was_taken_away_ends_these_reads_too(site: Site) -> None:
    vdi, disks = await trio.to_thread.run_sync(chained_vdi, site), disks_of(site)
    file = await disks.open(vdi.uuid, Part.VHD, write=False)
    site.gateway.call("VDI.force_unlock", vdi.ref)
    with trio.fail_after(20):
        while site.gateway.call("VDI.get_current_operations", vdi.ref):  # noqa: ASYNC110
            await trio.sleep(0.01)
    with pytest.raises(OSError, match="lease has ended"):
        await file.read(file.size - 100_000, 50_000)
    await file.close()


async def test_a_disk_that_no_vhd_can_hold_is_refused_as_too_large(site: Site) -> None:
    vdi, disks = site.create_vdi(3 << 40, "raw"), disks_of(site)
    with pytest.raises(ImageTooLarge) as refused:
        await disks.open(vdi.uuid, Part.VHD, write=False)
    assert errno_of(refused.value) == errno.EFBIG
    assert disks.held == {}
