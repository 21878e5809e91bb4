"""VDI.copy through the API: what it takes, the task that it always has, and that the task can be followed."""

from pathlib import Path
from typing import Any

import trio

from gateway.core.refs import NULL_REF
from gateway.core.tasks import TaskStatus

from .estate_for_tests import ADMIN, Site, inventory_of, refusal, sr_of, vdi_of


async def ended(site: Site, task: str) -> dict[str, Any]:
    while True:
        record: dict[str, Any] = await site.call("task.get_record", ADMIN, task)
        if record["status"] not in ("pending", "cancelling"):
            return record
        await trio.sleep(0.005)


async def test_a_copy_is_a_new_vdi_or_replaces_one(live: Site, tmp_path: Path) -> None:
    one, other = await sr_of(live, tmp_path / "one"), await sr_of(live, tmp_path / "other")
    vdi = await vdi_of(live, one, other_config={"k": "v"})
    made = await live.call("VDI.copy", "vm-admin", vdi, other)
    record = await live.call("VDI.get_record", ADMIN, made)
    assert (record["SR"], record["name_label"], record["other_config"]) == (other, "disk", {"k": "v"})
    assert record["current_operations"] == {}
    assert await live.call("VDI.copy", ADMIN, vdi, NULL_REF, NULL_REF, made) == made
    assert await live.call("SR.get_VDIs", ADMIN, other) == (made,)
    taken = await live.call("VDI.snapshot", ADMIN, vdi)
    assert await live.call("VDI.copy", ADMIN, taken, other, NULL_REF, NULL_REF) not in (made, vdi, taken)


async def test_what_a_copy_cannot_do_is_said(live: Site, tmp_path: Path) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    vdi = await vdi_of(live, sr)
    for parameters, expected in (
        ((vdi, sr, vdi), ["VALUE_NOT_SUPPORTED", "base_vdi", vdi]),
        ((vdi, NULL_REF), ["VALUE_NOT_SUPPORTED", "sr", NULL_REF]),
        ((vdi, sr, NULL_REF, vdi), ["VALUE_NOT_SUPPORTED", "into_vdi", vdi]),
        (("OpaqueRef:none", sr), ["HANDLE_INVALID", "VDI", "OpaqueRef:none"]),
    ):
        refused = await refusal(live, "VDI.copy", ADMIN, *parameters)
        assert refused[: len(expected)] == expected
    assert (await refusal(live, "VDI.copy", "vm-operator", vdi, sr))[0] == "RBAC_PERMISSION_DENIED"
    assert len(await live.call("VDI.get_all", ADMIN)) == 1


async def test_a_copy_has_a_task_however_it_is_called(live: Site, tmp_path: Path) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    vdi = await vdi_of(live, sr)
    made = await live.call("VDI.copy", ADMIN, vdi, sr)
    (task,) = (await live.call("task.get_all_records", ADMIN)).values()
    assert (task["name_label"], task["status"], task["progress"]) == ("VDI.copy", "success", 1.0)
    assert task["result"] == f"<value>{made}</value>"
    reference = await live.call("Async.VDI.copy", ADMIN, vdi, sr)
    record = await ended(live, reference)
    assert (record["name_label"], record["status"]) == ("Async.VDI.copy", "success")
    refused = await refusal(live, "VDI.copy", ADMIN, vdi, NULL_REF)
    (failed,) = live.estate.tasks.by_name_label("VDI.copy")[1:]
    assert (failed.status, failed.error_info[0]) == (TaskStatus.FAILURE, refused[0])


async def test_a_copy_that_waits_for_its_turn_holds_nothing_and_can_be_cancelled(
    live: Site, tmp_path: Path
) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    vdi = await vdi_of(live, sr)
    turns = live.api._estate.copies
    turns.total_tokens = 1
    async with turns:
        waiting = await live.call("Async.VDI.copy", ADMIN, vdi, sr)
        refused: list[list[str]] = []

        async def called_without_async() -> None:
            refused.append(await refusal(live, "VDI.copy", ADMIN, vdi, sr))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(called_without_async)
            while turns.statistics().tasks_waiting < 2:
                await trio.lowlevel.checkpoint()
            assert inventory_of(live).leases.holders_for(vdi) == ()
            (plain,) = live.estate.tasks.by_name_label("VDI.copy")
            for task in (waiting, plain.ref):
                await live.call("task.cancel", ADMIN, task)
                assert (await ended(live, task))["status"] == "cancelled"
        assert refused == [["TASK_CANCELLED", plain.ref]]
    assert len(await live.call("VDI.get_all", ADMIN)) == 1
