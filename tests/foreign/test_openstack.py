"""OpenStack's os-xenapi: see openstack.py for what of it can run outside of a XenServer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.foreign.programs import answer_of
from tests.system.clients import curl_upload
from tests.system.site import MIB, Site, Vdi, stored_content

Maker = Callable[[int], Path]
Program = Callable[..., dict[str, Any]]


@pytest.fixture
def openstack(site: Site, openstack_python: Path) -> Program:
    """Runs one program of openstack.py."""

    def run(program: str, **asked: Any) -> dict[str, Any]:
        request = {
            "program": program,
            "url": site.gateway.url,
            "user": "root",
            "password": site.gateway.password,
            "sr": site.repository,
            **asked,
        }
        return answer_of(
            [str(openstack_python), "-I", str(Path(__file__).with_name("openstack.py"))], request
        )

    return run


def test_session_objects_and_tasks(site: Site, openstack: Program) -> None:
    found = openstack("work")
    version, brand = found["product"]
    assert len(version) == len(found["platform"]) == 3
    assert brand
    [host] = site.gateway.call("host.get_all")
    assert found["host"] == site.gateway.call("host.get_uuid", host)
    record = found["record"]
    assert record["name_label"] == "disk"
    assert record["virtual_size"] == str(4 * MIB)
    assert record["SR"] == site.repository
    assert record["type"] == "user"  # it is sent as "User"
    assert record["other_config"] == {"nova_disk_type": "root", "nova_instance_uuid": "of-instance"}
    assert found["task"] == ["tests-label", "description", "pending"]
    assert found["task after"] is None
    assert len(found["where"]) == 1
    assert found["listed"]
    assert found["after"] is None
    assert found["unknown"][:2] == ["HANDLE_INVALID", "VDI"]
    assert found["status"] == 404


def test_calls_of_dom0_plugins_are_refused_by_name(openstack: Program) -> None:
    assert openstack("work")["plugin"][0] in {"MESSAGE_METHOD_UNKNOWN", "XENAPI_MISSING_PLUGIN"}


def test_it_reads_the_head_of_the_gateways_vhd_files(
    site: Site, openstack: Program, random_file: Maker
) -> None:
    vdi = site.create_vdi(8 * MIB)
    assert curl_upload(random_file(4 * MIB), site.import_url(vdi))[0] == 200
    found = openstack("parse", file=str(vdi.file))
    assert found["virtual size"] == vdi.size
    assert found["blocks"] == 2


def test_image_of_glance_becomes_a_vdi(site: Site, openstack: Program, random_file: Maker) -> None:
    source, first = random_file(4 * MIB), site.create_vdi(4 * MIB)
    assert curl_upload(source, site.import_url(first))[0] == 200
    uuid = openstack("send", file=str(first.file))["vdis"]["root"]["uuid"]
    reference = site.gateway.call("VDI.get_by_uuid", uuid)
    assert site.gateway.call("VDI.get_virtual_size", reference) == str(4 * MIB)
    assert (site.directory / f"{uuid}.vhd").exists()
    second = Vdi(reference, uuid, 4 * MIB, site.directory / f"{uuid}.vhd")
    assert stored_content(second) == source.read_bytes()


def test_vdi_becomes_a_vhd_file_of_the_computed_size(
    site: Site, openstack: Program, random_file: Maker, tmp_path: Path
) -> None:
    # In Python 3 os-xenapi computes a fraction unless the BAT ends at a sector: at multiples of 256 MiB.
    source, vdi, file = random_file(4 * MIB), site.create_vdi(256 * MIB), tmp_path / "0.vhd"
    assert curl_upload(source, site.import_url(vdi))[0] == 200
    found = openstack("fetch", vdi=vdi.uuid, file=str(file))
    assert found == {"size": file.stat().st_size}
    copy = Vdi(vdi.ref, vdi.uuid, vdi.size, file)
    assert stored_content(copy)[: 4 * MIB] == source.read_bytes()
