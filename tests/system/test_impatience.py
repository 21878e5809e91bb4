"""A gateway with short limits cuts off those who stand still, and lets those who are only slow go on."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.conftest import RunningGateway
from tests.system.clients import RawClient
from tests.system.conftest import stop
from tests.system.site import MIB, Site, stored_content
from tests.system.slow_upload import SlowUpload

IDLE = 1.0

_CONFIGURATION = f"""
[limits]
transfer_idle = "{IDLE}s"
header_time = "{IDLE}s"
keepalive_idle = "{IDLE}s"
transfers = 3
"""


@pytest.fixture(scope="module")
def impatient_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("impatient")
    gateway = RunningGateway(directory)
    gateway.state_dir.mkdir()
    (gateway.state_dir / "config.toml").write_text(_CONFIGURATION)
    gateway.start()
    try:
        yield Site(gateway, directory / "sr")
    finally:
        stop(gateway)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_upload_that_stands_still_is_cut_off(impatient_site: Site, scheme: str) -> None:
    site = impatient_site
    vdi = site.create_vdi()
    with SlowUpload(site, vdi, b"\x44" * vdi.size, scheme=scheme) as upload:
        body, complete = upload.client.answer_body(upload.headers)
        assert not complete
        assert b"sent nothing" in body or body.strip()
        record = site.finished_task(upload.task)
    assert (record["status"], record["error_info"][0]) == ("failure", "IMPORT_ERROR_CLIENT_STALLED"), record
    assert site.staged_files() == []
    assert stored_content(vdi) == bytes(vdi.size)


def test_upload_that_is_only_slow_succeeds(impatient_site: Site) -> None:
    site = impatient_site
    vdi, task = site.create_vdi(2 * MIB), site.create_task()
    pieces = 8
    with RawClient(site.import_url(vdi, task_id=task)) as client:
        client.head(f"Content-Length: {vdi.size}")
        _, headers = client.answer_head()
        for _ in range(pieces):
            client.send(b"\x45" * (vdi.size // pieces))
            time.sleep(IDLE / 4)  # the pace is the point: twice the limit in all, never the limit at once
        assert client.answer_body(headers)[1]
    assert site.task(task)["status"] == "success"


def test_download_that_nobody_reads_is_cut_off_and_frees_the_disk(impatient_site: Site) -> None:
    site = impatient_site
    vdi = site.create_vdi(64 * MIB)
    with RawClient(site.export_url(vdi)) as client:
        client.head(method="GET")
        status, headers = client.answer_head()
        assert status == 200
        record = site.finished_task(headers["task-id"])
        assert record["error_info"][0] == "EXPORT_ERROR_CLIENT_STALLED", record
        assert len(client.receive(64 * MIB)) < 64 * MIB
    site.gateway.call("VDI.destroy", vdi.ref)


def test_connection_that_never_sends_its_head_is_closed(impatient_site: Site) -> None:
    with RawClient(impatient_site.gateway.url + "/") as client:
        client.send(b"GET / HTTP/1.1\r\nHost: gate")
        answer = client.receive(MIB)
    assert answer == b"" or b" 408 " in answer.split(b"\r\n")[0]


def test_one_transfer_too_many_is_told_to_come_back(impatient_site: Site) -> None:
    site = impatient_site
    vdis = [site.create_vdi() for _ in range(4)]
    with ExitStack() as stack:
        uploads = [stack.enter_context(SlowUpload(site, vdi, bytes(vdi.size))) for vdi in vdis[:3]]
        client = stack.enter_context(RawClient(site.import_url(vdis[3])))
        client.head(f"Content-Length: {vdis[3].size}")
        answer = client.answer()
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    for upload in uploads:
        site.finished_task(upload.task)
