"""What XenServer's SDK samples and backup programs do on the wire, byte for byte where that matters."""

import http.client
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.foreign.programs import answer_of
from tests.system.site import MIB, Site, stored_content

Maker = Callable[[int], Path]


def path_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


def test_exportimport_waits_for_the_answer_before_it_sends_a_byte(site: Site, random_file: Maker) -> None:
    source, vdi, task = random_file(4 * MIB), site.create_vdi(4 * MIB), site.create_task()
    parts = urlsplit(site.import_url(vdi, task_id=task))
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(f"PUT {parts.path}?{parts.query} HTTP/1.0\r\n\r\n".encode())
        answer = connection.makefile("rb")
        assert answer.readline().split()[1:] == [b"200", b"OK"]
        connection.sendall(source.read_bytes())
        answer.close()
    assert site.finished_task(task)["status"] == "success"
    assert stored_content(vdi) == source.read_bytes()


def test_task_has_ended_when_a_put_with_its_length_has_been_answered(
    site: Site, openstack_python: Path, random_file: Maker
) -> None:
    program = Path(__file__).with_name("requests_put.py")
    for scheme in ("http", "https"):
        source, vdi, task = random_file(4 * MIB), site.create_vdi(4 * MIB), site.create_task()
        answer = answer_of(
            [str(openstack_python), "-I", str(program)],
            {
                "url": site.gateway.url,
                "session": site.gateway.session,
                "put": site.import_url(vdi, scheme=scheme, task_id=task),
                "task": task,
                "file": str(source),
                "authority": str(site.gateway.ca_file),
            },
        )
        assert answer == {"status": 200, "task": ["success", f"<value>{vdi.ref}</value>"]}
        assert stored_content(vdi) == source.read_bytes()


@pytest.mark.parametrize("length", [0, 1 << 50])
def test_probe_without_task_and_body_changes_nothing(site: Site, random_file: Maker, length: int) -> None:
    source, vdi, task = random_file(2 * MIB), site.create_vdi(2 * MIB), site.create_task()
    parts = urlsplit(site.gateway.url)
    host = parts.netloc
    first = http.client.HTTPConnection(host, timeout=30)
    first.request("PUT", path_of(site.import_url(vdi)), source.read_bytes())
    first.getresponse().read()
    first.close()
    before = vdi.file.stat()
    probe = http.client.HTTPConnection(host, timeout=30)
    probe.putrequest("PUT", path_of(site.import_url(vdi, path="/")))
    probe.putheader("Content-Length", str(length))
    probe.endheaders()
    answer = probe.getresponse()
    assert answer.status == 200
    answer.close()
    probe.close()
    # The real one follows at once, while the gateway may still be busy with the end of the probe.
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        line = f"PUT {path_of(site.import_url(vdi, task_id=task))} HTTP/1.1"
        head = f"{line}\r\nHost: {host}\r\nContent-Length: {source.stat().st_size}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        assert vdi.file.stat().st_mtime_ns == before.st_mtime_ns
        assert stored_content(vdi) == source.read_bytes()
        site.gateway.call("task.cancel", task)
    assert site.finished_task(task)["status"] == "cancelled"
    assert stored_content(vdi) == source.read_bytes()
