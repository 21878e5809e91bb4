"""An image on a server becomes a VDI, byte for byte, or one known error is told and nothing is left."""

import itertools
import random
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.images.disk import Disk
from gateway.images.files import FileCalls
from gateway.transfers.body import BodyReader
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_flat import FlatDisk
from gateway.transfers.measured import measured
from gateway.transfers.pull_socket import Patience
from tests.images.disks import qemu_compare
from tests.transfers.copying import foreign_reads, names, path_of
from tests.transfers.pull_server import Connection, Handler, Request, file_of, serving
from tests.transfers.pulling import FORMATS, MIB, PACKED, House, image, packed, require_same, sum_of

# Each way of reading an image with each way of unpacking, and every image in one of them.
TOGETHER = [*itertools.product(("raw", "vhd", "qcow2"), PACKED)]
TOGETHER += [(form, "zstd") for form in FORMATS if form not in ("raw", "vhd", "qcow2")]


@pytest.mark.parametrize(("form", "packing"), TOGETHER)
async def test_every_image_in_every_packing_is_the_disk(
    house: House, files: Path, form: str, packing: str
) -> None:
    body = image(files, form, packing)
    with serving(file_of(body)) as server:
        vdi = await house.pull(f"{server.url}/any.name", sum_of(body))
    require_same(house, vdi, files)
    assert (vdi.name_label, vdi.sr) == ("gold", house.sr)
    assert vdi.other_config["pulled-from"] == f"{server.url}/any.name"
    assert vdi.other_config["pulled-checksum"] == str(sum_of(body))
    assert house.operation.current_progress() == pytest.approx(1.0)
    told = {"pulled-from": f"{server.url}/any.name", "bytes-pulled": str(len(body))}
    assert house.operation.current_details() == {**told, "bytes-to-pull": str(len(body))}
    assert names(house.directory) == {f"{vdi.uuid}.vhd"}


@pytest.mark.parametrize("packing", ["", "gzip"])
async def test_progress_does_not_go_back_when_all_has_come_and_is_read_again(
    house: House, files: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def come(*arguments: Any) -> BodyReader:
        kept = measured(*arguments)
        seen.append(house.operation.current_progress())
        return kept

    def receive(flat: FlatDisk, disk: Disk, *, files: FileCalls) -> None:
        seen.append(house.operation.current_progress())
        received(flat, disk, files=files)

    received = FlatDisk.receive
    monkeypatch.setattr("gateway.transfers.import_disk.measured", come)
    monkeypatch.setattr(FlatDisk, "receive", receive)
    with serving(file_of(image(files, "raw", packing))) as server:
        await house.pull(server.url)
    seen.append(house.operation.current_progress())
    assert seen == sorted(seen)
    assert len(seen) == (3 if packing else 2)


@pytest.mark.parametrize("form", FORMATS)
async def test_without_a_length_too(house: House, files: Path, form: str) -> None:
    with serving(file_of(image(files, form), chunked=True)) as server:
        require_same(house, await house.pull(server.url), files)


@pytest.mark.parametrize("form", ["raw", "qcow2", "vhd"])
async def test_a_body_that_only_the_connection_ends_needs_a_checksum(
    house: House, files: Path, form: str
) -> None:
    body = image(files, form)

    def handler(_request: Request, connection: Connection) -> None:
        connection.head(Connection="close")
        connection.send(body)

    with serving(handler) as server:
        assert await house.refusal(server.url) == "PULL_ERROR_LENGTH_REQUIRED"
        require_same(house, await house.pull(server.url, sum_of(body)), files)


@pytest.mark.parametrize("form", ["raw", "vhd", "fixed", "qcow2"])
@pytest.mark.parametrize("packing", ["", "zstd"])
async def test_a_wrong_checksum_leaves_nothing(house: House, files: Path, form: str, packing: str) -> None:
    body = image(files, form, packing)
    with serving(file_of(body)) as server:
        assert await house.refusal(server.url, sum_of(body + b"x")) == "PULL_ERROR_CHECKSUM"


async def test_what_lies_behind_a_vhd_counts_for_its_checksum(house: House, files: Path) -> None:
    body = image(files, "vhd") + bytes(5000)
    with serving(file_of(body, chunked=True)) as server:
        require_same(house, await house.pull(server.url, sum_of(body)), files)
        assert await house.refusal(server.url, sum_of(image(files, "vhd"))) == "PULL_ERROR_CHECKSUM"
    with serving(file_of(image(files, "vhd") + bytes(2 * MIB), chunked=True)) as server:
        assert await house.refusal(server.url) == "IMPORT_ERROR_CORRUPT_IMAGE"


async def test_a_raw_disk_may_look_like_anything_if_that_is_said(house: House, files: Path) -> None:
    body = image(files, "qcow2")
    with serving(file_of(body, chunked=True)) as server:
        vdi = await house.pull(server.url, format=BodyFormat.RAW)
        assert foreign_reads(house.inventory, vdi).startswith(body)
        assert await house.refusal(server.url, format=BodyFormat.VHD) == "IMPORT_ERROR_WRONG_FORMAT"
    with serving(file_of(image(files, "raw"), chunked=True)) as server:
        assert await house.refusal(server.url, format=BodyFormat.VHD) == "IMPORT_ERROR_WRONG_FORMAT"


@pytest.mark.parametrize("body", [b"", b"PK\x03\x04zip", b"BZh91AY"])
async def test_what_is_no_image_is_refused(house: House, body: bytes) -> None:
    with serving(file_of(body)) as server:
        code = await house.refusal(server.url)
    assert code == ("IMPORT_ERROR_UNSUPPORTED_IMAGE" if body else "IMPORT_ERROR_PREMATURE_EOF")


@pytest.mark.parametrize("form", [BodyFormat.AUTO, BodyFormat.RAW, BodyFormat.QCOW2])
async def test_nothing_in_a_packing_is_no_disk(house: House, form: BodyFormat) -> None:
    for body in (b"", *(packed(b"", *command) for command in PACKED.values() if command)):
        with serving(file_of(body)) as server:
            assert await house.refusal(server.url, format=form) == "IMPORT_ERROR_PREMATURE_EOF"


async def test_an_image_in_two_packings_is_refused(house: House, files: Path) -> None:
    with serving(file_of(packed(image(files, "raw", "gzip"), "gzip", "-c"))) as server:
        assert await house.refusal(server.url) == "IMPORT_ERROR_UNSUPPORTED_IMAGE"


async def test_a_body_without_an_end_stops_at_the_limit(house: House) -> None:
    house.terms = replace(house.terms, spool_bytes=2 * MIB)

    def endless(begin: bytes) -> Handler:
        def handler(_request: Request, connection: Connection) -> None:
            connection.head(Transfer_Encoding="chunked")
            connection.chunk(begin)
            while not connection.ending.is_set():
                connection.chunk(b"x" * 65536)

        return handler

    for begin in (b"raw", b"QFI\xfb\0\0\0\3" + bytes(16) + (1 << 30).to_bytes(8, "big")):
        with serving(endless(begin)) as server:
            code = await house.refusal(server.url)
        assert code in ("IMPORT_ERROR_IMAGE_TOO_LONG", "IMPORT_ERROR_CORRUPT_IMAGE")


async def test_a_bomb_is_refused_by_its_size(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.transfers import measured

    monkeypatch.setattr(measured, "MAX_VIRTUAL_SIZE", 16 * MIB)
    with serving(file_of(packed(bytes(17 * MIB), "zstd", "-qc"))) as server:
        assert await house.refusal(server.url) == "VDI_TOO_LARGE"


async def test_zeroes_take_no_space(house: House) -> None:
    with serving(file_of(packed(bytes(16 * MIB), "gzip", "-c"))) as server:
        vdi = await house.pull(server.url)
    assert vdi.virtual_size == 16 * MIB
    assert path_of(house.inventory, vdi).stat().st_blocks * 512 < MIB


async def test_a_cancellation_ends_it_at_once_and_leaves_nothing(house: House) -> None:
    waiting = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def handler(_request: Request, connection: Connection) -> None:
        connection.head(Content_Length=100 * MIB)
        connection.send(bytes(5 * MIB))
        token.run_sync_soon(waiting.set)
        connection.wait_for_end()

    house.terms = replace(house.terms, patience=Patience(1000, 1000, (1000.0,)))
    with serving(handler) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.pull, server.url)
            await waiting.wait()
            nursery.cancel_scope.cancel()
    assert names(house.directory) == set()
    assert len(house.inventory.records.vdis) == 0


async def test_where_nothing_can_be_made_nothing_is_fetched(house: House, files: Path) -> None:
    with serving(file_of(image(files, "raw"))) as server:
        assert await house.refusal(server.url, sr="OpaqueRef:none") == "SR_NOT_ATTACHED"
        (pbd,) = house.inventory.records.pbds_of_sr(house.sr)
        await house.inventory.pbd_unplug(pbd.ref)
        with pytest.raises(XenAPIError, match="SR_NOT_ATTACHED"):
            await house.pull(server.url)
        assert server.requests == []


@cache
def large_image(files: Path, form: str) -> bytes:
    """A disk of 45 MiB that nothing makes smaller."""
    raw = files / "large"
    raw.write_bytes(random.Random(2).randbytes(45 * MIB))
    if form == "raw":
        return raw.read_bytes()
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, raw, files / "large.image"], check=True)
    return (files / "large.image").read_bytes()


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_sr_without_room_is_full_and_stays_as_it_was(
    house: House, files: Path, small_file_system: Path, form: str, chunked: bool
) -> None:
    house.sr = await house.inventory.sr_create("small", str(small_file_system / "sr"))
    house.directory = small_file_system / "sr"
    with serving(file_of(large_image(files, form), chunked=chunked)) as server:
        assert await house.refusal(server.url) == "SR_FULL"
    await house.inventory.pbd_unplug(house.inventory.records.pbds_of_sr(house.sr)[0].ref)


def test_the_reader_that_judges_is_qemu(files: Path) -> None:
    """libvhdi reads what was made; that it is right is told by qemu-img, which made the images."""
    image(files, "vhd")
    qemu_compare(files / "vhd", "vpc", files / "disk", "raw")
