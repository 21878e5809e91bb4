"""SRs and VDIs over the API: they live and die, say what may be done with them, and are found again."""

from pathlib import Path

import pytest
import trio

from gateway.core.leases import Holder, LeaseMode
from gateway.core.refs import NULL_REF
from gateway.xenapi.types import moment_text

from .estate_for_tests import ADMIN, MIB, Site, inventory_of, refusal, sr_of, vdi_of


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


async def test_the_default_sr_is_one_that_is_there_or_none(live: Site, tmp_path: Path) -> None:
    pool = live.estate.records.pool.ref
    sr = await sr_of(live, tmp_path / "sr")
    await live.call("pool.set_default_SR", ADMIN, pool, sr)
    assert await live.call("pool.get_default_SR", ADMIN, pool) == sr
    assert (await refusal(live, "pool.set_default_SR", ADMIN, pool, "x"))[0] == "HANDLE_INVALID"
    for null in (NULL_REF, ""):
        await live.call("pool.set_default_SR", ADMIN, pool, null)
        assert await live.call("pool.get_default_SR", ADMIN, pool) == NULL_REF
