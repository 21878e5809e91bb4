import errno
import io
import xmlrpc.client
from typing import Any

import pytest
import trio
import trio.testing

from gateway.core.errors import XenAPIError
from gateway.core.log import configure
from gateway.core.roles import Role
from gateway.core.task import TaskStatus
from gateway.xenapi.datamodel import Call
from gateway.xenapi.jsonrpc import read_jsonrpc
from gateway.xenapi.xmlrpc import dump_value, read_xmlrpc
from tests.conftest import log_plainly

from .estate_for_tests import ADMIN, CALLER, Site, refusal


@pytest.mark.parametrize("name", ["VDI.get_all", "VDI_get_all", "vdi.get_all", "Vdi_get_all", "vDi.get_all"])
async def test_a_method_is_found_by_both_separators_and_its_class_in_any_case(site: Site, name: str) -> None:
    assert await site.call(name, ADMIN) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "_",
        "VDI",
        "VDI.",
        "VDI.get_ALL",
        "VDI.nothing",
        "VDI-get_all",
        "no.get_all",
        "Async.VDI.get_all",
    ],
)
async def test_an_unknown_method_is_refused_by_its_name(site: Site, name: str) -> None:
    assert await refusal(site, name, ADMIN) == ["MESSAGE_METHOD_UNKNOWN", name]


async def test_no_more_of_an_unknown_name_comes_back_than_a_name_is_long(site: Site) -> None:
    assert await refusal(site, "_" * 100_000) == ["MESSAGE_METHOD_UNKNOWN", "_" * 100]


async def test_the_number_of_parameters_is_checked_without_counting_the_session(site: Site) -> None:
    assert await refusal(site, "VDI.get_uuid", ADMIN) == [
        "MESSAGE_PARAMETER_COUNT_MISMATCH",
        "VDI.get_uuid",
        "1",
        "0",
    ]
    assert await refusal(site, "VDI.get_all", ADMIN, "x") == [
        "MESSAGE_PARAMETER_COUNT_MISMATCH",
        "VDI.get_all",
        "0",
        "1",
    ]


@pytest.mark.parametrize("session", [[], [None], [3], [""], ["OpaqueRef:unknown"]])
async def test_without_a_session_the_answer_is_session_invalid(site: Site, session: list[Any]) -> None:
    assert (await refusal(site, "VDI.get_all", *session))[0] == "SESSION_INVALID"


async def test_types_are_looked_at_only_after_the_session(site: Site) -> None:
    assert (await refusal(site, "VDI.get_uuid", "OpaqueRef:unknown", 3))[0] == "SESSION_INVALID"
    assert await refusal(site, "VDI.get_uuid", ADMIN, 3) == ["FIELD_TYPE_ERROR", "self"]


async def test_parameters_left_out_have_their_defaults(site: Site) -> None:
    host = site.estate.records.this_host.ref
    await site.call("SR.create", ADMIN, host, {"location": "/srv/sr"}, "0", "n", "d", "file", "user", False)
    ((_, _, keywords),) = site.inventory.calls
    assert keywords["sm_config"] == {}


def parameters(method: Any) -> list[Any]:
    """As many parameters as the method takes, of no type at all, so that nothing happens."""
    return [object() for _ in range(method.message.required)]


async def test_every_method_is_open_to_its_role_and_higher_ones_and_to_no_other(site: Site) -> None:
    for method in site.api.methods:
        if not method.message.session or method.name == "session.logout":
            continue
        for role in Role:
            try:
                await site.call(method.name, role.wire_name, *parameters(method))
                code = ""
            except XenAPIError as error:
                code = error.code
            denied = code == "RBAC_PERMISSION_DENIED"
            assert denied == (role < method.message.role), f"{method.name} as {role.wire_name}: {code}"
    assert site.inventory.calls == []


ROLES = {
    Role.POOL_ADMIN: {
        *["host.create", "host.destroy", "host.set_address", "host.set_hostname"],
        *["user.create", "user.destroy", "user.set_password", "user.set_role", "user.set_disabled"],
        *["network.add_purpose", "network.remove_purpose"],
        "session.get_all_records",
    },
    Role.POOL_OPERATOR: {
        *["SR.create", "SR.introduce", "SR.update", "SR.destroy", "SR.forget"],
        *["PBD.create", "PBD.plug", "PBD.unplug", "PBD.destroy", "host.enable", "host.disable"],
    },
    Role.VM_POWER_ADMIN: {"SR.scan"},
    Role.VM_ADMIN: {"VDI.create", "VDI.destroy", "VDI.forget", "VDI.get_nbd_info"},
    Role.VM_OPERATOR: {"VDI.list_changed_blocks"},
    Role.READ_ONLY: {
        *["event.from", "event.inject", "event.next", "event.register", "event.unregister"],
        "session.change_password",
        *["session.logout", "task.create", "task.destroy", "task.cancel", "task.set_status"],
        *["task.set_progress", "task.set_result", "task.set_error_info", "SR.get_supported_types"],
    },
}
SETTERS = {
    ("pool", Role.POOL_OPERATOR),
    ("host", Role.POOL_OPERATOR),
    ("host", Role.POOL_ADMIN),
    ("SR", Role.POOL_OPERATOR),
    ("PBD", Role.POOL_OPERATOR),
    ("VDI", Role.VM_ADMIN),
    ("task", Role.READ_ONLY),
}


async def test_what_each_role_may_do_is_as_in_xenserver(site: Site) -> None:
    by_hand = {name: role for role, names in ROLES.items() for name in names}
    for method in site.api.methods:
        name, role = method.name, method.message.role
        if name in by_hand:
            assert role is by_hand.pop(name), name
        elif method.message.name.startswith("get_") or not method.message.session:
            assert role is method.model.reader, name
        elif name.endswith(("_tags", "_gui_config")):
            assert role is Role.VM_OPERATOR, name
        else:
            assert (method.model.name, role) in SETTERS, name
    assert by_hand == {}


async def test_a_key_may_be_open_to_a_lower_role_than_its_map(site: Site) -> None:
    pool, role = site.estate.records.pool.ref, Role.VM_OPERATOR.wire_name
    await site.call("pool.add_to_other_config", role, pool, "folder", "/a")
    await site.call("pool.add_to_other_config", role, pool, "XenCenter.CustomFields.b", "c")
    await site.call("pool.remove_from_other_config", role, pool, "folder")
    assert site.estate.records.pool.other_config == {"XenCenter.CustomFields.b": "c"}
    denied = await refusal(site, "pool.add_to_other_config", role, pool, "other", "x")
    assert denied[:2] == ["RBAC_PERMISSION_DENIED", "pool.add_to_other_config"]
    denied = await refusal(site, "pool.add_to_other_config", "read-only", pool, "folder", "x")
    assert denied[:2] == ["RBAC_PERMISSION_DENIED", "pool.add_to_other_config/key:folder"]


async def test_what_fails_unexpectedly_is_an_internal_error(site: Site) -> None:
    site.inventory.answer = ZeroDivisionError("by zero")
    assert (await refusal(site, "VDI.destroy", ADMIN, "OpaqueRef:x"))[0] == "INTERNAL_ERROR"


async def test_the_log_of_a_failure_has_no_session(site: Site) -> None:
    log = io.StringIO()
    configure("debug", log)
    try:
        site.inventory.answer = ZeroDivisionError("by zero")
        await refusal(site, "VDI.destroy", ADMIN, "OpaqueRef:x")
    finally:
        log_plainly()
    assert "VDI.destroy" in log.getvalue()
    assert ADMIN not in log.getvalue()


@pytest.mark.parametrize("name", ["VDI.destroy", "Async.VDI.destroy"])
async def test_a_failing_storage_is_one_line_of_the_log_and_what_nobody_expects_has_a_traceback(
    site: Site, name: str
) -> None:
    log = io.StringIO()
    configure("debug", log)
    try:
        for error in (OSError(errno.EIO, "bad disk"), ZeroDivisionError("by zero")):
            site.inventory.answer = error
            if name.startswith("Async."):
                await finished(site, await site.call(name, ADMIN, "OpaqueRef:x"))
                await trio.testing.wait_all_tasks_blocked()
            else:
                await refusal(site, name, ADMIN, "OpaqueRef:x")
    finally:
        log_plainly()
    tracebacks = [line for line in log.getvalue().splitlines() if "Traceback" in line]
    assert "bad disk" in log.getvalue()
    assert len(tracebacks) == 1
    assert "by zero" in tracebacks[0]


async def test_methods_are_listed_without_a_session(site: Site) -> None:
    methods = await site.call("system.listMethods")
    assert {"VDI.create", "task.cancel", "pool.get_all_records", "session.login_with_password"} <= set(
        methods
    )
    assert "session.get_all_records" not in methods
    assert len(methods) == len(set(methods))


async def finished(site: Site, task: str) -> TaskStatus:
    while not site.estate.tasks.get(task).status.is_final:
        await site.events.wait_past(site.events.counter)
    return site.estate.tasks.get(task).status


async def test_an_asynchronous_call_answers_a_task_whose_result_is_xml(site: Site) -> None:
    args = {"SR": "OpaqueRef:sr", "virtual_size": "1"}
    task = await site.call("Async.VDI.create", "vm-admin", args)
    assert await finished(site, task) is TaskStatus.SUCCESS
    record = await site.call("task.get_record", ADMIN, task)
    assert record["result"] == "<value>OpaqueRef:answer</value>"
    assert record["name_label"] == "Async.VDI.create"
    assert record["progress"] == 1.0


async def test_the_result_of_an_asynchronous_call_without_one_is_empty(site: Site) -> None:
    task = await site.call("Async.VDI.destroy", ADMIN, "OpaqueRef:x")
    assert await finished(site, task) is TaskStatus.SUCCESS
    assert site.estate.tasks.get(task).result == ""


@pytest.mark.parametrize("error", [XenAPIError("VDI_IN_USE", "x", "y"), ZeroDivisionError("by zero")])
async def test_an_asynchronous_call_that_fails_tells_it_in_its_task(site: Site, error: Exception) -> None:
    site.inventory.answer = error
    task = await site.call("Async.VDI.destroy", ADMIN, "OpaqueRef:x")
    assert await finished(site, task) is TaskStatus.FAILURE
    code = error.code if isinstance(error, XenAPIError) else "INTERNAL_ERROR"
    assert site.estate.tasks.get(task).error_info[0] == code


async def test_an_asynchronous_call_is_cancelled_by_its_task(site: Site) -> None:
    site.inventory.before = trio.sleep_forever
    task = await site.call("Async.VDI.destroy", ADMIN, "OpaqueRef:x")
    await trio.testing.wait_all_tasks_blocked()
    await site.call("task.cancel", ADMIN, task)
    assert await finished(site, task) is TaskStatus.CANCELLED


async def test_an_asynchronous_call_is_refused_before_it_becomes_a_task(site: Site) -> None:
    assert (await refusal(site, "Async.VDI.destroy", "read-only", "x"))[0] == "RBAC_PERMISSION_DENIED"
    assert await refusal(site, "Async.VDI.destroy", ADMIN, 3) == ["FIELD_TYPE_ERROR", "self"]
    assert await site.call("task.get_all", ADMIN) == []


async def test_pythons_client_gets_its_answer_through_xmlrpc(site: Site) -> None:
    body = xmlrpc.client.dumps((ADMIN,), "pool.get_all_records").encode()
    (answer,), _ = xmlrpc.client.loads(await read_xmlrpc(body)(site.api, CALLER))
    assert isinstance(answer, dict)
    (pool,) = answer["Value"].values()
    assert pool["master"] == site.estate.records.this_host.ref


async def test_integers_are_numbers_through_jsonrpc_and_text_through_xmlrpc(site: Site) -> None:
    host = site.estate.records.this_host.ref
    json = await read_jsonrpc(
        f'{{"method": "host.get_API_version_major", "params": ["{ADMIN}", "{host}"], "id": 1}}'.encode()
    )(site.api, CALLER)
    assert json == b'{"result":2,"error":null,"id":1}'
    xml = await read_xmlrpc(xmlrpc.client.dumps((ADMIN, host), "host.get_API_version_major").encode())(
        site.api, CALLER
    )
    assert dump_value(2).encode() in xml


async def test_a_message_without_a_session_has_no_identity(site: Site) -> None:
    with pytest.raises(AssertionError):
        _ = Call(site.estate, CALLER, "m", "", None).identity
