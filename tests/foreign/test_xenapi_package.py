"""XenServer's own Python package, over every transport that it has."""

import os
import ssl
import tempfile
import xmlrpc.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import XenAPI

from tests.system.site import MIB, Site

Connect = Callable[[Callable[[Site], Any]], Any]


@pytest.fixture
def connect(site: Site) -> Iterator[Connect]:
    """Makes sessions; at the end their connections are closed, for which the package itself has no word."""
    sessions = []

    def make(kind: Callable[[Site], Any]) -> Any:
        sessions.append(kind(site))
        return sessions[-1]

    yield make
    for session in sessions:
        session("close")()


def over_http(site: Site) -> Any:
    return XenAPI.Session(site.gateway.url)


def over_http_without_slash(site: Site) -> Any:
    return XenAPI.Session(site.gateway.url.rstrip("/"))


def over_https(site: Site) -> Any:
    context = ssl.create_default_context(cafile=str(site.gateway.ca_file))
    return XenAPI.Session(site.gateway.https_url, transport=xmlrpc.client.SafeTransport(context=context))


def over_https_unverified(site: Site) -> Any:
    return XenAPI.Session(site.gateway.https_url, ignore_ssl=True)


def record(site: Site, **fields: Any) -> dict[str, Any]:
    return {
        "name_label": "from the package",
        "name_description": "",
        "SR": site.repository,
        "virtual_size": str(4 * MIB),
        "type": "user",
        "sharable": False,
        "read_only": False,
        "other_config": {},
        **fields,
    }


@pytest.mark.parametrize("kind", [over_http, over_http_without_slash, over_https, over_https_unverified])
def test_session_logs_in_works_and_logs_out(site: Site, connect: Connect, kind: Any) -> None:
    session = connect(kind)
    session.login_with_password("root", site.gateway.password, "1.0", "tests")
    handle = session.handle
    assert session.API_version.startswith("2.")
    [pool] = session.xenapi.pool.get_all()
    master = session.xenapi.pool.get_master(pool)
    assert session.xenapi.session.get_this_host(handle) == master
    assert session.xenapi.host.get_software_version(master)["product_version"]
    vdi = session.xenapi.VDI.create(record(site))
    assert session.xenapi.VDI.get_virtual_size(vdi) == str(4 * MIB)
    session.xenapi.VDI.destroy(vdi)
    session.xenapi.session.logout()
    assert session.handle is None
    late = connect(kind)
    late._session = handle
    with pytest.raises(xmlrpc.client.Fault, match="must log in"):  # what it makes of SESSION_INVALID
        late.xenapi.VDI.get_all()


def test_failures_carry_code_and_parameters(site: Site, connect: Connect) -> None:
    session = connect(over_http)
    with pytest.raises(XenAPI.Failure) as refused:
        session.login_with_password("root", "wrong", "1.0", "tests")
    assert refused.value.details[0] == "SESSION_AUTHENTICATION_FAILED"
    session.xenapi.login_with_password("root", site.gateway.password)
    expected = {
        ("VDI", "get_record", "OpaqueRef:NULL"): ["HANDLE_INVALID", "VDI", "OpaqueRef:NULL"],
        ("VDI", "get_by_uuid", "nothing"): ["UUID_INVALID", "VDI", "nothing"],
        ("VDI", "levitate", "x"): ["MESSAGE_METHOD_UNKNOWN", "VDI.levitate"],
    }
    for (name, method, parameter), details in expected.items():
        with pytest.raises(XenAPI.Failure) as failure:
            getattr(getattr(session.xenapi, name), method)(parameter)
        assert failure.value.details == details
    with pytest.raises(XenAPI.Failure) as count:
        session.xenapi.VDI.get_record()
    assert count.value.details[0] == "MESSAGE_PARAMETER_COUNT_MISMATCH"
    session.xenapi.session.logout()


def test_a_session_that_ended_is_renewed_by_the_package(site: Site, connect: Connect) -> None:
    session = connect(over_http)
    session.login_with_password("root", site.gateway.password, "1.0", "tests")
    first = session.handle
    other = connect(over_http)
    other._session = first
    other.session.logout(first)
    assert isinstance(session.xenapi.VDI.get_all(), list)
    assert session.handle != first
    session.xenapi.session.logout()


def test_a_whole_record_is_good_enough_to_create_its_like(site: Site, connect: Connect) -> None:
    session = connect(over_http)
    session.login_with_password("root", site.gateway.password, "1.0", "tests")
    first = session.xenapi.VDI.create(record(site, other_config={"key": "value"}, tags=["tag"]))
    whole = session.xenapi.VDI.get_record(first)
    second = session.xenapi.VDI.create(whole)
    like = session.xenapi.VDI.get_record(second)
    assert like["uuid"] != whole["uuid"]
    for name in ("name_label", "virtual_size", "other_config", "tags", "SR", "type"):
        assert like[name] == whole[name]
    for vdi in (first, second):
        session.xenapi.VDI.destroy(vdi)
    session.xenapi.session.logout()


def test_event_loop_of_the_samples_sees_a_vdi_come_change_and_go(site: Site, connect: Connect) -> None:
    watcher, worker = connect(over_http), connect(over_http)
    for session in (watcher, worker):
        session.login_with_password("root", site.gateway.password, "1.0", "tests")
    first = watcher.xenapi.event_from(["*"], "", 0.0)
    assert {"pool", "host", "sr"} <= {event["class"] for event in first["events"]}
    token = first["token"]
    vdi = worker.xenapi.VDI.create(record(site))
    seen: list[tuple[str, str]] = []

    def follow(until: str) -> None:
        nonlocal token
        while not any(operation == until for operation, _ in seen):
            output = watcher.xenapi.event_from(["VDI"], token, 30.0)
            token = output["token"]
            for event in output["events"]:
                assert event["class"] == "vdi"
                if event["ref"] == vdi:
                    seen.append((event["operation"], event.get("snapshot", {}).get("name_label", "")))

    follow("add")
    worker.xenapi.VDI.set_name_label(vdi, "changed")
    follow("mod")
    worker.xenapi.VDI.destroy(vdi)
    follow("del")
    assert seen[0] == ("add", "from the package")
    assert ("mod", "changed") in seen
    assert seen[-1][0] == "del"
    for session in (watcher, worker):
        session.xenapi.session.logout()


@pytest.fixture
def unix_session(site: Site, connect: Connect) -> Iterator[Any]:
    """A session as xapi_local makes it, over the gateway's own socket."""
    # UDSTransport turns underscores into slashes, so the path on the way there must have none.
    directory = Path(tempfile.gettempdir()) / f"vdi-gateway-{os.urandom(6).hex()}"
    directory.symlink_to(site.gateway.state_dir)
    host = str(directory / "xapi.sock").replace("/", "_")
    try:
        yield connect(lambda _site: XenAPI.Session(f"http://{host}/", transport=XenAPI.UDSTransport()))
    finally:
        directory.unlink()


def test_unix_socket_serves_the_same_session(site: Site, unix_session: Any) -> None:
    unix_session.login_with_password("root", site.gateway.password, "1.0", "tests")
    vdi = unix_session.xenapi.VDI.create(record(site))
    uuid = unix_session.xenapi.VDI.get_uuid(vdi)
    assert site.gateway.call("VDI.get_by_uuid", uuid) == vdi
    unix_session.xenapi.VDI.destroy(vdi)
    unix_session.xenapi.session.logout()


def test_unix_socket_asks_its_owner_for_no_password(site: Site, unix_session: Any) -> None:
    unix_session.login_with_password("root", "", "1.0", "tests")
    assert site.repository in unix_session.xenapi.SR.get_all()
    unix_session.xenapi.session.logout()
