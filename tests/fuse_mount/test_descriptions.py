"""Sizes of a VDI's files without a lease, and how long they are known."""

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from fuse_mount import descriptions as module
from fuse_mount.descriptions import Description, Descriptions
from gateway.access.client import AccessRefused, open_vdi
from gateway.access.protocol import Described, Refused
from gateway.images.files import FileIdentity
from tests.fuse_mount.askers import Askers, Source, asking
from tests.fuse_mount.served_site import chained_vdi, control_socket, served_site, write
from tests.system.site import MIB, Site, Vdi


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with served_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
def descriptions(site: Site) -> Descriptions:
    return Descriptions(control_socket(site), lambda: None)


def exported(site: Site, vdi: Vdi, image_format: str) -> int:
    """The length that HEAD tells."""
    url = site.export_url(vdi, format=image_format)
    command = ["curl", "-sS", "--fail", "--head", "-o", "/dev/null", "-w", "%header{content-length}", url]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_the_sizes_are_those_of_the_exports_over_http(
    site: Site, descriptions: Descriptions, image_format: str
) -> None:
    vdi = await trio.to_thread.run_sync(partial(chained_vdi, site, 13 * MIB + 1536, image_format))
    told = await descriptions.describe(vdi.uuid)
    assert site.gateway.call("VDI.get_current_operations", vdi.ref) == {}
    assert told.size == vdi.size == exported(site, vdi, "raw")
    assert told.vhd_size == exported(site, vdi, "vhd")
    assert told.qcow2_size == exported(site, vdi, "qcow2")
    assert 0 < told.stored_bytes <= vdi.size


async def test_a_description_is_known_until_it_is_forgotten(site: Site, descriptions: Descriptions) -> None:
    vdi = site.create_vdi(8 * MIB)
    assert descriptions.known(vdi.uuid) is None
    before = await descriptions.describe(vdi.uuid)
    assert before.stored_bytes == 0
    write(site, vdi, 5 * MIB, b"x")
    assert await descriptions.describe(vdi.uuid) is descriptions.known(vdi.uuid) is before
    descriptions.forget(vdi.uuid)
    assert descriptions.known(vdi.uuid) is None
    assert descriptions.last_known(vdi.uuid) is before
    after = await descriptions.describe(vdi.uuid)
    assert after.stored_bytes == 2 * MIB
    assert after.vhd_size > before.vhd_size
    assert after.content_id != before.content_id
    descriptions.remove(vdi.uuid)
    assert descriptions.last_known(vdi.uuid) is None


async def test_a_disk_that_is_written_to_is_described_as_it_is(
    site: Site, descriptions: Descriptions
) -> None:
    vdi = site.create_vdi(8 * MIB)
    writer = open_vdi(control_socket(site), vdi.uuid, write=True)
    writer.pwrite(b"x", 0)
    writer.flush()
    assert (await descriptions.describe(vdi.uuid)).stored_bytes == 2 * MIB
    writer.close()


async def test_a_disk_that_no_vhd_can_hold_has_none(site: Site, descriptions: Descriptions) -> None:
    vdi = site.create_vdi(3 << 40, "raw")
    told = await descriptions.describe(vdi.uuid)
    assert (told.size, told.vhd_size, told.stored_bytes) == (3 << 40, 0, 0)
    assert told.qcow2_size > 0


async def test_what_cannot_be_opened_is_not_described(site: Site, descriptions: Descriptions) -> None:
    with pytest.raises(AccessRefused, match="UUID_INVALID"):
        await descriptions.describe("4c5b3d6e-0000-0000-0000-000000000000")
    vdi = site.create_vdi()
    vdi.file.write_bytes(b"no image")
    with pytest.raises(AccessRefused, match="VDI_IO_ERROR"):
        await descriptions.describe(vdi.uuid)
    assert descriptions.known(vdi.uuid) is None


async def test_without_a_gateway_the_reason_comes_at_once(tmp_path: Path) -> None:
    descriptions = Descriptions(str(tmp_path / "none.sock"), lambda: None)
    with pytest.raises(FileNotFoundError):
        await descriptions.describe("any")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    """A gateway whose answers come when a test says so."""
    source = Source()

    def describe(control_socket: str, vdi: str, session: str | None) -> Described:
        return Described(trio.from_thread.run(source.ask, vdi), FileIdentity(1, 1), 1, 1, 1, 1)

    monkeypatch.setattr(module, "describe_vdi", describe)
    return source


def contents(askers: Askers[Description]) -> list[str]:
    return [told.content_id for told in askers.outcomes if isinstance(told, Description)]


async def test_equal_questions_on_their_way_are_one(source: Source) -> None:
    async with asking(Descriptions("", lambda: None).describe) as askers:
        await askers.more(*["a"] * 5)
        await source.until_asked(1)
        source.gates[0].set()
    assert contents(askers) == ["a 0"] * 5
    assert len(source.asked) == 1


async def test_an_answer_from_before_a_change_is_not_kept(source: Source) -> None:
    descriptions = Descriptions("", lambda: None)
    async with asking(descriptions.describe) as askers:
        await askers.more("a")
        await source.until_asked(1)
        descriptions.forget("a")
        await askers.more("a")
        await source.until_asked(2)
        source.gates[1].set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        source.gates[0].set()
    assert contents(askers) == ["a 0", "a 1"]
    known = descriptions.known("a")
    assert known is not None
    assert known.content_id == "a 1"


async def test_a_failure_is_told_to_all_who_wait_and_not_kept(source: Source) -> None:
    descriptions = Descriptions("", lambda: None)
    source.failure = failure = AccessRefused(Refused("VDI_IO_ERROR", (), "broken"))
    async with asking(descriptions.describe) as askers:
        await askers.more("a", "a", "a")
        await source.until_asked(1)
        source.gates[0].set()
    assert askers.outcomes == [failure] * 3
    source.failure = None
    async with asking(descriptions.describe) as askers:
        await askers.more("a")
        await source.until_asked(2)
        source.gates[1].set()
    assert descriptions.known("a") is not None


async def test_who_asked_and_is_cancelled_leaves_the_question_to_the_next(source: Source) -> None:
    descriptions = Descriptions("", lambda: None)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            nursery.start_soon(descriptions.describe, "a")
            await descriptions.describe("a")
        await source.until_asked(1)
        source.gates[0].set()
    assert scope.cancelled_caught
    assert descriptions.known("a") is not None
