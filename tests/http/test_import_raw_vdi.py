"""PUT /import_raw_vdi: what the body becomes, what the answer says, what the task says."""

import errno
import os
import socket
import ssl
import struct
from pathlib import Path

import pytest
import trio

from gateway.core.leases import Holder, LeaseMode
from gateway.core.tasks import TaskStatus
from gateway.http.import_raw_vdi import LAST_LINE_BYTES
from gateway.images.files import Buffer, FileCalls
from tests.http.gate import MIB, Gate, open_gate, until


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_a_whole_disk_is_there_when_the_answer_ends(gate: Gate, image_format: str) -> None:
    vdi, data, task = await gate.vdi(image_format=image_format), os.urandom(4 * MIB), await gate.task()
    answer = await gate.ask("PUT", gate.target(vdi, task_id=task.ref), body=data)
    assert answer.status == 200
    assert answer.whole
    assert len(answer.body) == LAST_LINE_BYTES
    assert answer.text.startswith("success") and answer.text.endswith("\n")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["connection"] == "close"
    assert answer.headers["task-id"] == task.ref
    ended = gate.tasks.get(task.ref)
    assert (ended.status, ended.progress, ended.result) == (
        TaskStatus.SUCCESS,
        1.0,
        f"<value>{vdi.ref}</value>",
    )
    assert gate.content(vdi) == data
    assert gate.staged() == []
    assert gate.inventory.records.vdis.get(vdi.ref).content_id != vdi.content_id


async def test_a_whole_disk_over_tls(gate: Gate, trust: ssl.SSLContext) -> None:
    vdi, data = await gate.vdi(), os.urandom(4 * MIB)
    answer = await gate.ask("PUT", gate.target(vdi), body=data, trust=trust)
    assert answer.whole
    assert gate.tasks.get(answer.headers["task-id"]).status is TaskStatus.SUCCESS
    assert gate.content(vdi) == data


async def test_continue_comes_before_the_answer(gate: Gate) -> None:
    vdi = await gate.vdi()
    async with gate.client() as client:
        length = str(vdi.virtual_size)
        await client.head("PUT", gate.target(vdi), {"content-length": length, "expect": "100-continue"})
        assert (await client.answer()).status == 100
        status, _ = await client.answer_head()
        assert status == 200


async def test_zeroes_are_not_stored_and_a_tail_of_any_length_is(gate: Gate) -> None:
    vdi = await gate.vdi(64 * MIB)
    data = bytes(8 * MIB) + b"\x01" + bytes(40 * MIB) + b"\x02\x03"
    answer = await gate.ask("PUT", gate.target(vdi), body=data)
    assert answer.whole, answer.text
    assert gate.content(vdi) == data + bytes(64 * MIB - len(data))
    path = gate.inventory.repository_of(vdi.ref).image_path(vdi.uuid)
    assert os.stat(path).st_blocks * 512 < MIB


async def test_a_shorter_body_leaves_the_rest_of_the_disk(gate: Gate) -> None:
    vdi, old = await gate.vdi(), os.urandom(4 * MIB)
    assert (await gate.ask("PUT", gate.target(vdi), body=old)).whole
    new = os.urandom(MIB) + bytes(MIB) + os.urandom(777)
    assert (await gate.ask("PUT", gate.target(vdi), body=new)).whole
    assert gate.content(vdi) == new + old[len(new) :]


@pytest.mark.parametrize("headers", [{}, {"content-length": str(1 << 50)}, {"content-length": str(1 << 60)}])
@pytest.mark.parametrize("ending", ["end of file", "silence"])
async def test_a_body_without_length_ends_with_the_disk(
    gate: Gate, headers: dict[str, str], ending: str
) -> None:
    vdi, data = await gate.vdi(), os.urandom(4 * MIB)
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi), headers, version="1.1" if headers else "1.0")
        status, answered = await client.answer_head()
        assert status == 200
        await client.send(data)
        if ending == "end of file":
            await client.half_close()
        assert len(await client.answer_body(LAST_LINE_BYTES)) == LAST_LINE_BYTES
    assert gate.tasks.get(answered["task-id"]).status is TaskStatus.SUCCESS
    assert gate.content(vdi) == data


async def test_a_body_that_came_with_the_head_counts(gate: Gate) -> None:
    vdi, data = await gate.vdi(), os.urandom(4 * MIB)
    async with gate.client() as client:
        head = f"PUT {gate.target(vdi)} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(data)}\r\n\r\n"
        await client.send(head.encode() + data)
        assert (await client.answer()).whole
    assert gate.content(vdi) == data


@pytest.mark.parametrize(
    ("length", "sent", "error"),
    [
        ("4194304", 3 * MIB, ["IMPORT_ERROR_PREMATURE_EOF", "4194304", "3145728"]),
        ("1048576", 3, ["IMPORT_ERROR_PREMATURE_EOF", "1048576", "3"]),
        (None, MIB, ["IMPORT_ERROR_LENGTH_REQUIRED", "4194304", "1048576"]),
        (str(1 << 50), 0, ["IMPORT_ERROR_LENGTH_REQUIRED", "4194304", "0"]),
        (None, 4 * MIB + 1, ["VDI_TOO_SMALL", "VDI", "4194304"]),
        ("4194305", 0, ["VDI_TOO_SMALL", "VDI", "4194304"]),
        (str((1 << 50) - 1), 0, ["VDI_TOO_SMALL", "VDI", "4194304"]),
    ],
)
async def test_a_body_of_the_wrong_length_fails_and_changes_nothing(
    gate: Gate, length: str | None, sent: int, error: list[str]
) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    async with gate.client() as client:
        headers = {} if length is None else {"content-length": length}
        await client.head("PUT", gate.target(vdi, task_id=task.ref), headers)
        status, answered = await client.answer_head()
        assert status == 200
        await client.send(b"\x55" * sent)
        await client.half_close()
        line = await client.rest()
    assert int(answered["content-length"]) == LAST_LINE_BYTES
    assert 0 < len(line) < LAST_LINE_BYTES
    assert line.startswith(b"failure " + error[0].encode())
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    ended = gate.tasks.get(task.ref)
    assert ended.status is TaskStatus.FAILURE
    assert list(ended.error_info) == [vdi.ref if part == "VDI" else part for part in error]
    assert gate.content(vdi) == bytes(vdi.virtual_size)
    assert gate.staged() == []


async def test_too_long_a_body_fails_before_it_was_sent_and_the_client_hears_it(gate: Gate) -> None:
    vdi = await gate.vdi()
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi), {"content-length": str(6 * MIB)})
        await client.send(bytes(6 * MIB))
        answer = await client.answer()
    assert not answer.whole
    assert answer.text.startswith("failure VDI_TOO_SMALL")


class Failing(FileCalls):
    """The file calls of an SR that fail from the moment they are told to."""

    def __init__(self) -> None:
        self.write_error = self.sync_error = 0

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        if self.write_error and len(data) > 4096:
            raise OSError(self.write_error, os.strerror(self.write_error))
        super().pwrite(fd, data, offset)

    def sync(self, fd: int) -> None:
        if self.sync_error:
            raise OSError(self.sync_error, os.strerror(self.sync_error))
        super().sync(fd)


@pytest.mark.parametrize(
    ("when", "number", "code"),
    [
        ("write_error", errno.ENOSPC, "SR_FULL"),
        ("write_error", errno.EDQUOT, "SR_FULL"),
        ("write_error", errno.EIO, "VDI_IO_ERROR"),
        ("sync_error", errno.ENOSPC, "SR_FULL"),
        ("sync_error", errno.EIO, "VDI_IO_ERROR"),
    ],
)
async def test_failing_storage_has_its_code_and_keeps_the_old_content(
    tmp_path: Path, when: str, number: int, code: str
) -> None:
    files = Failing()
    async with open_gate(tmp_path, files=files) as gate:
        vdi, old, task = await gate.vdi(), os.urandom(4 * MIB), await gate.task()
        assert (await gate.ask("PUT", gate.target(vdi), body=old)).whole
        setattr(files, when, number)
        answer = await gate.ask("PUT", gate.target(vdi, task_id=task.ref), body=os.urandom(4 * MIB))
        assert not answer.whole
        assert answer.text.startswith(f"failure {code}: ")
        assert gate.tasks.get(task.ref).error_info[0] == code
        setattr(files, when, 0)
        assert gate.content(vdi) == old
        assert gate.staged() == []


async def test_a_stalled_client_is_given_up(gate: Gate) -> None:
    object.__setattr__(gate.services.limits, "transfer_idle", 0.2)
    vdi, task = await gate.vdi(), await gate.task()
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, task_id=task.ref), {"content-length": "4194304"})
        await client.send(b"\x55" * MIB)
        answer = await client.answer()
    assert answer.text.startswith("failure IMPORT_ERROR_CLIENT_STALLED")
    assert gate.tasks.get(task.ref).error_info == ("IMPORT_ERROR_CLIENT_STALLED", "0.2")
    assert gate.staged() == []


async def test_cancelling_the_task_ends_the_upload_and_tells_the_client(gate: Gate) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, task_id=task.ref), {"content-length": "4194304"})
        await client.send(b"\x55" * MIB)
        await until(lambda: gate.tasks.get(task.ref).progress >= 0.25)
        await gate.tasks.cancel(task.ref)
        answer = await client.answer()
    assert not answer.whole
    assert answer.text.startswith("failure TASK_CANCELLED")
    assert gate.tasks.get(task.ref).status is TaskStatus.CANCELLED
    assert gate.staged() == []
    assert (await gate.ask("PUT", gate.target(vdi), body=bytes(4 * MIB))).whole


async def test_a_reset_during_the_body_fails_the_task(gate: Gate) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, task_id=task.ref), {"content-length": "4194304"})
        await client.answer_head()
        await client.send(b"\x55" * MIB)
        await until(lambda: gate.tasks.get(task.ref).progress >= 0.25)
        assert isinstance(client.stream, trio.SocketStream)
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await gate.ended(task.ref)
    assert gate.tasks.get(task.ref).error_info == ("IMPORT_ERROR_PREMATURE_EOF", "4194304", "1048576")


async def test_tls_that_ends_without_close_notify_is_an_end_of_file(
    gate: Gate, trust: ssl.SSLContext
) -> None:
    vdi, data = await gate.vdi(), os.urandom(4 * MIB)
    async with gate.client(trust) as client:
        await client.head("PUT", gate.target(vdi), version="1.0")
        _, answered = await client.answer_head()
        await client.send(data)
        assert isinstance(client.stream, trio.SSLStream)
        await client.stream.transport_stream.send_eof()
        ref = answered["task-id"]
        await gate.ended(ref)
    assert gate.tasks.get(ref).status is TaskStatus.SUCCESS
    assert gate.content(vdi) == data


async def test_a_probe_of_no_bytes_changes_nothing(gate: Gate) -> None:
    vdi = await gate.vdi()
    before = gate.tasks.all()
    for path in ("/import_raw_vdi/?", "/import_raw_vdi?"):
        answer = await gate.ask("PUT", gate.target(vdi).replace("/import_raw_vdi?", path))
        assert (answer.status, answer.whole) == (200, True)
    assert gate.tasks.all() == before
    assert gate.inventory.records.vdis.get(vdi.ref) == vdi


async def test_two_imports_into_one_disk_exclude_each_other_and_others_do_not(gate: Gate) -> None:
    vdi, other = await gate.vdi(), await gate.vdi()
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi), {"content-length": "4194304"})
        assert (await client.answer_head())[0] == 200
        second = await gate.ask("PUT", gate.target(vdi), body=bytes(MIB))
        assert second.status == 409
        assert second.text.startswith("VDI_IN_USE: ")
        assert (await gate.ask("PUT", gate.target(other), body=bytes(4 * MIB))).whole
        await client.send(bytes(4 * MIB))
        assert len(await client.answer_body(LAST_LINE_BYTES)) == LAST_LINE_BYTES


async def test_what_has_become_longer_while_an_upload_waited_keeps_its_rest(gate: Gate) -> None:
    """By a revert that was there before it: the upload isn't one of the whole disk any more."""
    inventory, data, longer = gate.inventory, os.urandom(4 * MIB), os.urandom(8 * MIB)
    object.__setattr__(gate.services.limits, "lease_wait", 30.0)
    vdi = await gate.vdi()
    short = await inventory.vdi_snapshot(vdi.ref)
    await inventory.vdi_resize(vdi.ref, 8 * MIB)
    assert (await gate.ask("PUT", gate.target(vdi), body=longer)).whole
    long = await inventory.vdi_snapshot(vdi.ref)
    await inventory.vdi_revert(short)
    writer = await inventory.lease(vdi.ref, LeaseMode.WRITE, Holder("root", "write", vdi.ref))

    async def upload() -> None:
        assert (await gate.ask("PUT", gate.target(vdi), body=data)).whole

    async with trio.open_nursery() as nursery:
        nursery.start_soon(inventory.vdi_revert, long)
        await until(lambda: inventory.leases._table.waiting == 1)
        nursery.start_soon(upload)
        await until(lambda: inventory.leases._table.waiting == 2)
        writer.release()
    assert gate.content(vdi) == data + longer[4 * MIB :]


async def test_readers_keep_the_old_version(gate: Gate) -> None:
    vdi, old, new = await gate.vdi(16 * MIB), os.urandom(16 * MIB), os.urandom(16 * MIB)
    assert (await gate.ask("PUT", gate.target(vdi), body=old)).whole
    async with gate.client() as reader:
        await reader.head("GET", gate.target(vdi, "export_raw_vdi"))
        _, headers = await reader.answer_head()
        assert (await gate.ask("PUT", gate.target(vdi), body=new)).whole
        assert await reader.answer_body(16 * MIB) == old
    after = await gate.ask("GET", gate.target(vdi, "export_raw_vdi"))
    assert after.body == new
    assert after.headers["etag"] != headers["etag"]


async def test_a_stopping_gateway_ends_an_upload_after_its_grace(gate: Gate) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, task_id=task.ref), {"content-length": "4194304"})
        await client.answer_head()
        gate.server.stop()
        assert len(await client.rest()) < LAST_LINE_BYTES
    assert gate.tasks.get(task.ref).status.is_final
    assert gate.staged() == []
