"""What is refused, and that every client notices: a status, one line that says what to do, a failed task."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clients import UPLOADERS, RawClient, basic, curl, curl_upload
from tests.system.site import MIB, Site, stored_content

Maker = Callable[[int], Path]

UNKNOWN = "1b2e7f0c-7a51-4a52-8e0c-2c1f6a3f6a10"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"session_id": "OpaqueRef:00000000-0000-4000-8000-000000000000"}, 403),
        ({"session_id": ""}, 403),
        ({"vdi": ""}, 500),
        ({"vdi": UNKNOWN}, 500),
        ({"format": "tar"}, 404),
    ],
)
def test_bad_requests_have_the_statuses_of_the_proposal(
    site: Site, random_file: Maker, query: dict[str, str], status: int
) -> None:
    vdi, source = site.create_vdi(), random_file(4 * MIB)
    answered, text = curl_upload(source, site.import_url(vdi, **query))
    assert answered == status
    assert text.count("\n") <= 1
    assert text.strip()
    assert stored_content(vdi) == bytes(vdi.size)


def test_wrong_password_is_403(site: Site, random_file: Maker) -> None:
    vdi, source = site.create_vdi(), random_file(2 * MIB)
    assert curl_upload(source, "-u", "root:wrong", site.import_url(vdi, session_id=""))[0] == 403
    with RawClient(site.import_url(vdi, session_id="")) as client:
        client.head("Content-Length: 4", basic("nobody", "wrong"))
        assert client.answer().status == 403


def test_upload_in_chunks_is_403(site: Site, random_file: Maker) -> None:
    vdi, task = site.create_vdi(), site.create_task()
    url = site.import_url(vdi, task_id=task)
    with random_file(32 * MIB).open("rb") as body:
        done = subprocess.run(
            ["curl", "-sS", "-w", "\n%{http_code}", "-T", "-", url],
            stdin=body,
            capture_output=True,
            check=False,
        )
    text, _, status = done.stdout.decode().rpartition("\n")
    assert status == "403"
    assert "ransfer-encoding" in text.lower()
    record = site.task(task)
    assert (record["status"], record["error_info"][0]) == ("failure", "IMPORT_ERROR_CANNOT_HANDLE_CHUNKED")


@pytest.mark.parametrize("client", UPLOADERS)
def test_every_client_reports_a_refusal(site: Site, random_file: Maker, client: str) -> None:
    task = site.create_task()
    outcome = UPLOADERS[client](random_file(32 * MIB), site.import_url(None, vdi=UNKNOWN, task_id=task))
    assert not outcome.success
    record = site.task(task)
    assert (record["status"], record["error_info"][0]) == ("failure", "UUID_INVALID"), record


@pytest.mark.parametrize("client", UPLOADERS)
def test_no_client_takes_a_body_that_is_too_long_for_a_success(
    site: Site, random_file: Maker, client: str
) -> None:
    vdi, task = site.create_vdi(), site.create_task()
    outcome = UPLOADERS[client](random_file(4 * MIB + 1), site.import_url(vdi, task_id=task))
    assert not outcome.success, outcome.said
    record = site.finished_task(task)
    assert (record["status"], record["error_info"][0]) == ("failure", "VDI_TOO_SMALL"), record
    assert stored_content(vdi) == bytes(vdi.size)


@pytest.mark.parametrize("ending", ["end of file", "reset"])
def test_body_cut_short_fails_the_task_and_keeps_the_old_content(site: Site, ending: str) -> None:
    vdi, task = site.create_vdi(), site.create_task()
    with RawClient(site.import_url(vdi, task_id=task)) as client:
        client.head(f"Content-Length: {vdi.size}")
        status, headers = client.answer_head()
        assert status == 200
        client.send(b"\x55" * (3 * MIB))
        site.wait_for_progress(task, 0.7)
        if ending == "reset":
            client.reset()
        else:
            client.end()
            body, complete = client.answer_body(headers)
            assert not complete
            assert b"IMPORT_ERROR_PREMATURE_EOF" in body or body.strip()
    record = site.finished_task(task)
    assert record["status"] == "failure"
    assert record["error_info"] == ["IMPORT_ERROR_PREMATURE_EOF", str(vdi.size), str(3 * MIB)]
    assert stored_content(vdi) == bytes(vdi.size)


def test_fewer_bytes_without_a_length_fail_and_ask_for_one(site: Site) -> None:
    vdi, task = site.create_vdi(), site.create_task()
    with RawClient(site.import_url(vdi, task_id=task)) as client:
        client.head(version="1.0")
        _, headers = client.answer_head()
        client.send(b"\x55" * MIB)
        client.end()
        body, complete = client.answer_body(headers)
    assert not complete
    assert b"ontent-" in body
    assert site.finished_task(task)["error_info"] == ["IMPORT_ERROR_LENGTH_REQUIRED", str(vdi.size), str(MIB)]
    assert stored_content(vdi) == bytes(vdi.size)


def test_more_bytes_than_the_disk_without_a_length_fail(site: Site) -> None:
    vdi, task = site.create_vdi(), site.create_task()
    with RawClient(site.import_url(vdi, task_id=task)) as client:
        client.head(version="1.0")
        _, headers = client.answer_head()
        client.send(b"\x55" * vdi.size + b"!")
        client.end()
        assert not client.answer_body(headers)[1]
    assert site.finished_task(task)["error_info"][0] == "VDI_TOO_SMALL"
    assert stored_content(vdi) == bytes(vdi.size)


def test_export_without_credentials_is_challenged_and_wrong_ones_are_forbidden(site: Site) -> None:
    vdi = site.create_vdi()
    url = site.export_url(vdi, session_id="")
    with RawClient(url) as client:
        client.head(method="GET")
        answer = client.answer()
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
    assert curl("-o", "/dev/null", "-w", "%{http_code}", "-u", "root:wrong", url).stdout == b"403"
    assert curl("-u", f"root:{site.gateway.password}", url).stdout == bytes(vdi.size)


def test_client_that_drops_its_download_is_no_error(site: Site) -> None:
    vdi = site.create_vdi(64 * MIB)
    before = site.gateway.log()
    with RawClient(site.export_url(vdi)) as client:
        client.head(method="GET")
        assert client.answer_head()[0] == 200
        assert client.receive(100_000) == bytes(100_000)
        client.reset()
    site.gateway.call("VDI.destroy", vdi.ref)  # waits for the lease of the download to end
    said = site.gateway.log().removeprefix(before)
    assert '"level": "error"' not in said
    assert '"level": "warning"' not in said


def test_garbage_instead_of_a_request_is_answered_and_harms_nobody(site: Site) -> None:
    with RawClient(site.gateway.url + "/x") as client:
        client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert client.answer_head()[0] == 400
    assert site.gateway.call("host.get_all")
