"""GET /export_raw_vdi with If-Match, and what a range outside of the disk does to its task."""

import os

import pytest

from gateway.core.database import DatabaseFailed
from gateway.core.tasks import TaskStatus
from gateway.images.chain import open_chain_files, open_disk
from tests.http.gate import MIB, Gate

DATA = os.urandom(2 * MIB)


async def tagged(gate: Gate, image_format: str) -> tuple[str, str]:
    """The target of a new disk's export, and the ETag."""
    vdi = await gate.vdi(len(DATA))
    assert (await gate.ask("PUT", gate.target(vdi), body=DATA)).whole
    target = gate.target(vdi, "export_raw_vdi", format=image_format)
    return target, (await gate.ask("HEAD", target)).headers["etag"]


@pytest.mark.parametrize("image_format", ["raw", "vhd", "qcow2"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_download_of_what_was_there_before_gets_nothing_of_the_present_content(
    gate: Gate, image_format: str, method: str
) -> None:
    target, tag = await tagged(gate, image_format)
    for other in ('"other"', f"W/{tag}", '"a", "b"', tag.strip('"')):
        answer = await gate.ask(method, target, {"range": "bytes=9-", "if-match": other})
        assert (answer.status, answer.headers["etag"]) == (412, tag)
        assert DATA[9:100] not in answer.body


@pytest.mark.parametrize("image_format", ["raw", "vhd", "qcow2"])
async def test_a_download_of_the_present_content_goes_on(gate: Gate, image_format: str) -> None:
    target, tag = await tagged(gate, image_format)
    for same in (tag, f'"other", {tag}', "*"):
        answer = await gate.ask("GET", target, {"range": "bytes=9-99", "if-match": same})
        assert (answer.status, len(answer.body)) == (206, 91)


@pytest.mark.parametrize("headers", [{"range": "bytes=9999999999-"}, {"if-match": '"other"'}])
async def test_the_task_of_a_refused_range_has_failed(gate: Gate, headers: dict[str, str]) -> None:
    target, _ = await tagged(gate, "qcow2")
    task = await gate.task()
    answer = await gate.ask("GET", f"{target}&task_id={task.ref}", headers)
    assert answer.status in (412, 416)
    [name] = headers
    ended = await gate.ended(task.ref)
    assert (ended.status, ended.error_info[:2]) == (TaskStatus.FAILURE, ("VALUE_NOT_SUPPORTED", name))


async def test_a_disk_whose_new_content_cannot_be_written_down_has_another_tag_all_the_same(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, tag = await tagged(gate, "raw")
    [vdi] = gate.inventory.records.vdis.all()

    async def no_space(_work: object) -> None:
        raise DatabaseFailed("(database or disk is full)")

    other = os.urandom(2 * MIB)
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi), {"content-length": str(len(other))})
        await client.answer_head()
        await client.send(other[:-1])
        monkeypatch.setattr(gate.inventory.records.vdis._database, "run", no_space)
        await client.send(other[-1:])
        assert b"database or disk is full" in await client.rest()
    monkeypatch.undo()
    answer = await gate.ask("GET", target, {"range": "bytes=9-99", "if-range": tag})
    assert (answer.status, answer.body) == (200, other)
    assert answer.headers["etag"] != tag


@pytest.mark.parametrize("image_format", ["raw", "vhd", "qcow2"])
async def test_a_disk_that_another_program_has_written_to_has_another_tag_before_any_scan(
    gate: Gate, image_format: str
) -> None:
    """As XenServer, another gateway or a qemu-img by hand do where the SR is read-only here."""
    target, tag = await tagged(gate, image_format)
    [vdi] = gate.inventory.records.vdis.all()
    path = gate.inventory.repository_of(vdi.ref).image_path(vdi.uuid)
    disk = open_disk(open_chain_files(path, writable=True), read_only=False)
    disk.pwrite(bytes(512), MIB)
    disk.close()
    os.utime(path)  # the clock of the file system may not have gone on since the upload
    resumed = await gate.ask("GET", target, {"range": f"bytes={MIB}-", "if-match": tag})
    assert resumed.status == 412
    assert (await gate.ask("GET", target, {"if-none-match": tag})).status == 200
    head = await gate.ask("HEAD", target)
    assert head.headers["etag"] == resumed.headers["etag"] != tag
