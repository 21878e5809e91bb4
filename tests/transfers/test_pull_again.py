"""Checksums that lie beside an image, and images that are there already: when nothing has to be fetched."""

import hashlib
import subprocess
from pathlib import Path

from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI
from gateway.transfers.formats import BodyFormat
from gateway.transfers.pull import Checksum
from gateway.transfers.pull_image import checksums_in
from gateway.transfers.pull_source import ImageURL
from tests.repository.vdis import write
from tests.transfers.copying import path_of
from tests.transfers.pull_server import Connection, Request, Server, file_of, serving
from tests.transfers.pulling import MIB, SIZE, House, image, require_same, sum_of


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
        # One line of each kind: the longer one counts. Two of a kind contradict each other.
        short, long = sum_of(body).digits, hashlib.sha512(body).hexdigest()
        sums["/SUMS"] = f"{short}  disk\n{long}  disk\n".encode()
        vdi = await house.pull(f"{server.url}/disk", beside)
        assert vdi.other_config["pulled-checksum"] == f"sha512:{long}"
        sums["/SUMS"] = f"{short}  disk\n{'0' * 128}  disk\n".encode()
        assert await house.refusal(f"{server.url}/disk", beside) == "PULL_ERROR_CHECKSUM"
        sums["/SUMS"] = f"{short}  disk\n{'0' * 64}  disk\n{long}  disk\n".encode()
        assert await house.refusal(f"{server.url}/disk", beside) == "PULL_ERROR_CHECKSUM_FILE"
        sums["/SUMS"] = sum_of(b"else").digits.encode() + b" other"
        assert await house.refusal(f"{server.url}/disk", beside) == "PULL_ERROR_CHECKSUM_FILE"
        too_long = ImageURL.parse(f"{server.url}/long")
        assert await house.refusal(f"{server.url}/disk", too_long) == "PULL_ERROR_CHECKSUM_FILE"


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
