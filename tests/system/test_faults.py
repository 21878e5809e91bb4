"""The gateway killed, stopped, out of space or left waiting: what was promised is there, nothing else is."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clients import RawClient, curl, upload_with_curl
from tests.system.site import MIB, Site, stored_content
from tests.system.slow_upload import SlowUpload

Maker = Callable[[int], Path]


def test_killed_gateway_leaves_old_content_no_lease_no_staging_and_failed_tasks(
    own_site: Site, random_file: Maker
) -> None:
    site = own_site
    vdis = [site.create_vdi(8 * MIB, kind) for kind in ("vhd", "raw", "vhd")]
    old = [random_file(8 * MIB) for _ in vdis]
    for vdi, source in zip(vdis, old, strict=True):
        assert upload_with_curl(source, site.import_url(vdi)).success
    untouched = site.create_task("of a client, nobody works on it")
    uploads = [SlowUpload(site, vdi, b"\x99" * vdi.size) for vdi in vdis]
    assert len(site.staged_files()) == 3
    site.gateway.kill()
    for upload in uploads:
        upload.client.socket.close()
    for vdi, source in zip(vdis, old, strict=True):
        assert stored_content(vdi) == source.read_bytes()
    site.gateway.start()
    assert site.staged_files() == []
    new = random_file(8 * MIB)
    for vdi, source in zip(vdis, old, strict=True):
        assert curl(site.export_url(vdi)).stdout == source.read_bytes()
        outcome = upload_with_curl(new, site.import_url(vdi))
        assert outcome.success, outcome.said
        assert stored_content(vdi) == new.read_bytes()
    for upload in uploads:
        record = site.finished_task(upload.task)
        assert record["status"] == "failure"
        assert record["error_info"][0] == "TASK_INTERRUPTED"
    assert site.task(untouched)["status"] == "pending"


@pytest.mark.long
def test_gateway_killed_at_any_moment_never_tears_a_disk(own_site: Site, random_file: Maker) -> None:
    site = own_site
    versions = [random_file(16 * MIB) for _ in range(2)]
    contents = [version.read_bytes() for version in versions]
    vdis = [site.create_vdi(16 * MIB, kind) for kind in ("vhd", "raw")]
    for vdi in vdis:
        assert upload_with_curl(versions[0], site.import_url(vdi)).success
    for round_number in range(20):
        uploads = [
            subprocess.Popen(
                ["curl", "-s", "-T", str(versions[round_number % 2]), site.import_url(vdi)],
                stdout=subprocess.DEVNULL,
            )
            for vdi in vdis
        ]
        with contextlib.suppress(subprocess.TimeoutExpired):
            uploads[0].wait(0.005 * round_number)
        site.gateway.kill()
        for upload in uploads:
            upload.wait()
        for vdi in vdis:
            assert stored_content(vdi) in contents
        site.gateway.start()
        assert site.staged_files() == []


def test_terminated_gateway_ends_in_order_and_says_so_to_its_clients(own_site: Site) -> None:
    site = own_site
    vdi = site.create_vdi()
    with SlowUpload(site, vdi, b"\x77" * vdi.size) as upload:
        site.gateway.signal(signal.SIGTERM)
        _, complete = upload.client.answer_body(upload.headers)
        assert not complete
        assert site.gateway.wait() == 0
    assert site.staged_files() == []
    assert stored_content(vdi) == bytes(vdi.size)
    site.gateway.start()
    assert site.finished_task(upload.task)["status"] in ("failure", "cancelled")
    assert upload_with_curl(Path("/etc/hostname"), site.import_url(vdi)).success


def test_state_survives_a_restart(own_site: Site, random_file: Maker) -> None:
    site = own_site
    vdi, source, task = site.create_vdi(), random_file(4 * MIB), site.create_task()
    session = site.gateway.session
    assert upload_with_curl(source, site.import_url(vdi, task_id=task)).success
    tag = curl("-I", site.export_url(vdi)).stdout.lower().partition(b"etag:")[2].split()[0]
    assert site.gateway.stop() == 0
    site.gateway.start()
    assert site.task(task)["status"] == "success"
    # The session is remembered too: clients need not log in anew.
    assert curl(site.export_url(vdi, session_id=session)).stdout == source.read_bytes()
    assert curl("-I", site.export_url(vdi)).stdout.lower().partition(b"etag:")[2].split()[0] == tag


def test_full_disk_has_its_own_code_and_keeps_the_old_content(
    own_site: Site, random_file: Maker, small_file_system: Path
) -> None:
    site = own_site
    directory = small_file_system / "sr"
    sr = site.create_repository(directory)
    for kind in ("vhd", "raw"):
        vdi, task = site.create_vdi(64 * MIB, kind, (sr, directory)), site.create_task()
        start = random_file(3 * MIB)
        assert upload_with_curl(start, site.import_url(vdi)).success
        outcome = upload_with_curl(random_file(60 * MIB), site.import_url(vdi, task_id=task))
        assert not outcome.success
        record = site.finished_task(task)
        assert (record["status"], record["error_info"][0]) == ("failure", "SR_FULL"), record
        assert os.listdir(directory / ".vdi-gateway" / "staging") == []
        assert curl("-r", f"0-{3 * MIB - 1}", site.export_url(vdi)).stdout == start.read_bytes()
        after = random_file(2 * MIB)
        outcome = upload_with_curl(after, site.import_url(vdi))
        assert outcome.success, outcome.said
        assert curl("-r", f"0-{2 * MIB - 1}", site.export_url(vdi)).stdout == after.read_bytes()
        site.gateway.call("VDI.destroy", vdi.ref)
    site.gateway.stop()  # the file system can be unmounted then


def test_no_secret_is_logged(own_site: Site, random_file: Maker) -> None:
    site = own_site
    site.gateway.stop()
    site.gateway.arguments = ("--log-level", "debug")
    site.gateway.start()
    vdi, source = site.create_vdi(), random_file(4 * MIB)
    session, password = site.gateway.session, site.gateway.password
    assert upload_with_curl(source, site.import_url(vdi)).success
    assert curl("-u", f"root:{password}", site.export_url(vdi, session_id="")).returncode == 0
    curl("-u", f"root:{password}x", site.export_url(vdi, session_id=""))
    curl("-b", f"session_id={session}", site.export_url(vdi, session_id=""))
    curl(site.export_url(vdi, session_id=session[:-1]))
    curl(site.gateway.url + f"/no/such/path?session_id={session}&password={password}")
    with RawClient(site.import_url(vdi)) as client:
        client.head("Content-Length: 5", "Transfer-Encoding: gzip")
        client.answer_head()
    log = site.gateway.log()
    assert log
    assert password not in log
    assert session.removeprefix("OpaqueRef:") not in log
    assert session[:-1].removeprefix("OpaqueRef:") not in log


def test_files_of_the_gateway_are_private(own_site: Site, random_file: Maker) -> None:
    site = own_site
    vdi = site.create_vdi()
    assert upload_with_curl(random_file(4 * MIB), site.import_url(vdi)).success
    for root in (site.gateway.state_dir, site.directory):
        for directory, _, names in os.walk(root):
            for name in names:
                path = Path(directory, name)
                if path.name in ("ca.pem", "server.pem"):
                    continue
                # Programs of the gateway's group hold disks through the control socket.
                others = 0o007 if path.name == "access.sock" else 0o077
                assert path.stat().st_mode & others == 0, path
