"""Changed blocks as clients ask for them."""

import base64
from pathlib import Path

import trio

from gateway.core.leases import Holder, LeaseMode

from .estate_for_tests import ADMIN, Site, inventory_of, refusal, sr_of, vdi_of

MIB = 1 << 20


async def test_the_loop_of_a_backup_program(live: Site, tmp_path: Path) -> None:
    vdi = await vdi_of(live, await sr_of(live, tmp_path / "sr"))
    assert not await live.call("VDI.get_cbt_enabled", ADMIN, vdi)
    await live.call("VDI.enable_cbt", ADMIN, vdi)
    assert await live.call("VDI.get_cbt_enabled", ADMIN, vdi)
    first = await live.call("VDI.snapshot", ADMIN, vdi)
    allowed = await live.call("VDI.get_allowed_operations", ADMIN, first)
    assert {"data_destroy", "list_changed_blocks"} < set(allowed)
    await live.call("VDI.data_destroy", ADMIN, first)
    lease = await inventory_of(live).lease(vdi, LeaseMode.WRITE, Holder("root", "write", vdi))
    disk = await trio.to_thread.run_sync(lease.open_disk)
    disk.pwrite(b"a" * 512, 3 * MIB)
    disk.close()
    lease.release()
    await lease.released()
    second = await live.call("VDI.snapshot", ADMIN, vdi)
    text = await live.call("VDI.list_changed_blocks", ADMIN, first, second)
    # 4 MiB are 64 blocks; the 48th one has changed.
    assert base64.b64decode(text) == bytes([0, 0, 0, 0, 0, 0, 0x80, 0])
    record = await live.call("VDI.get_record", ADMIN, first)
    assert (record["type"], record["cbt_enabled"]) == ("cbt_metadata", True)
    assert record["allowed_operations"] == ("destroy", "data_destroy", "list_changed_blocks")
    await live.call("VDI.destroy", ADMIN, first)
    await live.call("VDI.disable_cbt", ADMIN, vdi)


async def test_refusals_are_xenservers(live: Site, tmp_path: Path) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    vdi = await vdi_of(live, sr)
    flat = await vdi_of(live, sr, sm_config={"type": "raw"})
    snapshot = await live.call("VDI.snapshot", ADMIN, vdi)
    assert await refusal(live, "VDI.enable_cbt", ADMIN, flat) == [
        "SR_BACKEND_FAILURE_66",
        "",
        "Invalid VDI type [opterr=Raw VDI or snapshot not permitted]",
        "",
    ]
    assert await refusal(live, "VDI.enable_cbt", ADMIN, snapshot) == [
        "OPERATION_NOT_ALLOWED",
        f"VDI is a snapshot: {snapshot}",
    ]
    assert await refusal(live, "VDI.data_destroy", ADMIN, snapshot) == ["VDI_NO_CBT_METADATA", snapshot]
    assert await refusal(live, "VDI.data_destroy", ADMIN, vdi) == [
        "OPERATION_NOT_ALLOWED",
        f"VDI is not a snapshot: {vdi}",
    ]
    said = "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are {}]"
    for other, problem in ((snapshot, "unrelated"), (vdi, "same")):
        assert await refusal(live, "VDI.list_changed_blocks", ADMIN, other, vdi) == [
            "SR_BACKEND_FAILURE_460",
            "",
            said.format(problem),
            "",
        ]


async def test_nobody_creates_what_only_data_destroy_makes(live: Site, tmp_path: Path) -> None:
    sr = await sr_of(live, tmp_path / "sr")
    record = {"SR": sr, "virtual_size": str(MIB), "name_label": "disk", "type": "cbt_metadata"}
    assert await refusal(live, "VDI.create", ADMIN, record) == ["VDI_INCOMPATIBLE_TYPE", "", "cbt_metadata"]
