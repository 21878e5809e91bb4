"""Node's xen-api, the library that Xen Orchestra stands on, over both of its transports."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign.programs import NodeProgram
from tests.system.site import MIB, Site, stored_content

Maker = Callable[[int], Path]
both_transports = pytest.mark.parametrize("transport", ["json-rpc", "xml-rpc"])


@both_transports
def test_objects_cache_fills_and_follows_every_change(
    site: Site, xen_api: NodeProgram, transport: str
) -> None:
    found = xen_api("objects.mjs", site.gateway, transport=transport, sr=site.repository)
    assert found["types"]["pool"] == found["types"]["host"] == 1
    assert found["types"]["SR"] >= 1
    assert found["types"]["PBD"] >= 1
    assert "VDI" in found["added"]
    created, changed = found["created"], found["changed"]
    size = 4 * MIB if transport == "json-rpc" else str(4 * MIB)
    assert created["virtual_size"] == found["size"] == size
    assert created["SR"] == site.repository
    assert created["other_config"] == {"xo:test": "yes"}
    assert found["repository"] == site.gateway.call("SR.get_name_label", site.repository)
    assert changed["name_label"] == "renamed & <odd> \u00e9\U0001f4be"
    assert changed["other_config"] == {"xo:test": "yes", "xo:import:task": "OpaqueRef:x", "empty": ""}
    assert sorted(changed["tags"]) == ["one", "two"]
    assert found["fetched"] == changed
    assert found["removed"] == {"xo:test": "yes", "empty": ""}
    assert found["afterwards"] is None
    assert found["warnings"] == []


@both_transports
def test_errors_keep_their_code_and_parameters(site: Site, xen_api: NodeProgram, transport: str) -> None:
    found = xen_api("objects.mjs", site.gateway, transport=transport, sr=site.repository)
    assert found["unknown"]["code"] == "HANDLE_INVALID"
    assert found["unknown"]["params"][0] == "VDI"
    assert found["method"]["code"] == "MESSAGE_METHOD_UNKNOWN"
    assert found["method"]["params"] == ["VDI.levitate"]
    assert found["type"]["code"] == "FIELD_TYPE_ERROR"


def test_transport_is_chosen_and_the_certificate_verified_over_https(
    site: Site, xen_api: NodeProgram
) -> None:
    found = xen_api("objects.mjs", site.gateway, scheme="https", sr=site.repository)
    # Numbers are numbers in JSON-RPC only: xen-api's "auto" has stayed with its first choice.
    assert found["size"] == 4 * MIB
    assert found["warnings"] == []


@both_transports
def test_tasks_settle_in_watchers_with_results_and_errors(
    site: Site, xen_api: NodeProgram, transport: str
) -> None:
    found = xen_api("tasks.mjs", site.gateway, transport=transport, sr=site.repository)
    assert found["vdi"].startswith("OpaqueRef:")
    assert found["created"] == "asynchronous"
    assert found["scanned"] == found["destroyed"] == ""
    assert found["failed"] == {
        "code": "HANDLE_INVALID",
        "params": ["VDI", found["vdi"]],
        "status": "failure",
        "error_info": ["HANDLE_INVALID", "VDI", found["vdi"]],
    }
    assert found["half"] == 0.5
    assert found["result"] == ""
    assert found["cancellation"]["message"] == "task canceled"
    assert found["warnings"] == []


@both_transports
@pytest.mark.parametrize("body", ["bytes", "stream with length", "stream"])
def test_put_resource_fills_a_vdi(
    site: Site, xen_api: NodeProgram, random_file: Maker, transport: str, body: str
) -> None:
    source, vdi = random_file(4 * MIB), site.create_vdi(4 * MIB)
    found = xen_api(
        "put.mjs", site.gateway, transport=transport, file=str(source), vdi=vdi.ref, body=body, query={}
    )
    # The result of the task is an XML-RPC value; xen-api has read the reference out of it.
    assert found["result"] == {"value": vdi.ref}
    assert found["task"] == {"result": vdi.ref}
    assert stored_content(vdi) == source.read_bytes()
    told = [line for line in found["warnings"] if not line.endswith("missing length")]
    assert told == []
    assert len(found["warnings"]) == (body == "stream")


def test_put_resource_over_https_with_the_length_unknown(
    site: Site, xen_api: NodeProgram, random_file: Maker
) -> None:
    source, vdi = random_file(4 * MIB), site.create_vdi(4 * MIB)
    found = xen_api(
        "put.mjs", site.gateway, scheme="https", file=str(source), vdi=vdi.uuid, body="stream", query={}
    )
    assert found["result"] == {"value": vdi.ref}
    assert stored_content(vdi) == source.read_bytes()


@pytest.mark.parametrize(
    ("body", "code"), [("stream with length", "VDI_TOO_SMALL"), ("stream", "VDI_TOO_SMALL")]
)
def test_put_resource_of_too_many_bytes_fails_and_leaves_the_vdi(
    site: Site, xen_api: NodeProgram, random_file: Maker, body: str, code: str
) -> None:
    first, vdi = random_file(2 * MIB), site.create_vdi(2 * MIB)
    xen_api("put.mjs", site.gateway, file=str(first), vdi=vdi.ref, body="stream with length", query={})
    found = xen_api("put.mjs", site.gateway, file=str(random_file(6 * MIB)), vdi=vdi.ref, body=body, query={})
    assert found["task"]["error"]["code"] == code
    assert "value" not in found["result"]
    assert stored_content(vdi) == first.read_bytes()


def test_put_resource_that_ends_early_without_length_fails(
    site: Site, xen_api: NodeProgram, random_file: Maker
) -> None:
    vdi = site.create_vdi(4 * MIB)
    found = xen_api(
        "put.mjs", site.gateway, file=str(random_file(1 * MIB)), vdi=vdi.ref, body="stream", query={}
    )
    assert found["result"]["error"]["code"] == "IMPORT_ERROR_LENGTH_REQUIRED"
    assert found["task"]["error"]["params"] == [str(4 * MIB), str(1 * MIB)]
    assert stored_content(vdi) == bytes(4 * MIB)


def test_cancelling_the_task_stops_an_upload(site: Site, xen_api: NodeProgram, random_file: Maker) -> None:
    vdi = site.create_vdi(8 * MIB)
    found = xen_api(
        "put.mjs",
        site.gateway,
        file=str(random_file(4 * MIB)),
        vdi=vdi.ref,
        body="stream that stalls",
        query={},
    )
    assert found["task"]["error"]["message"] == "task canceled"
    assert "value" not in found["result"]
    assert stored_content(vdi) == bytes(8 * MIB)


@both_transports
def test_get_resource_gives_the_disk_and_ends_its_task(
    site: Site, xen_api: NodeProgram, random_file: Maker, tmp_path: Path, transport: str
) -> None:
    source, vdi, copy = random_file(6 * MIB), site.create_vdi(6 * MIB), tmp_path / "copy"
    xen_api("put.mjs", site.gateway, file=str(source), vdi=vdi.ref, body="bytes", query={})
    found = xen_api("get.mjs", site.gateway, transport=transport, file=str(copy), vdi=vdi.ref)
    assert found["statusCode"] == 200
    assert found["length"] == str(6 * MIB)
    assert found["type"] == "application/octet-stream"
    assert "result" in found["task"]
    assert copy.read_bytes() == source.read_bytes()
    assert found["warnings"] == []


def test_a_download_dropped_on_purpose_is_quiet_and_frees_the_vdi(site: Site, xen_api: NodeProgram) -> None:
    vdi = site.create_vdi(64 * MIB, image_format="raw")
    found = xen_api("get.mjs", site.gateway, vdi=vdi.ref, drop=True)
    assert found["statusCode"] == 200
    assert found["read"] < vdi.size
    site.gateway.call("VDI.destroy", vdi.ref)
    assert not vdi.file.exists()
    loud = [line for line in site.gateway.log().splitlines() if '"level": "error"' in line]
    assert loud == []
