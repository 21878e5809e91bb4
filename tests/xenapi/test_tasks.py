"""Tasks that clients make themselves, and who may change them."""

from typing import Any

import pytest

from gateway.core.clock import EPOCH
from gateway.core.roles import Role

from .estate_for_tests import ADMIN, Site, refusal


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
