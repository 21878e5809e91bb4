"""What is refused before the body: status, line and task, and that a client that streams on hears it."""

import base64
import contextlib
import errno
import os
import sqlite3
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from gateway.core.records import PBD, SR, Host
from gateway.core.refs import new_ref, new_uuid
from gateway.core.tasks import TaskStatus
from gateway.http.disk_request import location
from gateway.http.request import parse_head
from tests.http.gate import MIB, Gate, open_gate, until

UNKNOWN = "1b2e7f0c-7a51-4a52-8e0c-2c1f6a3f6a10"


def basic(user: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


async def refused(
    gate: Gate, status: int, code: str, target: str, headers: dict[str, str] | None = None
) -> None:
    answer = await gate.ask("PUT", target, headers, b"\x55" * 100)
    assert (answer.status, answer.text.partition(":")[0]) == (status, code)
    assert answer.text.count("\n") == 1 and answer.text.endswith("\n")
    assert answer.headers["content-type"] == "text/plain"
    assert answer.headers["connection"] == "close"
    assert answer.whole


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic"},
        {"authorization": "Bearer abc"},
        {"authorization": "Basic " + base64.b64encode(b"nocolon").decode()},
        {"cookie": "session_id="},
        basic("root", "wrong"),
        basic("nobody", "secret"),
    ],
)
async def test_what_cannot_be_verified_is_403_and_touches_no_task(
    gate: Gate, headers: dict[str, str]
) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    target = gate.target(vdi, session_id="", task_id=task.ref)
    await refused(gate, 403, "SESSION_AUTHENTICATION_FAILED", target, headers)
    assert gate.tasks.get(task.ref).status is TaskStatus.PENDING


async def test_an_unknown_session_is_403_even_beside_a_right_password(gate: Gate) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    target = gate.target(vdi, session_id="OpaqueRef:" + UNKNOWN, task_id=task.ref)
    await refused(gate, 403, "SESSION_INVALID", target, basic("root", "secret"))
    assert gate.tasks.get(task.ref).status is TaskStatus.PENDING


async def test_too_low_a_role_is_403_and_fails_the_users_own_task(gate: Gate) -> None:
    vdi, own, others = await gate.vdi(), await gate.task("reader"), await gate.task("alice")
    for task in (own, others):
        target = gate.target(vdi, session_id="", task_id=task.ref)
        await refused(gate, 403, "RBAC_PERMISSION_DENIED", target, basic("reader", "secret"))
    assert gate.tasks.get(own.ref).error_info[0] == "RBAC_PERMISSION_DENIED"
    assert gate.tasks.get(others.ref).status is TaskStatus.PENDING


@pytest.mark.parametrize("name", ["root", "alice"])
async def test_basic_credentials_of_a_role_that_is_high_enough_will_do(gate: Gate, name: str) -> None:
    vdi = await gate.vdi()
    target = gate.target(vdi, session_id="")
    assert (await gate.ask("PUT", target, basic(name, "secret"), bytes(4 * MIB))).whole


@pytest.mark.parametrize(
    "cookies",
    [
        "vdi={vdi};session_id={s};task_id={t}",
        "x=1; vdi={vdi}; session_id={s} ;task_id={t}",
        "vdi={vdi}&session_id={s}&task_id={t}",
        "vdi={quoted};session_id={s};task_id={t}",
    ],
)
async def test_parameters_may_come_as_cookies(gate: Gate, cookies: str) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    quoted = vdi.ref.replace(":", "%3a")
    header = cookies.format(vdi=vdi.ref, quoted=quoted, s=gate.session, t=task.ref)
    answer = await gate.ask("PUT", "/import_raw_vdi", {"cookie": header}, bytes(4 * MIB))
    assert answer.whole, answer.text
    assert answer.headers["task-id"] == task.ref


async def test_the_query_comes_before_the_cookie_and_the_first_of_two_counts(gate: Gate) -> None:
    vdi = await gate.vdi()
    target = gate.target(vdi) + "&vdi=" + UNKNOWN
    answer = await gate.ask("PUT", target, {"cookie": f"vdi={UNKNOWN}"}, bytes(4 * MIB))
    assert answer.whole, answer.text


@pytest.mark.parametrize(
    ("vdi", "status", "code"),
    [
        ("", 500, "VDI_NOT_NAMED"),
        (UNKNOWN, 500, "UUID_INVALID"),
        ("OpaqueRef:" + UNKNOWN, 500, "HANDLE_INVALID"),
        ("nonsense", 500, None),
    ],
)
async def test_no_or_an_unknown_vdi_is_500_and_fails_the_task(
    gate: Gate, vdi: str, status: int, code: str | None
) -> None:
    task = await gate.task()
    answer = await gate.ask("PUT", gate.target(vdi, task_id=task.ref), body=b"1")
    assert answer.status == status
    ended = gate.tasks.get(task.ref)
    assert ended.status is TaskStatus.FAILURE
    assert ended.error_info[0] == answer.text.partition(":")[0]
    assert code in {None, ended.error_info[0]}


async def test_unknown_task_is_500(gate: Gate) -> None:
    vdi = await gate.vdi()
    await refused(gate, 500, "HANDLE_INVALID", gate.target(vdi, task_id="OpaqueRef:" + UNKNOWN))
    await refused(gate, 500, "UUID_INVALID", gate.target(vdi, task_id=UNKNOWN))


async def test_another_users_task_is_403_and_stays_as_it_was(gate: Gate) -> None:
    vdi, task = await gate.vdi(), await gate.task("alice")
    await refused(gate, 403, "RBAC_PERMISSION_DENIED", gate.target(vdi, task_id=task.ref))
    assert gate.tasks.get(task.ref).status is TaskStatus.PENDING


async def test_a_task_that_has_ended_or_is_worked_on_is_409(gate: Gate) -> None:
    vdi, other, task = await gate.vdi(), await gate.vdi(), await gate.task()
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, task_id=task.ref), {"content-length": "4194304"})
        await client.answer_head()
        await until(lambda: gate.tasks.get(task.ref).worked_on)
        await refused(gate, 409, "OTHER_OPERATION_IN_PROGRESS", gate.target(other, task_id=task.ref))
        assert gate.tasks.get(task.ref).status is TaskStatus.PENDING
        await client.send(bytes(4 * MIB))
        await client.rest()
    await refused(gate, 409, "OPERATION_NOT_ALLOWED", gate.target(vdi, task_id=task.ref))
    assert gate.tasks.get(task.ref).status is TaskStatus.SUCCESS


async def test_a_format_that_a_script_has_lost_is_not_raw(gate: Gate) -> None:
    vdi = await gate.vdi()
    await refused(gate, 404, "IMPORT_ERROR_UNKNOWN_FORMAT", gate.target(vdi) + "&format=")
    answer = await gate.ask("GET", gate.target(vdi, "export_raw_vdi") + "&format=")
    assert (answer.status, answer.text.partition(":")[0]) == (404, "EXPORT_ERROR_UNKNOWN_FORMAT")
    target = gate.target(vdi) + "&format="
    answer = await gate.ask("PUT", target, {"cookie": "format=raw"}, bytes(vdi.virtual_size))
    assert answer.whole


@pytest.mark.parametrize("form", ["raw", "auto", "vhd", "chunked"])
async def test_a_part_of_a_disk_or_a_packed_one_is_not_taken_for_its_beginning(gate: Gate, form: str) -> None:
    vdi = await gate.vdi()
    for status, headers in (
        (400, {"content-range": "bytes 1048576-4194303/4194304"}),
        (415, {"content-encoding": "gzip"}),
        (415, {"content-type": 'Multipart/form-data; boundary="x"'}),
    ):
        task = await gate.task()
        target = gate.target(vdi, format=form, task_id=task.ref)
        await refused(gate, status, "VALUE_NOT_SUPPORTED", target, headers)
        assert gate.tasks.get(task.ref).error_info[:2] == ("VALUE_NOT_SUPPORTED", next(iter(headers)))
        assert gate.content(vdi) == bytes(vdi.virtual_size)
    answer = await gate.ask("PUT", gate.target(vdi), {"content-encoding": "identity"}, b"\x55" * 512)
    assert answer.whole


@pytest.mark.parametrize("coding", ["chunked", "gzip, chunked", "identity", "gzip", "x"])
async def test_any_transfer_encoding_is_403(gate: Gate, coding: str) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, task_id=task.ref), {"transfer-encoding": coding})
        answer = await client.answer()
    assert (answer.status, answer.text.partition(":")[0]) == (403, "IMPORT_ERROR_CANNOT_HANDLE_CHUNKED")
    assert gate.tasks.get(task.ref).error_info == ("IMPORT_ERROR_CANNOT_HANDLE_CHUNKED",)


async def test_format_is_raw_in_any_case_or_404(gate: Gate) -> None:
    vdi = await gate.vdi()
    assert (await gate.ask("PUT", gate.target(vdi, format="RaW"), body=bytes(4 * MIB))).whole
    await refused(gate, 404, "IMPORT_ERROR_UNKNOWN_FORMAT", gate.target(vdi, format="tar"))


async def test_chunks_and_deltas_are_never_taken_for_a_raw_disk(gate: Gate) -> None:
    vdi = await gate.vdi()
    for parameter in ("chunked=false", "chunked=0", "format=vhd&chunked", "base=" + UNKNOWN):
        await refused(gate, 404, "VALUE_NOT_SUPPORTED", f"{gate.target(vdi)}&{parameter}")


async def test_an_sr_for_a_new_vdi_has_to_be_known_here_and_writable(gate: Gate) -> None:
    await refused(gate, 500, "UUID_INVALID", gate.target(None, sr_uuid=UNKNOWN))
    await refused(gate, 500, "HANDLE_INVALID", gate.target(None, sr_id="OpaqueRef:" + UNKNOWN))
    await refused(gate, 404, "VALUE_NOT_SUPPORTED", gate.target(None, sr_id=gate.sr, virtual_size="1GiB"))
    gate.inventory.repository(gate.sr).writable = False
    await refused(gate, 409, "OPERATION_NOT_ALLOWED", gate.target(None, sr_id=gate.sr))


async def elsewhere(gate: Gate, address: str) -> str:
    """A VDI in an SR that only another host has; its reference."""
    records = gate.inventory.records
    vdi = await gate.vdi()
    host = await records.hosts.add(Host(ref=new_ref(), uuid=new_uuid(), address=address))
    sr = await records.srs.add(SR(ref=new_ref(), uuid=new_uuid()))
    await records.pbds.add(
        PBD(ref=new_ref(), uuid=new_uuid(), host=host.ref, sr=sr.ref, currently_attached=True)
    )
    there = await records.vdis.add(replace(vdi, ref=new_ref(), uuid=new_uuid(), sr=sr.ref))
    return there.ref


async def test_a_disk_of_another_host_is_302_with_the_query_and_the_task_goes_on(gate: Gate) -> None:
    vdi, task = await elsewhere(gate, "10.0.0.7:8443"), await gate.task()
    target = gate.target(vdi, task_id=task.ref).replace("/import_raw_vdi", "/import_raw_vdi/a%20b")
    for method in ("PUT", "GET"):
        asked = target if method == "PUT" else target.replace("import", "export")
        answer = await gate.ask(method, asked)
        assert answer.status == 302
        assert answer.headers["location"] == "http://10.0.0.7:8443" + asked
    assert gate.tasks.get(task.ref).status is TaskStatus.PENDING


async def test_the_redirection_keeps_the_scheme(gate: Gate, trust: ssl.SSLContext) -> None:
    vdi = await elsewhere(gate, "fd00::1")
    answer = await gate.ask("PUT", gate.target(vdi), trust=trust)
    assert answer.headers["location"].startswith("https://[fd00::1]/import_raw_vdi?")


@pytest.mark.parametrize(
    ("address", "authority"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("host.example:81", "host.example:81"),
        ("fd00::1", "[fd00::1]"),
        ("[fd00::1]", "[fd00::1]"),
        ("[fd00::1]:8080", "[fd00::1]:8080"),
    ],
)
def test_addresses_in_locations(address: str, authority: str) -> None:
    head = b"PUT /import_raw_vdi HTTP/1.0\r\n\r\n"
    request, _ = parse_head(head, scheme="http", address="1.2.3.4", largest=1000)
    assert location(request, address) == f"http://{authority}/import_raw_vdi"


async def test_an_sr_that_nobody_has_attached_is_503(gate: Gate) -> None:
    vdi, task = await gate.vdi(), await gate.task()
    (pbd,) = gate.inventory.records.pbds_of_sr(gate.sr)
    await gate.inventory.pbd_unplug(pbd.ref)
    await refused(gate, 503, "SR_NOT_ATTACHED", gate.target(vdi, task_id=task.ref))
    assert gate.tasks.get(task.ref).error_info == ("SR_NOT_ATTACHED", gate.sr)


@pytest.mark.parametrize("fields", [{"read_only": True}, {"is_a_snapshot": True}, {"managed": False}])
async def test_what_must_not_be_written_is_409(gate: Gate, fields: dict[str, Any]) -> None:
    vdi, task = await gate.vdi(**fields), await gate.task()
    await refused(gate, 409, "VDI_READONLY", gate.target(vdi, task_id=task.ref))
    assert gate.tasks.get(task.ref).error_info == ("VDI_READONLY", vdi.ref)


async def test_too_many_transfers_are_503_with_retry_after(tmp_path: Path) -> None:
    async with open_gate(tmp_path, transfers=1) as gate:
        first, second, task = await gate.vdi(), await gate.vdi(), await gate.task()
        async with gate.client() as client:
            await client.head("PUT", gate.target(first), {"content-length": "4194304"})
            await client.answer_head()
            answer = await gate.ask("PUT", gate.target(second, task_id=task.ref), body=b"1")
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            assert gate.tasks.get(task.ref).error_info[0] == "TOO_MANY_TRANSFERS"
            # Finding out that there is nothing to send is no transfer.
            assert (await gate.ask("PUT", gate.target(second))).status == 200
            await client.send(bytes(4 * MIB))
            await client.rest()
        assert (await gate.ask("PUT", gate.target(second), body=bytes(4 * MIB))).whole


@pytest.mark.parametrize("method", ["PUT", "GET"])
async def test_a_database_that_cannot_be_written_is_named_and_everything_goes_on_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("gateway.core.database.BUSY_TIMEOUT", 10)
    async with open_gate(tmp_path) as gate:
        vdi, body = await gate.vdi(), bytes(4 * MIB)
        target = gate.target(vdi, "import_raw_vdi" if method == "PUT" else "export_raw_vdi")
        with contextlib.closing(sqlite3.connect(tmp_path / "gateway.sqlite3", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = await gate.ask(method, target, body=body if method == "PUT" else b"")
        assert answer.status == 500
        assert answer.text.startswith("INTERNAL_ERROR: ") and "database is locked" in answer.text
        assert (await gate.ask(method, target, body=body if method == "PUT" else b"")).whole
    assert (vdi.virtual_size, len(gate.staged())) == (4 * MIB, 0)


async def test_an_upload_without_a_descriptor_for_it_ends_its_task(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_arguments: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    vdi = await gate.vdi()
    monkeypatch.setattr("gateway.http.wire.os.eventfd", none_left)
    await refused(gate, 500, "VDI_IO_ERROR", gate.target(vdi))
    (task,) = gate.tasks.all()
    assert (task.status, task.error_info[0]) == (TaskStatus.FAILURE, "VDI_IO_ERROR")


@pytest.mark.parametrize(
    "lengths", [["-1"], ["1", "2"], ["5", "5"], ["5, 5"], ["+5"], ["0x5"], [""], ["1e3"]]
)
async def test_bad_content_lengths_are_400(gate: Gate, lengths: list[str]) -> None:
    vdi = await gate.vdi()
    lines = "".join(f"content-length: {length}\r\n" for length in lengths)
    async with gate.client() as client:
        await client.send(f"PUT {gate.target(vdi)} HTTP/1.1\r\nhost: test\r\n{lines}\r\n".encode())
        answer = await client.answer()
    assert answer.status == 400
    assert answer.text.count("\n") == 1


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_client_that_streams_on_receives_the_refusal(
    gate: Gate, trust: ssl.SSLContext, encrypted: bool
) -> None:
    """More than the socket buffers hold is on its way, and the client reads only when it has sent all."""
    body = bytes(64 << 10)
    async with gate.client(trust if encrypted else None) as client:
        await client.head("PUT", gate.target(UNKNOWN), {"content-length": str(1 << 30)})
        for _ in range(96):  # 6 MiB: less than the gateway drains
            await client.send(body)
        answer = await client.answer()
        assert (answer.status, answer.whole) == (500, True)
        assert answer.text.startswith("UUID_INVALID: ")


async def test_draining_after_a_refusal_has_an_end(tmp_path: Path) -> None:
    async with open_gate(tmp_path, refusal_drain_seconds=0.05) as gate:
        async with gate.client() as client:
            await client.head("PUT", gate.target(UNKNOWN), {"content-length": str(1 << 30)})
            with trio.fail_after(5):
                await client.rest()
                await until(lambda: not gate.server.connection_count)


ENDLESS = 1 << 50


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("limits", [(0.2, ENDLESS), (600, MIB)], ids=["seconds", "bytes"])
async def test_a_refused_client_that_only_ever_sends_is_cut_off_by_either_limit(
    tmp_path: Path, authority: trustme.CA, trust: ssl.SSLContext, limits: tuple[float, int], encrypted: bool
) -> None:
    seconds, drained = limits
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    body = bytes(64 << 10)
    async with open_gate(
        tmp_path, context, refusal_drain_seconds=seconds, refusal_drain_bytes=drained
    ) as gate:
        async with gate.client(trust if encrypted else None) as client:
            await client.head("PUT", gate.target(UNKNOWN), {"content-length": str(ENDLESS)})
            with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
                while True:
                    await client.send(body)
            await until(lambda: not gate.server.connection_count)
