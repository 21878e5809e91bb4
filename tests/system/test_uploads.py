"""What an upload with an everyday client does: the bytes, the task, the answer, the file others read."""

import http.client
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import XenAPI

from tests.system.clients import UPLOADERS, RawClient, basic, curl, json_call
from tests.system.site import MIB, Site, qemu_compare, stored_content

Maker = Callable[[int], Path]


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
@pytest.mark.parametrize("client", UPLOADERS)
def test_every_client_uploads_the_bytes_that_other_readers_find(
    site: Site, random_file: Maker, client: str, image_format: str
) -> None:
    source, vdi, task = random_file(8 * MIB), site.create_vdi(8 * MIB, image_format), site.create_task()
    outcome = UPLOADERS[client](source, site.import_url(vdi, task_id=task))
    assert outcome.success, outcome.said
    record = site.task(task)
    assert (record["status"], float(record["progress"]), record["error_info"]) == ("success", 1.0, [])
    assert stored_content(vdi) == source.read_bytes()
    qemu_compare(source, vdi)
    assert curl(site.export_url(vdi)).stdout == source.read_bytes()


def test_curl_is_told_to_continue_before_it_sends(site: Site, random_file: Maker) -> None:
    source, vdi = random_file(4 * MIB), site.create_vdi()
    done = curl("-v", "-T", str(source), site.import_url(vdi))
    said = done.stderr.decode()
    assert said.index("< HTTP/1.1 100 Continue") < said.index("< HTTP/1.1 200 OK")


def test_answer_names_the_task_and_promises_a_last_line(site: Site) -> None:
    vdi = site.create_vdi()
    with RawClient(site.import_url(vdi)) as client:
        client.head(f"Content-Length: {vdi.size}")
        status, headers = client.answer_head()
        assert status == 200
        assert headers["content-type"] == "application/octet-stream"
        assert headers["connection"] == "close"
        assert site.task(headers["task-id"])["status"] == "pending"
        client.send(bytes(vdi.size))
        body, complete = client.answer_body(headers)
        assert complete
        assert body.endswith(b"\n")
        assert site.task(headers["task-id"])["status"] == "success"
        assert client.receive(1) == b""


def test_task_has_succeeded_when_the_answer_ends(site: Site, random_file: Maker) -> None:
    source, vdi, task = random_file(4 * MIB), site.create_vdi(), site.create_task()
    assert curl("-T", str(source), site.import_url(vdi, task_id=task)).returncode == 0
    assert site.task(task)["status"] == "success"


@pytest.mark.parametrize("place", ["query", "cookie", "authorization header"])
def test_credentials_may_come_from(site: Site, random_file: Maker, place: str) -> None:
    source, vdi, task = random_file(4 * MIB), site.create_vdi(), site.create_task()
    if place == "query":
        arguments = [site.import_url(vdi, task_id=task)]
    elif place == "cookie":
        cookies = f"vdi={vdi.ref};session_id={site.gateway.session};task_id={task}"
        arguments = ["-b", cookies, site.import_url(None, session_id="")]
    else:
        password = f"root:{site.gateway.password}"
        arguments = ["-u", password, site.import_url(vdi, session_id="", task_id=task)]
    done = curl("--fail-with-body", "-T", str(source), *arguments)
    assert done.returncode == 0, done.stdout
    assert site.task(task)["status"] == "success"
    assert stored_content(vdi) == source.read_bytes()


def test_url_may_end_in_a_slash_or_the_files_name(site: Site, random_file: Maker) -> None:
    source, vdi = random_file(4 * MIB), site.create_vdi()
    for path in ("/", f"/{source.name}"):
        assert curl("--fail", "-T", str(source), site.import_url(vdi, path=path)).returncode == 0


def test_wget_uploads_with_a_password(site: Site, random_file: Maker) -> None:
    source, vdi = random_file(4 * MIB), site.create_vdi()
    done = subprocess.run(
        [
            "wget",
            "-nv",
            "-O-",
            "--tries=1",
            "--auth-no-challenge",
            "--user=root",
            f"--password={site.gateway.password}",
            "--method=PUT",
            f"--body-file={source}",
            site.import_url(vdi, session_id=""),
        ],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert stored_content(vdi) == source.read_bytes()


def test_curl_uploads_over_https_with_the_generated_authority(site: Site, random_file: Maker) -> None:
    source, vdi, authority = random_file(8 * MIB), site.create_vdi(8 * MIB), str(site.gateway.ca_file)
    refused = curl("-T", str(source), site.import_url(vdi, scheme="https"))
    assert refused.returncode == 60  # the authority is not trusted
    done = curl("--fail", "--cacert", authority, "-T", str(source), site.import_url(vdi, scheme="https"))
    assert done.returncode == 0, done.stderr
    assert stored_content(vdi) == source.read_bytes()
    assert curl("--cacert", authority, site.export_url(vdi, scheme="https")).stdout == source.read_bytes()


def test_tls_without_close_notify_is_an_end_of_file(site: Site) -> None:
    vdi, task = site.create_vdi(), site.create_task()
    url = site.import_url(vdi, scheme="https", task_id=task)
    with RawClient(url, site.gateway.ca_file) as client:
        client.head(version="1.0")
        assert client.answer_head()[0] == 200
        client.send(b"\x07" * vdi.size)
        # shutdown() of the socket below TLS: no alert is sent.
        client.end()
        record = site.finished_task(task)
    assert record["status"] == "success", record
    assert stored_content(vdi) == b"\x07" * vdi.size


def test_http_1_0_without_a_length_waits_for_200_then_sends_the_whole_disk(site: Site) -> None:
    vdi, task, content = site.create_vdi(), site.create_task(), os.urandom(4 * MIB)
    with RawClient(site.import_url(vdi, task_id=task)) as client:
        client.head(version="1.0")
        status, headers = client.answer_head()
        assert status == 200
        client.send(content)
        client.end()
        body, complete = client.answer_body(headers)
        assert complete, body
    assert site.task(task)["status"] == "success"
    assert stored_content(vdi) == content


def test_xen_orchestras_length_ends_with_the_disk_while_it_holds_the_connection(site: Site) -> None:
    vdi, task, content = site.create_vdi(), site.create_task(), os.urandom(4 * MIB)
    with RawClient(site.import_url(vdi, task_id=task)) as client:
        client.head(f"Content-Length: {1 << 50}")
        status, headers = client.answer_head()
        assert status == 200
        client.send(content)
        assert client.answer_body(headers)[1]
    assert site.task(task)["status"] == "success"
    assert stored_content(vdi) == content


def test_xen_orchestras_probe_changes_nothing_and_leaves_no_task(site: Site, random_file: Maker) -> None:
    source, vdi = random_file(4 * MIB), site.create_vdi()
    assert curl("-T", str(source), site.import_url(vdi)).returncode == 0
    tasks = set(site.gateway.call("task.get_all"))
    parts = urlsplit(site.import_url(vdi))
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    connection.request("PUT", f"{parts.path}?{parts.query}", headers={"Content-Length": "0"})
    assert connection.getresponse().status == 200
    connection.close()
    assert set(site.gateway.call("task.get_all")) == tasks
    assert stored_content(vdi) == source.read_bytes()


def test_shorter_body_with_its_length_leaves_the_rest_as_it_was(site: Site, random_file: Maker) -> None:
    old, new, vdi = random_file(8 * MIB), random_file(3 * MIB + 777), site.create_vdi(8 * MIB)
    for source in (old, new):
        assert curl("--fail", "-T", str(source), site.import_url(vdi)).returncode == 0
    expected = new.read_bytes() + old.read_bytes()[3 * MIB + 777 :]
    assert stored_content(vdi) == expected
    assert curl(site.export_url(vdi)).stdout == expected


def test_zero_runs_are_not_stored(site: Site, tmp_path: Path) -> None:
    source, vdi = tmp_path / "sparse", site.create_vdi(256 * MIB)
    with source.open("wb") as file:
        file.truncate(256 * MIB)
        for megabyte in (0, 100, 201):
            file.seek(megabyte * MIB + 4096)
            file.write(os.urandom(8192))
    assert curl("--fail", "-T", str(source), site.import_url(vdi)).returncode == 0
    assert vdi.file.stat().st_blocks * 512 < 8 * MIB
    qemu_compare(source, vdi)


def test_broken_download_is_resumed_by_curl(site: Site, random_file: Maker, tmp_path: Path) -> None:
    source, vdi, target = random_file(8 * MIB), site.create_vdi(8 * MIB), tmp_path / "download"
    assert curl("-T", str(source), site.import_url(vdi)).returncode == 0
    target.write_bytes(source.read_bytes()[: 5 * MIB + 123])
    done = curl("--fail", "-C", "-", "-o", str(target), site.export_url(vdi))
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == source.read_bytes()


def test_wget_downloads_and_resumes(site: Site, random_file: Maker, tmp_path: Path) -> None:
    source, vdi, target = random_file(4 * MIB), site.create_vdi(), tmp_path / "download"
    assert curl("-T", str(source), site.import_url(vdi)).returncode == 0
    target.write_bytes(source.read_bytes()[:MIB])
    subprocess.run(["wget", "-q", "-c", "-O", str(target), site.export_url(vdi)], check=True)
    assert target.read_bytes() == source.read_bytes()


def test_etag_changes_with_the_content_and_guards_a_resumed_download(site: Site, random_file: Maker) -> None:
    first, second, vdi = random_file(4 * MIB), random_file(4 * MIB), site.create_vdi()
    parts = urlsplit(site.export_url(vdi))
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    target = f"{parts.path}?{parts.query}"

    def head() -> http.client.HTTPResponse:
        connection.request("HEAD", target)
        answer = connection.getresponse()
        answer.read()
        return answer

    assert curl("-T", str(first), site.import_url(vdi)).returncode == 0
    answer = head()
    assert answer.getheader("Content-Length") == str(vdi.size)
    tag = answer.getheader("ETag")
    assert tag is not None
    assert tag == head().getheader("ETag")
    assert curl("-T", str(second), site.import_url(vdi)).returncode == 0
    assert tag != head().getheader("ETag")
    connection.request("GET", target, headers={"Range": "bytes=1000-", "If-Range": tag})
    answer = connection.getresponse()
    assert answer.status == 200  # the whole new disk: the beginning the client has is of another one
    assert answer.read() == second.read_bytes()
    connection.close()


def test_ranges_cross_block_boundaries(site: Site, random_file: Maker) -> None:
    source, vdi = random_file(6 * MIB), site.create_vdi(6 * MIB)
    assert curl("-T", str(source), site.import_url(vdi)).returncode == 0
    content = source.read_bytes()
    for start, stop in ((0, 1), (2 * MIB - 1, 2 * MIB + 1), (511, 4 * MIB + 513), (6 * MIB - 1, 6 * MIB)):
        done = curl("--fail", "-r", f"{start}-{stop - 1}", site.export_url(vdi))
        assert done.stdout == content[start:stop]
    assert curl("-r", "-1000", site.export_url(vdi)).stdout == content[-1000:]
    beyond = curl("-o", "/dev/null", "-w", "%{http_code}", "-r", f"{6 * MIB}-", site.export_url(vdi))
    assert beyond.stdout == b"416"


def test_xenapi_package_takes_a_disk_from_creation_to_destruction(site: Site, random_file: Maker) -> None:
    source = random_file(4 * MIB)
    session = XenAPI.Session(site.gateway.url)
    session.xenapi.login_with_password("root", site.gateway.password, "1.0", "system test")
    try:
        record = {
            "name_label": "from the package",
            "name_description": "",
            "SR": site.repository,
            "virtual_size": str(4 * MIB),
            "type": "user",
            "sharable": False,
            "read_only": False,
            "other_config": {"who": "test"},
        }
        vdi = session.xenapi.VDI.create(record)
        task = session.xenapi.task.create("upload", "from the package")
        parts = urlsplit(site.gateway.url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=30)
        session_ref = session.handle
        query = f"session_id={session_ref}&vdi={vdi}&task_id={task}"
        connection.request("PUT", f"/import_raw_vdi?{query}", source.read_bytes())
        assert connection.getresponse().status == 200
        while session.xenapi.task.get_status(task) == "pending":
            time.sleep(0.02)
        assert session.xenapi.task.get_status(task) == "success"
        connection.close()
        session.xenapi.task.destroy(task)
        read_back = session.xenapi.VDI.get_record(vdi)
        assert read_back["virtual_size"] == str(4 * MIB)
        assert read_back["other_config"] == {"who": "test"}
        assert int(read_back["physical_utilisation"]) >= 4 * MIB
        assert (site.directory / f"{read_back['uuid']}.vhd").exists()
        session.xenapi.VDI.destroy(vdi)
        assert not (site.directory / f"{read_back['uuid']}.vhd").exists()
        with pytest.raises(XenAPI.Failure) as gone:
            session.xenapi.VDI.get_record(vdi)
        assert gone.value.details == ["HANDLE_INVALID", "VDI", vdi]
    finally:
        session.xenapi.session.logout()
    # The package answers SESSION_INVALID by logging in once more, so the wire is asked.
    assert session.VDI.get_all(session_ref)["ErrorDescription"] == ["SESSION_INVALID", session_ref]
    session("close")()  # the package itself has no word for it


def test_json_rpc_sees_what_xml_rpc_made(site: Site) -> None:
    vdi = site.create_vdi()
    session = json_call(
        site.gateway.url, "session.login_with_password", "root", site.gateway.password, "1.0", "test"
    )
    assert json_call(site.gateway.url, "VDI.get_uuid", session, vdi.ref) == vdi.uuid
    json_call(site.gateway.url, "session.logout", session)


def test_basic_password_and_task_together_need_no_login(site: Site) -> None:
    vdi = site.create_vdi()
    with RawClient(site.import_url(vdi, session_id="")) as client:
        client.head(f"Content-Length: {vdi.size}", basic("root", site.gateway.password))
        status, headers = client.answer_head()
        assert status == 200
        client.send(bytes(vdi.size))
        assert client.answer_body(headers)[1]
    assert site.task(headers["task-id"])["status"] == "success"
