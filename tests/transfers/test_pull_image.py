"""An image on a server becomes a VDI, byte for byte, or one known error is told and nothing is left."""

import hashlib
import itertools
import random
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import cache
from itertools import chain, repeat
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI
from gateway.core.task import Operation
from gateway.repository.inventory import Inventory
from gateway.transfers.formats import BodyFormat
from gateway.transfers.pull import Checksum
from gateway.transfers.pull_image import Order, Terms, checksums_in, pull_image
from gateway.transfers.pull_socket import Patience
from gateway.transfers.pull_source import ImageURL, PullRules
from tests.images.disks import qemu_compare
from tests.repository.test_snapshots import write
from tests.transfers.pull_server import LOOPBACK, Connection, Handler, Request, Server, file_of, serving
from tests.transfers.test_copy_disk import foreign_reads, names, path_of, small_file_system

__all__ = ["small_file_system"]

MIB = 1 << 20
SIZE = 5 * MIB + 512
KNOWN = {
    "IMPORT_ERROR_BAD_COMPRESSION",
    "IMPORT_ERROR_CORRUPT_IMAGE",
    "IMPORT_ERROR_PREMATURE_EOF",
    "IMPORT_ERROR_UNSUPPORTED_IMAGE",
    "IMPORT_ERROR_WRONG_FORMAT",
    "PULL_ERROR_BROKEN_OFF",
    "PULL_ERROR_CHANGED",
    "PULL_ERROR_CHECKSUM",
    "PULL_ERROR_NOT_HTTP",
    "PULL_ERROR_STATUS",
    "VDI_TOO_LARGE",
}


def disk() -> bytes:
    data = bytearray(SIZE)
    data[MIB : 2 * MIB] = random.Random(1).randbytes(MIB)
    data[-512:] = b"\x07" * 512
    return bytes(data)


FORMATS = {
    "raw": ("raw",),
    "vhd": ("vpc", "-o", "subformat=dynamic,force_size=on"),
    "fixed": ("vpc", "-o", "subformat=fixed,force_size=on"),
    "qcow2": ("qcow2",),
    "compressed qcow2": ("qcow2", "-c"),
    "vhdx": ("vhdx",),
    "vmdk": ("vmdk",),
    "stream": ("vmdk", "-o", "subformat=streamOptimized"),
}
PACKED = {"": None, "gzip": ("gzip", "-c"), "xz": ("xz", "-c1"), "zstd": ("zstd", "-qc")}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    (directory / "disk").write_bytes(disk())
    return directory


@cache
def image(files: Path, form: str, packing: str = "") -> bytes:
    path = files / form.replace(" ", "-")
    program, *options = FORMATS[form]
    command = ["qemu-img", "convert", "-f", "raw", "-O", program, *options]
    subprocess.run([*command, str(files / "disk"), str(path)], check=True)
    data = path.read_bytes()
    command_of = PACKED[packing]
    if command_of is None:
        return data
    return packed(data, *command_of)


def packed(data: bytes, *command: str) -> bytes:
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def sum_of(data: bytes) -> Checksum:
    return Checksum("sha256", hashlib.sha256(data).hexdigest())


class House:
    """An inventory with one SR."""

    def __init__(self, inventory: Inventory, sr: str, directory: Path) -> None:
        self.inventory = inventory
        self.sr = sr
        self.directory = directory
        self.operation = Operation("OpaqueRef:task", None)
        self.terms = Terms(
            PullRules.of(LOOPBACK),
            trio.CapacityLimiter(4),
            64 * MIB,
            Patience(connect=10, idle=10, pauses=(0.0, 0.0, 0.0)),
        )

    async def pull(self, url: str, checksum: Checksum | ImageURL | None = None, **more: object) -> VDI:
        order = Order(url=ImageURL.parse(url), sr=self.sr, name_label="gold", checksum=checksum)
        self.operation = Operation("OpaqueRef:task", None)
        ref = await pull_image(
            self.inventory,
            self.operation,
            order=replace(order, **more),  # type: ignore[arg-type]
            who="the test",
            terms=self.terms,
        )
        return self.inventory.records.vdis.get(ref)

    async def refusal(self, url: str, checksum: Checksum | ImageURL | None = None, **more: object) -> str:
        """The code of the error; nothing is left of the attempt."""
        before = names(self.directory)
        vdis = len(self.inventory.records.vdis)
        with pytest.raises(XenAPIError) as refused:
            await self.pull(url, checksum, **more)
        assert names(self.directory) == before
        assert len(self.inventory.records.vdis) == vdis
        return refused.value.code


@pytest.fixture
async def house(inventory: Inventory, tmp_path: Path) -> AsyncIterator[House]:
    sr = await inventory.sr_create("gold", str(tmp_path / "gold"))
    yield House(inventory, sr, tmp_path / "gold")


def require_same(house: House, vdi: VDI, files: Path, size: int = SIZE) -> None:
    found = foreign_reads(house.inventory, vdi)
    assert len(found) == vdi.virtual_size == -(-size // (2 * MIB)) * 2 * MIB
    assert found == (files / "disk").read_bytes().ljust(len(found), b"\0")


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

    monkeypatch.setattr(measured, "MAX_VIRTUAL_SIZE", 64 * MIB)
    with serving(file_of(packed(bytes(65 * MIB), "zstd", "-qc"))) as server:
        assert await house.refusal(server.url) == "VDI_TOO_LARGE"


async def test_zeroes_take_no_space(house: House) -> None:
    with serving(file_of(packed(bytes(64 * MIB), "gzip", "-c"))) as server:
        vdi = await house.pull(server.url)
    assert vdi.virtual_size == 64 * MIB
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


def large_image(directory: Path, form: str) -> bytes:
    """A disk of 45 MiB that nothing makes smaller."""
    raw = directory / "large"
    raw.write_bytes(random.Random(2).randbytes(45 * MIB))
    if form == "raw":
        return raw.read_bytes()
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", form, raw, directory / "large.image"], check=True
    )
    return (directory / "large.image").read_bytes()


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_sr_without_room_is_full_and_stays_as_it_was(
    house: House, tmp_path: Path, small_file_system: Path, form: str, chunked: bool
) -> None:
    house.sr = await house.inventory.sr_create("small", str(small_file_system / "sr"))
    house.directory = small_file_system / "sr"
    with serving(file_of(large_image(tmp_path, form), chunked=chunked)) as server:
        assert await house.refusal(server.url) == "SR_FULL"
    await house.inventory.pbd_unplug(house.inventory.records.pbds_of_sr(house.sr)[0].ref)


# --- checksums in files


def test_checksum_files_are_read_as_their_programs_write_them(tmp_path: Path) -> None:
    (tmp_path / "a b.raw").write_bytes(b"one")
    (tmp_path / "other").write_bytes(b"two")
    expected = {sum_of(b"one")}
    for command in (["sha256sum"], ["sha256sum", "-b"], ["sha256sum", "--tag"]):
        said = subprocess.run(
            [*command, "other", "a b.raw"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        assert checksums_in(said, "a b.raw") == expected
        assert checksums_in(f"# of today\n\n{said}", "a b.raw") == expected
        assert checksums_in(said, "b.raw") == set()
    digits = sum_of(b"one").digits
    assert checksums_in(f"{digits.upper()}\n", "x") == expected
    assert checksums_in(f"{digits}  ./images/x\n", "x") == expected
    assert checksums_in(f"{digits}\n{digits}\n", "x") == set()
    long = hashlib.sha512(b"one").hexdigest()
    assert checksums_in(f"{long}  x\n", "x") == {Checksum("sha512", long)}
    assert checksums_in(f"{long[:40]}  x\nrubbish\n", "x") == set()


async def test_a_checksum_comes_from_beside_the_image(house: House, files: Path) -> None:
    body = image(files, "qcow2", "xz")
    sums = {"/SUMS": b"%s *disk\n" % sum_of(body).digits.encode(), "/disk": body, "/long": b"#" * (2 * MIB)}

    def handler(request: Request, connection: Connection) -> None:
        file_of(sums[request.target])(request, connection)

    with serving(handler) as server:
        beside = ImageURL.parse(f"{server.url}/SUMS")
        require_same(house, await house.pull(f"{server.url}/disk", beside), files)
        sums["/SUMS"] = sum_of(b"else").digits.encode()
        assert await house.refusal(f"{server.url}/disk", beside) == "PULL_ERROR_CHECKSUM"
        sums["/SUMS"] += b" other"
        assert await house.refusal(f"{server.url}/disk", beside) == "PULL_ERROR_CHECKSUM_FILE"
        too_long = ImageURL.parse(f"{server.url}/long")
        assert await house.refusal(f"{server.url}/disk", too_long) == "PULL_ERROR_CHECKSUM_FILE"


# --- images that are there already


async def again(house: House, server: Server, body: bytes, **more: object) -> tuple[VDI, bool]:
    """The VDI, and whether nothing was fetched for it."""
    before = len(server.requests)
    vdi = await house.pull(server.url, sum_of(body), reuse=True, **more)
    is_old = len(server.requests) == before
    assert is_old is (house.operation.current_details().get("reused") == "true")
    return vdi, is_old


async def test_what_is_there_already_is_not_fetched_again(house: House, files: Path) -> None:
    body = image(files, "qcow2")
    inventory = house.inventory
    with serving(file_of(body)) as server:
        first, is_old = await again(house, server, body)
        assert not is_old
        assert await again(house, server, body) == (inventory.records.vdis.get(first.ref), True)
        # A clone has the same bytes and the same other_config, and belongs to somebody.
        clone = inventory.records.vdis.get(await inventory.vdi_clone(first.ref))
        assert (await again(house, server, body))[0].ref == first.ref
        await inventory.vdi_destroy(first.ref)
        second, is_old = await again(house, server, body)
        assert not is_old
        assert second.ref not in (first.ref, clone.ref)
        assert (await again(house, server, body, format=BodyFormat.RAW))[1] is False
        assert (await house.pull(server.url, sum_of(body))).ref != second.ref
        assert (await house.pull(server.url, reuse=True)).ref != second.ref


async def test_what_was_written_to_is_fetched_again(house: House, files: Path) -> None:
    body = image(files, "vhd")
    inventory = house.inventory
    with serving(file_of(body)) as server:
        first, _ = await again(house, server, body)
        await write(inventory, first.ref, b"changed", 0)
        second, is_old = await again(house, server, body)
        assert (is_old, second.ref != first.ref) == (False, True)
        # While somebody may write to it, it isn't certain either.
        holder = Holder("somebody", "write", second.ref)
        lease = await inventory.lease(second.ref, LeaseMode.WRITE, holder)
        other, is_old = await again(house, server, body)
        assert not is_old
        await inventory.vdi_destroy(other.ref)
        lease.release()
        await lease.released()
        # Nor is a file that somebody has touched from outside.
        third, is_old = await again(house, server, body)
        assert is_old
        path = path_of(inventory, third)
        path.write_bytes(path.read_bytes())
        fourth, is_old = await again(house, server, body)
        assert (is_old, fourth.ref != third.ref) == (False, True)


async def test_other_config_alone_proves_nothing(house: House, files: Path) -> None:
    body, wrong = image(files, "raw"), bytes(SIZE)
    with serving(file_of(wrong)) as server:
        forged = await house.pull(server.url, sum_of(wrong))
        claim = {**forged.other_config, "pulled-checksum": str(sum_of(body))}
        await house.inventory.records.vdis.change(forged.ref, other_config=claim)
    with serving(file_of(body)) as server:
        found, is_old = await again(house, server, body)
        assert (found.ref == forged.ref, is_old) == (False, False)
        moved = {**found.other_config}
        await house.inventory.records.vdis.change(forged.ref, other_config=moved)
        await house.inventory.vdi_destroy(found.ref)
        assert (await again(house, server, body))[1] is False


# --- whatever a server does


def mischief(seed: int, body: bytes) -> Handler:
    chance = random.Random(seed)
    kind = chance.choice(["break", "change", "damage", "lie", "status", "no ranges", "chunked"])
    cuts = chain((chance.randrange(1, len(body)) for _ in range(chance.randrange(4))), repeat(len(body) + 1))
    if kind == "damage":
        damaged = bytearray(body)
        damaged[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        return file_of(bytes(damaged), cuts=cuts)
    if kind == "lie":
        return file_of(body[: chance.randrange(1, len(body))], cuts=cuts)
    if kind in ("change", "status"):
        other = body[: chance.randrange(len(body))] + chance.randbytes(100)
        later = file_of(other, tag=chance.choice(['"v1"', '"v2"', None]))
        first = file_of(body, cuts=cuts)

        def handler(request: Request, connection: Connection) -> None:
            if chance.random() < 0.5:
                first(request, connection)
            elif kind == "change":
                later(request, connection)
            else:
                connection.head(chance.choice([404, 500, 503, 206]), Content_Length=0)

        return handler
    return file_of(
        body,
        cuts=cuts,
        ranges=kind != "no ranges",
        chunked=kind == "chunked",
        tag=chance.choice(['"v1"', None]),
    )


async def play(house: House, files: Path, seed: int) -> None:
    chance = random.Random(seed)
    form, packing = chance.choice(list(FORMATS)), chance.choice(list(PACKED))
    body = image(files, form, packing)
    before = names(house.directory)
    with serving(mischief(seed, body)) as server:
        try:
            vdi = await house.pull(server.url, sum_of(body))
        except XenAPIError as error:
            assert error.code in KNOWN, (seed, form, packing)
            assert names(house.directory) == before
            return
    require_same(house, vdi, files)
    await house.inventory.vdi_destroy(vdi.ref)


@pytest.mark.parametrize("part", range(4))
async def test_whatever_a_server_does_it_is_the_disk_or_one_error(
    house: House, files: Path, part: int
) -> None:
    for seed in range(part * 100, part * 100 + 12):
        await play(house, files, seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
async def test_whatever_a_server_does_at_length(house: House, files: Path, part: int) -> None:
    for seed in range(10_000 + part * 100, 10_000 + part * 100 + 60):
        await play(house, files, seed)


def test_the_reader_that_judges_is_qemu(files: Path) -> None:
    """libvhdi reads what was made; that it is right is told by qemu-img, which made the images."""
    image(files, "vhd")
    qemu_compare(files / "vhd", "vpc", files / "disk", "raw")
