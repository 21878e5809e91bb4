from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from gateway.core.clock import EPOCH
from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.core.passwords import Passwords
from gateway.core.refs import NULL_REF
from gateway.core.roles import Role
from gateway.core.sessions import Sessions
from gateway.core.users import Users
from gateway.repository.inventory import Inventory, Where
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.dispatch import Api
from gateway.xenapi.types import moment_text

from .estate_for_tests import ADMIN, CALLER, Site

MIB = 1 << 20


async def refusal(site: Site, name: str, *params: Any) -> list[str]:
    with pytest.raises(XenAPIError) as refused:
        await site.call(name, *params)
    return refused.value.error_info


@pytest.fixture
async def live(site: Site) -> AsyncIterator[Site]:
    """The site with a real inventory."""
    estate = site.estate
    async with Inventory.open(estate.records, estate.leases, site.events, who="test") as inventory:
        async with trio.open_nursery() as nursery:
            yield replace(site, api=Api(replace(estate, inventory=inventory), nursery, CLASSES))
            nursery.cancel_scope.cancel()


def inventory_of(site: Site) -> Inventory:
    return site.api._estate.inventory


async def sr_of(site: Site, path: Path) -> str:
    host = site.estate.records.this_host.ref
    device_config = {"location": str(path)}
    sr: str = await site.call(
        "SR.create", ADMIN, host, device_config, "0", "local", "disks", "file", "user", False, {"a": "b"}
    )
    return sr


async def vdi_of(site: Site, sr: str, **more: Any) -> str:
    record = {"SR": sr, "virtual_size": str(3 * MIB), "name_label": "disk", **more}
    vdi: str = await site.call("VDI.create", ADMIN, record)
    return vdi


async def test_an_sr_and_a_vdi_live_and_die(live: Site, tmp_path: Path) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    record = await live.call("SR.get_record", ADMIN, sr)
    assert (record["name_label"], record["name_description"]) == ("local", "disks")
    assert record["physical_size"] > 0
    assert "scan" in record["allowed_operations"]
    vdi = await vdi_of(live, sr)
    assert await live.call("VDI.get_virtual_size", ADMIN, vdi) == 4 * MIB
    assert await live.call("SR.get_VDIs", ADMIN, sr) == (vdi,)
    await live.call("SR.scan", ADMIN, sr)
    await live.call("SR.update", ADMIN, sr)
    await live.call("VDI.destroy", ADMIN, vdi)
    assert await refusal(live, "VDI.get_uuid", ADMIN, vdi) == ["HANDLE_INVALID", "VDI", vdi]
    (pbd,) = record["PBDs"]
    assert (await refusal(live, "SR.destroy", ADMIN, sr))[0] == "SR_HAS_PBD"
    await live.call("PBD.unplug", ADMIN, pbd)
    assert await live.call("SR.get_allowed_operations", ADMIN, sr) == ("plug", "destroy", "forget")
    await live.call("PBD.plug", ADMIN, pbd)
    await live.call("PBD.unplug", ADMIN, pbd)
    await live.call("SR.destroy", ADMIN, sr)
    assert await live.call("SR.get_all", ADMIN) == []
    assert await live.call("PBD.get_all_records", ADMIN) == {}


async def test_an_sr_that_was_forgotten_is_introduced_again_with_its_vdis(live: Site, tmp_path: Path) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    uuid = await live.call("VDI.get_uuid", ADMIN, await vdi_of(live, sr))
    record = await live.call("SR.get_record", ADMIN, sr)
    (pbd,) = record["PBDs"]
    pbd_record = await live.call("PBD.get_record", ADMIN, pbd)
    await live.call("PBD.unplug", ADMIN, pbd)
    await live.call("SR.forget", ADMIN, sr)
    sr = await live.call("SR.introduce", ADMIN, record["uuid"], "again", "", "file", "user", True)
    pbd = await live.call("PBD.create", ADMIN, {**pbd_record, "SR": sr})
    await live.call("PBD.plug", ADMIN, pbd)
    vdi = await live.call("VDI.get_by_uuid", ADMIN, uuid)
    assert await live.call("VDI.get_name_label", ADMIN, vdi) == "disk"
    await live.call("VDI.forget", ADMIN, vdi)
    assert await live.call("VDI.get_all", ADMIN) == []


async def test_a_vdi_is_created_from_a_complete_record_of_another(live: Site, tmp_path: Path) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    first = await vdi_of(live, sr, tags=["a"], other_config={"k": "v"})
    record = await live.call("VDI.get_record", ADMIN, first)
    # As both codecs hand it back to a client, which sends it as it came.
    sent = {**record, "snapshot_time": moment_text(record["snapshot_time"])}
    for name in ("virtual_size", "physical_utilisation"):
        sent[name] = str(record[name])
    second = await live.call("VDI.create", ADMIN, sent)
    assert second != first
    copy = await live.call("VDI.get_record", ADMIN, second)
    assert copy["uuid"] != record["uuid"]
    for name in ("SR", "virtual_size", "name_label", "tags", "other_config", "type"):
        assert copy[name] == record[name]


async def test_what_a_vdi_needs_to_be_created_is_asked_for_by_name(site: Site) -> None:
    assert await refusal(site, "VDI.create", ADMIN, {"SR": "x"}) == ["FIELD_TYPE_ERROR", "virtual_size"]
    assert await refusal(site, "VDI.create", ADMIN, {"SR": "x", "virtual_size": "large"}) == [
        "FIELD_TYPE_ERROR",
        "virtual_size",
    ]
    assert (await refusal(site, "VDI.create", ADMIN, {"SR": "x", "virtual_size": 1, "type": "odd"}))[:3] == [
        "VALUE_NOT_SUPPORTED",
        "type",
        "odd",
    ]


TRACKING = ("enable_cbt", "disable_cbt")
EVERYTHING = ("snapshot", "clone", "copy", "destroy", "resize", *TRACKING)


@pytest.mark.parametrize(
    ("mode", "allowed"),
    [
        (LeaseMode.READ, ("snapshot", "clone", "copy", *TRACKING)),
        (LeaseMode.REPLACE, ("copy", *TRACKING)),
        (LeaseMode.WRITE, TRACKING),
    ],
)
async def test_operations_of_a_vdi_are_those_of_its_leases(
    live: Site, tmp_path: Path, mode: LeaseMode, allowed: tuple[str, ...]
) -> None:
    vdi = await vdi_of(live, await sr_of(live, tmp_path / "sr"))
    assert await live.call("VDI.get_allowed_operations", ADMIN, vdi) == EVERYTHING
    lease = await inventory_of(live).lease(vdi, mode, Holder("root", "import", vdi))
    try:
        (dummy,) = await live.call("VDI.get_current_operations", ADMIN, vdi)
        assert dummy.startswith("DummyRef:|")
        lease.work_under("OpaqueRef:task")
        assert await live.call("VDI.get_current_operations", ADMIN, vdi) == {"OpaqueRef:task": "import"}
        assert await live.call("VDI.get_allowed_operations", ADMIN, vdi) == allowed
    finally:
        lease.release()
        await lease.released()
    assert await live.call("VDI.get_current_operations", ADMIN, vdi) == {}
    assert await live.call("VDI.get_allowed_operations", ADMIN, vdi) == EVERYTHING


async def test_snapshots_and_clones_are_vdis_that_know_where_they_come_from(
    live: Site, tmp_path: Path
) -> None:
    vdi = await vdi_of(live, await sr_of(live, tmp_path / "sr"))
    taken = await live.call("VDI.snapshot", ADMIN, vdi)
    clone = await live.call("VDI.clone", ADMIN, taken, {"ignored": "yes"})
    record = await live.call("VDI.get_record", ADMIN, taken)
    assert (record["is_a_snapshot"], record["snapshot_of"]) == (True, vdi)
    assert await live.call("VDI.get_snapshots", ADMIN, vdi) == (taken,)
    assert await live.call("VDI.get_is_a_snapshot", ADMIN, clone) is False
    (base,) = [
        other
        for other in (await live.call("VDI.get_all_records", ADMIN)).values()
        if other["name_label"] == "base copy"
    ]
    assert (base["managed"], record["sm_config"]["vhd-parent"]) == (False, base["uuid"])
    assert await live.call("VDI.get_allowed_operations", ADMIN, taken) == (
        "snapshot",
        "clone",
        "copy",
        "revert",
        "destroy",
        "resize",
    )
    await live.call("VDI.revert", ADMIN, taken, {})
    assert (await refusal(live, "VDI.revert", ADMIN, vdi))[0] == "OPERATION_NOT_ALLOWED"
    assert (await refusal(live, "VDI.snapshot", "vm-operator", vdi))[0] == "RBAC_PERMISSION_DENIED"


async def test_an_asynchronous_destroy_shows_its_task_to_others(site: Site) -> None:
    task = await site.call("Async.VDI.destroy", "vm-admin", "OpaqueRef:x")
    while not site.inventory.calls:
        await trio.lowlevel.checkpoint()
    assert site.inventory.calls == [
        ("vdi_destroy", ("OpaqueRef:x",), {"who": "vm-admin at 192.0.2.1", "task": task})
    ]


async def test_an_sr_on_another_host_is_made_known(live: Site) -> None:
    uuid = "0d5b4a44-7b0c-4f2e-9a3e-6f2a55a0c001"
    host = await live.call("host.create", ADMIN, "", "other", "", "other.test", "other.test:8443")
    sr = await live.call("SR.introduce", ADMIN, uuid, "there", "", "file", "user", True, {})
    pbd = await live.call("PBD.create", ADMIN, {"host": host, "SR": sr, "device_config": {}})
    assert inventory_of(live).where_is(sr) is Where.NOWHERE
    await live.call("PBD.plug", ADMIN, pbd)
    assert inventory_of(live).where_is(sr) == live.estate.records.hosts.get(host)
    assert await live.call("host.get_PBDs", ADMIN, host) == (pbd,)
    assert (await refusal(live, "host.destroy", ADMIN, host))[0] == "OPERATION_NOT_ALLOWED"
    await live.call("PBD.unplug", ADMIN, pbd)
    await live.call("PBD.destroy", ADMIN, pbd)
    await live.call("host.destroy", ADMIN, host)
    assert len(await live.call("host.get_all", ADMIN)) == 1


@pytest.mark.parametrize(
    "address",
    ["", "a b", "a\r\nb", "a/b", "user@host", "[::1", "::1", "-a", "a:b", "a:123456", "http://a", "é"],
)
async def test_a_host_is_reached_at_an_address_and_nothing_else(site: Site, address: str) -> None:
    create = ("host.create", ADMIN, "", "n", "", "h", address)
    assert (await refusal(site, *create))[:2] == ["VALUE_NOT_SUPPORTED", "address"]
    host = site.estate.records.this_host.ref
    assert (await refusal(site, "host.set_address", ADMIN, host, address))[0] == "VALUE_NOT_SUPPORTED"


@pytest.mark.parametrize("address", ["a", "10.0.0.1", "10.0.0.1:8080", "[::1]", "[fe80::1]:443", "a-b.test"])
async def test_every_form_of_an_address_will_do(site: Site, address: str) -> None:
    host = await site.call("host.create", ADMIN, "", "n", "", "h", address)
    assert await site.call("host.get_address", ADMIN, host) == address


async def test_a_host_has_one_uuid_and_a_gateway_cannot_forget_itself(site: Site) -> None:
    this = site.estate.records.this_host
    create = ("n", "", "h", "a")
    assert (await refusal(site, "host.create", ADMIN, this.uuid, *create))[0] == "VALUE_NOT_SUPPORTED"
    assert (await refusal(site, "host.create", ADMIN, "no uuid", *create))[0] == "VALUE_NOT_SUPPORTED"
    assert (await refusal(site, "host.destroy", ADMIN, this.ref))[0] == "OPERATION_NOT_ALLOWED"
    await site.call("host.disable", ADMIN, this.ref)
    assert await site.call("host.get_enabled", ADMIN, this.ref) is False
    await site.call("host.enable", ADMIN, this.ref)
    assert await site.call("host.get_enabled", ADMIN, this.ref) is True


async def test_an_sr_is_created_on_this_host_from_a_directory_of_a_known_type(site: Site) -> None:
    this = site.estate.records.this_host.ref
    other = await site.call("host.create", ADMIN, "", "n", "", "h", "a")
    rest = ("0", "n", "d", "file", "user", False)
    assert await refusal(site, "SR.create", ADMIN, "x", {}, *rest) == ["HANDLE_INVALID", "host", "x"]
    assert (await refusal(site, "SR.create", ADMIN, other, {}, *rest))[:2] == ["VALUE_NOT_SUPPORTED", "host"]
    assert (await refusal(site, "SR.create", ADMIN, this, {}, *rest))[:2] == [
        "VALUE_NOT_SUPPORTED",
        "device_config:location",
    ]
    rest = ("0", "n", "d", "lvm", "user", False)
    assert await refusal(site, "SR.create", ADMIN, this, {}, *rest) == ["SR_UNKNOWN_DRIVER", "lvm"]
    introduce = ("SR.introduce", ADMIN, "u", "n", "d", "lvm", "user", False)
    assert await refusal(site, *introduce) == ["SR_UNKNOWN_DRIVER", "lvm"]
    assert await site.call("SR.get_supported_types", ADMIN) == ("file",)


async def test_fields_are_set_and_searched(site: Site) -> None:
    host = site.estate.records.this_host.ref
    counter = site.events.counter
    await site.call("host.set_name_label", ADMIN, host, "one")
    assert site.events.counter > counter
    assert await site.call("host.get_by_name_label", ADMIN, "one") == [host]
    assert await site.call("host.get_by_name_label", ADMIN, "two") == []
    uuid = await site.call("host.get_uuid", ADMIN, host)
    assert await site.call("host.get_by_uuid", ADMIN, uuid) == host
    assert (await refusal(site, "host.get_by_uuid", ADMIN, "x"))[0] == "UUID_INVALID"
    assert (await refusal(site, "host.set_name_label", ADMIN, host, 3)) == ["FIELD_TYPE_ERROR", "value"]
    assert (await refusal(site, "host.set_name_label", ADMIN, "x", "y"))[0] == "HANDLE_INVALID"


async def test_a_map_gains_and_loses_keys(site: Site) -> None:
    pool = site.estate.records.pool.ref
    await site.call("pool.add_to_other_config", ADMIN, pool, "k", "v")
    duplicate = ("pool.add_to_other_config", ADMIN, pool, "k", "w")
    assert await refusal(site, *duplicate) == ["MAP_DUPLICATE_KEY", "pool", "other_config", pool, "k"]
    await site.call("pool.remove_from_other_config", ADMIN, pool, "k")
    counter = site.events.counter
    await site.call("pool.remove_from_other_config", ADMIN, pool, "k")
    assert site.events.counter == counter
    await site.call("pool.set_other_config", ADMIN, pool, {"a": "b"})
    assert await site.call("pool.get_other_config", ADMIN, pool) == {"a": "b"}


async def test_keys_that_are_added_at_once_are_all_there(site: Site) -> None:
    pool = site.estate.records.pool.ref
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(site.call, "pool.add_to_other_config", ADMIN, pool, str(number), "")
    assert len(site.estate.records.pool.other_config) == 20


async def test_a_set_gains_and_loses_elements(site: Site) -> None:
    pool = site.estate.records.pool.ref
    for tag in ("a", "b", "a"):
        await site.call("pool.add_tags", ADMIN, pool, tag)
    assert await site.call("pool.get_tags", ADMIN, pool) == ("a", "b")
    for tag in ("a", "c"):
        await site.call("pool.remove_tags", ADMIN, pool, tag)
    assert await site.call("pool.get_tags", ADMIN, pool) == ("b",)


async def test_the_default_sr_is_one_that_is_there_or_none(live: Site, tmp_path: Path) -> None:
    pool = live.estate.records.pool.ref
    sr = await sr_of(live, tmp_path / "sr")
    await live.call("pool.set_default_SR", ADMIN, pool, sr)
    assert await live.call("pool.get_default_SR", ADMIN, pool) == sr
    assert (await refusal(live, "pool.set_default_SR", ADMIN, pool, "x"))[0] == "HANDLE_INVALID"
    for null in (NULL_REF, ""):
        await live.call("pool.set_default_SR", ADMIN, pool, null)
        assert await live.call("pool.get_default_SR", ADMIN, pool) == NULL_REF


async def test_a_client_works_on_a_task_of_its_own(site: Site) -> None:
    task = await site.call("task.create", "read-only", "label", "description")
    await site.call("task.set_progress", "read-only", task, 0.5)
    await site.call("task.add_to_other_config", "read-only", task, "k", "v")
    record = await site.call("task.get_record", "read-only", task)
    assert (record["name_label"], record["progress"], record["status"]) == ("label", 0.5, "pending")
    assert (record["other_config"], record["finished"]) == ({"k": "v"}, EPOCH)
    assert record["allowed_operations"] == ("cancel", "destroy")
    assert await site.call("task.get_by_name_label", "read-only", "label") == [task]
    await site.call("task.set_result", "read-only", task, "<value/>")
    await site.call("task.set_status", "read-only", task, "success")
    record = await site.call("task.get_record", "read-only", task)
    assert (record["status"], record["progress"], record["result"]) == ("success", 1.0, "<value/>")
    assert record["allowed_operations"] == ("destroy",)
    await site.call("task.destroy", "read-only", task)
    assert await site.call("task.get_all_records", "read-only") == {}


async def test_a_task_without_work_is_cancelled_at_once(site: Site) -> None:
    task = await site.call("task_create", ADMIN, "label", "")
    await site.call("task_cancel", ADMIN, task)
    assert await site.call("task_get_status", ADMIN, task) == "cancelled"
    assert (await site.call("task.get_error_info", ADMIN, task))[0] == "TASK_CANCELLED"


@pytest.mark.parametrize(
    ("message", "params"),
    [
        ("destroy", ()),
        ("cancel", ()),
        ("set_progress", (0.5,)),
        ("set_status", ("success",)),
        ("set_other_config", ({},)),
        ("add_to_other_config", ("k", "v")),
        ("remove_from_other_config", ("k",)),
    ],
)
async def test_the_tasks_of_others_take_a_pool_operator(
    site: Site, message: str, params: tuple[Any, ...]
) -> None:
    task = await site.call("task.create", "vm-admin", "label", "")
    stranger = Role.VM_OPERATOR.wire_name
    denied = await refusal(site, f"task.{message}", stranger, task, *params)
    assert denied[0] == "RBAC_PERMISSION_DENIED"
    await site.call(f"task.{message}", Role.POOL_OPERATOR.wire_name, task, *params)


@pytest.fixture
async def real_sessions(site: Site) -> Site:
    users = await Users.load(site.estate.records.hosts._database, Passwords())
    await users.create("root", "p\x01w", Role.POOL_ADMIN)
    sessions = await Sessions.load(site.estate.records.hosts._database, users)
    estate = replace(site.estate, sessions=sessions)
    return replace(site, api=Api(estate, cast("Any", None), CLASSES), estate=estate)


async def test_a_session_begins_shows_itself_and_ends(real_sessions: Site) -> None:
    site = real_sessions
    refs = [
        await site.call("session.login_with_password", "root", "p\x01w", *more)
        for more in ((), ("1.0",), ("1.0", "a client"))
    ]
    session = refs[-1]
    record = await site.call("session.get_record", session, session)
    assert (record["originator"], record["auth_user_name"]) == ("a client", "root")
    assert session not in str(record)
    assert await site.call("session.get_uuid", session, session) == record["uuid"]
    assert await site.call("session.get_this_host", session, session) == site.estate.records.this_host.ref
    assert await refusal(site, "session.get_uuid", session, "x") == ["HANDLE_INVALID", "session", "x"]
    await site.call("session.logout", session)
    assert (await refusal(site, "session.logout", session))[0] == "SESSION_INVALID"
    assert await site.call("VDI.get_all", refs[0]) == []


async def test_a_wrong_password_opens_no_session(real_sessions: Site) -> None:
    wrong = await refusal(real_sessions, "session.login_with_password", "root", "wrong")
    assert wrong[:2] == ["SESSION_AUTHENTICATION_FAILED", "root"]
    assert "wrong" not in wrong[1]


async def test_a_client_learns_the_version_of_the_api(site: Site) -> None:
    (pool,) = await site.call("pool.get_all", ADMIN)
    host = await site.call("pool.get_master", ADMIN, pool)
    major = await site.call("host.get_API_version_major", ADMIN, host)
    assert (major, await site.call("host.get_API_version_minor", ADMIN, host)) == (2, 21)
    assert isinstance(await site.call("host.get_software_version", ADMIN, host), dict)


async def test_others_get_their_turn_while_many_records_are_built(site: Site) -> None:
    for _ in range(3):
        await site.call("task.create", ADMIN, "label", "")
    tasks = site.estate.tasks.all()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    class ManyTasks:
        def all(self) -> list[Any]:
            return [replace(tasks[0], ref=f"OpaqueRef:{number}") for number in range(3000)]

        def can_cancel(self, _ref: str) -> bool:
            return True

        def subtasks_of(self, _ref: str) -> list[Any]:
            return []

    api = Api(replace(site.estate, tasks=cast("Any", ManyTasks())), cast("Any", None), CLASSES)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        records = await api.call("task.get_all_records", [ADMIN], CALLER)
        nursery.cancel_scope.cancel()
    assert isinstance(records, dict)
    assert len(records) == 3000
    assert turns >= 3
