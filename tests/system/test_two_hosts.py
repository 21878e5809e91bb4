"""Two gateways: an upload to the one that doesn't reach the disk finds its way to the one that does."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import RunningGateway
from tests.system.clients import curl, curl_upload
from tests.system.conftest import stop
from tests.system.site import MIB, Site, Vdi, stored_content


@pytest.fixture
def other_gateway(own_site: Site, tmp_path: Path) -> Iterator[RunningGateway]:
    """A second gateway with the administrator's password of the first."""
    directory = tmp_path / "other"
    state = directory / "state"
    state.mkdir(parents=True, mode=0o700)
    shutil.copy(own_site.gateway.state_dir / "admin-password", state / "admin-password")
    gateway = RunningGateway(directory)
    gateway.start()
    try:
        yield gateway
    finally:
        stop(gateway)


def move_repository(site: Site, other: RunningGateway) -> None:
    """The SR goes over to the other gateway; the first one is told where it is."""
    [pbd] = site.gateway.call("SR.get_PBDs", site.repository)
    site.gateway.call("PBD.unplug", pbd)
    attached = other.command("sr-attach", str(site.directory), "--writable")
    assert attached.returncode == 0, attached.stderr
    address = urlsplit(other.url).netloc
    host = site.gateway.call("host.create", "", "other", "", "other", address, "", "", {}, {})
    record = {"host": host, "SR": site.repository, "device_config": {"location": str(site.directory)}}
    site.gateway.call("PBD.plug", site.gateway.call("PBD.create", {**record, "other_config": {}}))


def upload(site: Site, source: Path, vdi: Vdi, *options: str) -> tuple[int, str]:
    """With the password, which both gateways know, instead of a session, which only one does."""
    password = f"root:{site.gateway.password}"
    return curl_upload(source, *options, "-u", password, site.import_url(vdi, session_id=""))


def test_upload_follows_the_redirect_to_the_host_that_has_the_disk(
    own_site: Site, other_gateway: RunningGateway, random_file: Callable[[int], Path]
) -> None:
    site, source = own_site, random_file(32 * MIB)
    vdi = site.create_vdi(32 * MIB)
    move_repository(site, other_gateway)
    status, _ = upload(site, source, vdi)
    assert status == 302
    status, text = upload(site, source, vdi, "--location-trusted")
    assert status == 200, text
    assert stored_content(vdi) == source.read_bytes()
    # Reading goes the same way.
    url = site.export_url(vdi, session_id="")
    done = curl("--fail", "--location-trusted", "-u", f"root:{site.gateway.password}", url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == source.read_bytes()


def test_redirect_keeps_the_query_and_leaves_the_task_pending(
    own_site: Site, other_gateway: RunningGateway, random_file: Callable[[int], Path]
) -> None:
    site = own_site
    vdi, task = site.create_vdi(), site.create_task()
    move_repository(site, other_gateway)
    url = site.import_url(vdi, task_id=task)
    done = curl("-o", "/dev/null", "-w", "%{redirect_url}", "-T", str(random_file(4 * MIB)), url)
    found, expected = urlsplit(done.stdout.decode()), urlsplit(url)
    assert (found.scheme, found.netloc) == ("http", urlsplit(other_gateway.url).netloc)
    assert (found.path, found.query) == (expected.path, expected.query)
    assert site.task(task)["status"] == "pending"
