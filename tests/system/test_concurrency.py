"""Uploads, downloads and foreign programs on the same disk at the same time."""

import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.system.clients import RawClient, curl, curl_upload, upload_with_curl
from tests.system.site import MIB, Site, Vdi, stored_content, wait_until
from tests.system.slow_upload import SlowUpload

Maker = Callable[[int], Path]


def qemu_io(vdi: Vdi, *arguments: str) -> "subprocess.CompletedProcess[str]":
    image_format = "vpc" if vdi.file.suffix == ".vhd" else "raw"
    return subprocess.run(
        ["qemu-io", "-f", image_format, *arguments, str(vdi.file)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_second_upload_into_a_disk_waits_then_is_told_who_has_it(site: Site, random_file: Maker) -> None:
    vdi, second_task = site.create_vdi(), site.create_task()
    with SlowUpload(site, vdi, b"\x11" * vdi.size) as first:
        done = curl(
            "-w",
            "\n%{http_code}",
            "-T",
            str(random_file(vdi.size)),
            site.import_url(vdi, task_id=second_task),
        )
        text, _, status = done.stdout.decode().rpartition("\n")
        assert status == "409"
        assert vdi.uuid in text or vdi.ref in text or "in use" in text.lower()
        record = site.task(second_task)
        assert (record["status"], record["error_info"][0]) == ("failure", "VDI_IN_USE"), record
        first.finish()
    assert stored_content(vdi) == b"\x11" * vdi.size


def test_second_upload_that_waits_goes_on_when_the_first_ends(site: Site, random_file: Maker) -> None:
    vdi, source = site.create_vdi(), random_file(4 * MIB)
    with ThreadPoolExecutor(1) as pool, SlowUpload(site, vdi, b"\x11" * vdi.size) as first:
        second = pool.submit(upload_with_curl, source, site.import_url(vdi))
        first.finish()
        assert second.result().success, second.result().said
    assert stored_content(vdi) == source.read_bytes()


def test_uploads_into_different_disks_run_side_by_side(site: Site) -> None:
    vdis = [site.create_vdi(image_format=kind) for kind in ("vhd", "raw", "vhd", "raw")]
    uploads = [
        SlowUpload(site, vdi, bytes([number + 1]) * vdi.size, scheme=("http", "https")[number // 2])
        for number, vdi in enumerate(vdis)
    ]
    for upload in reversed(uploads):
        upload.finish()
        upload.client.socket.close()
    for number, vdi in enumerate(vdis):
        assert stored_content(vdi) == bytes([number + 1]) * vdi.size


def test_reader_keeps_the_old_version_while_an_upload_runs_and_after_it(
    site: Site, random_file: Maker
) -> None:
    old, new, vdi = random_file(32 * MIB), random_file(32 * MIB), site.create_vdi(32 * MIB)
    assert upload_with_curl(old, site.import_url(vdi)).success
    with RawClient(site.export_url(vdi)) as reader, RawClient(site.export_url(vdi)) as second_reader:
        reader.head(method="GET")
        reader.answer_head()
        seen = reader.receive(MIB)
        with SlowUpload(site, vdi, new.read_bytes()) as upload:
            second_reader.head(method="GET")
            second_reader.answer_head()
            assert curl(site.export_url(vdi)).stdout == old.read_bytes()
            upload.finish()
        assert curl(site.export_url(vdi)).stdout == new.read_bytes()
        seen += reader.receive(31 * MIB)
        assert seen == old.read_bytes()
        assert second_reader.receive(32 * MIB) == old.read_bytes()


def test_qemu_cannot_write_to_a_disk_that_is_uploaded_or_downloaded(site: Site, random_file: Maker) -> None:
    for kind in ("vhd", "raw"):
        vdi, source = site.create_vdi(32 * MIB, kind), random_file(32 * MIB)
        assert qemu_io(vdi, "-c", "write -P 1 0 512").returncode == 0
        with SlowUpload(site, vdi, source.read_bytes()) as upload:
            locked = qemu_io(vdi, "-c", "write -P 2 0 512")
            assert locked.returncode != 0
            assert "lock" in locked.stderr
            upload.finish()
        with RawClient(site.export_url(vdi)) as reader:
            reader.head(method="GET")
            reader.answer_head()
            assert "lock" in qemu_io(vdi, "-c", "write -P 3 0 512").stderr
            assert reader.receive(32 * MIB) == source.read_bytes()
        wait_until(lambda: qemu_io(vdi, "-c", "write -P 3 0 512").returncode == 0, "the lock to end")  # noqa: B023
        site.gateway.call("VDI.destroy", vdi.ref)


def test_disk_that_qemu_writes_to_is_in_use(site: Site, random_file: Maker) -> None:
    vdi, source, task = site.create_vdi(), random_file(4 * MIB), site.create_task()
    writer = subprocess.Popen(
        ["qemu-io", "-f", "vpc", str(vdi.file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Its prompt comes when the disk is open. Trying to open it too could keep it from that.
        assert writer.stdout is not None
        assert writer.stdout.read(8) == b"qemu-io>"
        assert "lock" in qemu_io(vdi, "-c", "write 0 512").stderr
        status, text = curl_upload(source, site.import_url(vdi, task_id=task))
        assert status == 409
        assert "in use" in text
        record = site.task(task)
        assert (record["status"], record["error_info"][0]) == ("failure", "VDI_IN_USE"), record
    finally:
        writer.communicate(b"quit\n", timeout=10)
    assert upload_with_curl(source, site.import_url(vdi)).success


def test_cancelled_task_ends_the_upload_and_keeps_the_old_content(site: Site) -> None:
    vdi = site.create_vdi()
    for scheme in ("http", "https"):
        with SlowUpload(site, vdi, b"\x33" * vdi.size, scheme=scheme) as upload:
            site.gateway.call("task.cancel", upload.task)
            body, complete = upload.client.answer_body(upload.headers)
            assert not complete
            assert b"ancel" in body
            record = site.finished_task(upload.task)
        assert record["status"] == "cancelled"
        assert record["error_info"][0] == "TASK_CANCELLED"
        assert stored_content(vdi) == bytes(vdi.size)


def test_hundred_stormy_clients_leave_no_lease_and_no_staging_file(site: Site) -> None:
    vdis = [site.create_vdi() for _ in range(4)]

    def storm(number: int) -> None:
        vdi = vdis[number % 4]
        with RawClient(site.import_url(vdi) if number % 2 else site.export_url(vdi)) as client:
            client.head(f"Content-Length: {vdi.size}", method="PUT" if number % 2 else "GET")
            if number % 3:
                client.send(bytes(number * 1000) if number % 2 else b"")
            if number % 5:
                client.reset()

    threads = [threading.Thread(target=storm, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: site.staged_files() == [], "the staging files to go")
    for vdi in vdis:
        site.gateway.call("VDI.destroy", vdi.ref)
    assert "Traceback" not in site.gateway.log()
