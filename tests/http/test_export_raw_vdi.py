"""GET and HEAD /export_raw_vdi: bytes, ranges, tags, tasks, and clients that go or stop."""

import os
import socket
import ssl
import struct

import pytest
import structlog
import trio

from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI
from gateway.core.tasks import TaskStatus
from tests.http.gate import MIB, Answer, Gate, until
from tests.http.test_refusals import UNKNOWN, basic

DATA = os.urandom(MIB) + bytes(2 * MIB) + os.urandom(100) + bytes(70_000) + os.urandom(MIB - 70_100)


async def filled(gate: Gate, image_format: str = "vhd", data: bytes = DATA) -> VDI:
    vdi = await gate.vdi(len(data), image_format)
    assert (await gate.ask("PUT", gate.target(vdi), body=data)).whole
    return gate.inventory.records.vdis.get(vdi.ref)


async def get(gate: Gate, vdi: VDI, **headers: str) -> Answer:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return await gate.ask("GET", gate.target(vdi, "export_raw_vdi"), given)


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
@pytest.mark.parametrize("encrypted", [False, True])
async def test_the_whole_disk_under_a_task(
    gate: Gate, trust: ssl.SSLContext, image_format: str, encrypted: bool
) -> None:
    vdi = await filled(gate, image_format)
    target = gate.target(vdi, "export_raw_vdi", format="raw")
    answer = await gate.ask("GET", target, trust=trust if encrypted else None)
    assert answer.status == 200
    assert answer.body == DATA
    assert answer.headers["content-length"] == str(4 * MIB)
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == f'attachment; filename="{vdi.uuid}.raw"'
    ref = answer.headers["task-id"]
    await gate.ended(ref)
    assert gate.tasks.get(ref).status is TaskStatus.SUCCESS


async def test_an_empty_disk_is_all_holes(gate: Gate, trust: ssl.SSLContext) -> None:
    vdi = await gate.vdi(40 * MIB)
    for context in (None, trust):
        target = gate.target(vdi, "export_raw_vdi")
        assert (await gate.ask("GET", target, trust=context)).body == bytes(40 * MIB)


async def test_head_says_what_get_would_without_a_task(gate: Gate) -> None:
    vdi = await filled(gate)
    before = len(gate.tasks.all())
    head = await gate.ask("HEAD", gate.target(vdi, "export_raw_vdi"))
    assert (head.status, head.headers["content-length"]) == (200, str(4 * MIB))
    assert len(gate.tasks.all()) == before
    assert head.headers["etag"] == (await get(gate, vdi)).headers["etag"]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=1000-", 1000, 4 * MIB),
        ("bytes=-1", 4 * MIB - 1, 4 * MIB),
        ("bytes=-99999999", 0, 4 * MIB),
        ("Bytes = 5-99999999999", 5, 4 * MIB),
        (f"bytes={MIB - 1}-{MIB}", MIB - 1, MIB + 1),
        (f"bytes={2 * MIB - 7}-{3 * MIB + 200}", 2 * MIB - 7, 3 * MIB + 201),
    ],
)
async def test_one_range(gate: Gate, asked: str, start: int, stop: int) -> None:
    vdi = await filled(gate)
    answer = await get(gate, vdi, range=asked)
    assert answer.status == 206
    assert answer.body == DATA[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{4 * MIB}"
    assert "task-id" not in answer.headers


@pytest.mark.parametrize("asked", ["bytes=4194304-", "bytes=-0", "bytes=4194304-5000000"])
async def test_a_range_outside_is_416(gate: Gate, asked: str) -> None:
    answer = await get(gate, await filled(gate), range=asked)
    assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{4 * MIB}")


@pytest.mark.parametrize("asked", ["bytes=5-3", "bytes=-", "lines=1-2", "bytes=0-1,5-6", "bytes=x-", "7"])
async def test_a_range_that_is_none_or_several_gets_the_whole(gate: Gate, asked: str) -> None:
    answer = await get(gate, await filled(gate), range=asked)
    assert (answer.status, answer.body) == (200, DATA)


async def test_if_range_and_if_none_match(gate: Gate) -> None:
    vdi = await filled(gate)
    tag = (await get(gate, vdi)).headers["etag"]
    assert (await get(gate, vdi, range="bytes=0-9", if_range=tag)).status == 206
    for other in (f"W/{tag}", '"other"', "Sat, 29 Oct 1994 19:43:31 GMT"):
        assert (await get(gate, vdi, range="bytes=0-9", if_range=other)).status == 200
    for same in (tag, f'"x", {tag}', f"W/{tag}", "*"):
        answer = await get(gate, vdi, if_none_match=same)
        assert (answer.status, answer.headers["etag"]) == (304, tag)
    assert (await get(gate, vdi, if_none_match='"x"')).status == 200


async def test_one_connection_serves_range_after_range(gate: Gate) -> None:
    vdi = await filled(gate)
    async with gate.client() as client:
        for start in (0, 5, MIB, 3 * MIB):
            target = gate.target(vdi, "export_raw_vdi")
            await client.head("GET", target, {"range": f"bytes={start}-{start + 99}"})
            assert (await client.answer()).body == DATA[start : start + 100]


async def test_a_task_of_the_client_is_used_for_a_range_too(gate: Gate) -> None:
    vdi, task = await filled(gate), await gate.task()
    target = gate.target(vdi, "export_raw_vdi", task_id=task.ref)
    answer = await gate.ask("GET", target, {"range": "bytes=0-9"})
    assert answer.headers["task-id"] == task.ref
    await gate.ended(task.ref)
    assert gate.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_no_credentials_are_challenged_and_wrong_ones_are_403(gate: Gate) -> None:
    vdi = await gate.vdi()
    target = gate.target(vdi, "export_raw_vdi", session_id="")
    answer = await gate.ask("GET", target)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Basic realm="VDI Gateway"')
    for headers in (basic("root", "wrong"), {"authorization": "Basic !"}, basic("reader", "secret")):
        assert (await gate.ask("GET", target, headers)).status == 403
    assert (await gate.ask("GET", target, basic("alice", "secret"))).status == 200


@pytest.mark.parametrize(("vdi", "parameters", "status"), [("", {}, 500), (UNKNOWN, {}, 500)])
async def test_what_is_not_there(gate: Gate, vdi: str, parameters: dict[str, str], status: int) -> None:
    task = await gate.task()
    target = gate.target(vdi, "export_raw_vdi", task_id=task.ref, **parameters)
    assert (await gate.ask("GET", target)).status == status
    assert gate.tasks.get(task.ref).status is TaskStatus.FAILURE


async def test_unknown_formats_are_404(gate: Gate) -> None:
    target = gate.target(await gate.vdi(), "export_raw_vdi", format="qcow3")
    assert (await gate.ask("GET", target)).status == 404


async def test_a_disk_that_is_written_in_place_is_409_and_a_snapshot_is_readable(gate: Gate) -> None:
    vdi, snapshot = await gate.vdi(), await gate.vdi(is_a_snapshot=True)
    lease = await gate.inventory.lease(vdi, LeaseMode.WRITE, Holder("test", "nbd", vdi.ref))
    assert (await gate.ask("GET", gate.target(vdi, "export_raw_vdi"))).status == 409
    lease.release()
    await lease.released()
    assert (await gate.ask("GET", gate.target(vdi, "export_raw_vdi"))).status == 200
    assert (await gate.ask("GET", gate.target(snapshot, "export_raw_vdi"))).status == 200


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_dropped_download_cancels_its_task_quietly_and_frees_the_disk(
    gate: Gate, trust: ssl.SSLContext, encrypted: bool
) -> None:
    vdi = await gate.vdi(1 << 30)
    async with gate.client(trust if encrypted else None) as client:
        await client.head("GET", gate.target(vdi, "export_raw_vdi"))
        _, headers = await client.answer_head()
        await client.answer_body(100_000)
    ref = headers["task-id"]
    await gate.ended(ref)
    assert gate.tasks.get(ref).status is TaskStatus.CANCELLED
    lease = await gate.inventory.lease(vdi, LeaseMode.WRITE, Holder("test", "destroy", vdi.ref))
    lease.release()
    await lease.released()


async def test_a_client_that_goes_before_the_head_is_no_failure_of_the_gateway(gate: Gate) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    writer = await gate.inventory.lease(vdi, LeaseMode.WRITE, Holder("test", "nbd", vdi.ref))
    with structlog.testing.capture_logs() as logs:
        async with gate.client() as client:
            await client.head("GET", gate.target(vdi, "export_raw_vdi", task_id=task.ref))
            assert isinstance(client.stream, trio.SocketStream)
            client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await until(lambda: gate.services.slots.borrowed_tokens == 1)
        writer.release()
        ended = await gate.ended(task.ref)
        await until(lambda: not gate.server.connection_count)
    assert ended.status is TaskStatus.CANCELLED
    assert not [entry for entry in logs if entry["log_level"] == "error"], logs


async def test_a_client_that_stops_reading_is_cut_off(gate: Gate) -> None:
    object.__setattr__(gate.services.limits, "transfer_idle", 0.2)
    vdi = await gate.vdi(1 << 30)
    async with gate.client() as client:
        await client.head("GET", gate.target(vdi, "export_raw_vdi"))
        _, headers = await client.answer_head()
        await gate.ended(headers["task-id"])
        assert gate.tasks.get(headers["task-id"]).error_info == ("EXPORT_ERROR_CLIENT_STALLED", "0.2")
        assert len(await client.rest()) < 1 << 30


async def test_cancelling_the_task_breaks_the_download_off(gate: Gate) -> None:
    vdi, task = await gate.vdi(1 << 30), await gate.task()
    async with gate.client() as client:
        await client.head("GET", gate.target(vdi, "export_raw_vdi", task_id=task.ref))
        await client.answer_head()
        await gate.tasks.cancel(task.ref)
        assert len(await client.rest()) < 1 << 30
    await gate.ended(task.ref)
    assert gate.tasks.get(task.ref).status is TaskStatus.CANCELLED


async def test_a_task_that_is_cancelled_while_the_disk_is_waited_for_is_told(gate: Gate) -> None:
    object.__setattr__(gate.services.limits, "lease_wait", 30.0)
    vdi, task = await gate.vdi(), await gate.task()
    writer = await gate.inventory.lease(vdi, LeaseMode.WRITE, Holder("test", "nbd", vdi.ref))
    async with gate.client() as client:
        await client.head("GET", gate.target(vdi, "export_raw_vdi", task_id=task.ref))
        await until(lambda: writer.wanted)
        await gate.tasks.cancel(task.ref)
        writer.release()
        answer = await client.answer()
    assert (answer.status, answer.text.partition(":")[0]) == (409, "TASK_CANCELLED")


async def test_a_tag_is_never_sent_with_the_bytes_of_another_content(gate: Gate) -> None:
    """A reader comes between the rename of the file and the new content id."""
    vdi, new = await filled(gate), os.urandom(4 * MIB)
    old_tag = (await get(gate, vdi)).headers["etag"]
    answers: list[Answer] = []
    changed = gate.inventory.vdi_changed

    async def changed_late(ref: str) -> None:
        async def read() -> None:
            answers.append(await get(gate, vdi, range="bytes=0-99"))

        nursery.start_soon(read)
        await trio.sleep(0.1)
        assert not answers
        await changed(ref)

    async with trio.open_nursery() as nursery:
        object.__setattr__(gate.inventory, "vdi_changed", changed_late)
        assert (await gate.ask("PUT", gate.target(vdi), body=new)).whole
    (answer,) = answers
    assert answer.body == new[:100]
    assert answer.headers["etag"] != old_tag
