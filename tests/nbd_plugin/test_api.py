"""What the API says and does about disks that are open over NBD: tasks, refusals, revocation."""

import contextlib
from typing import Any

from tests.nbd_plugin.conftest import Nbd
from tests.system.site import MIB, Vdi, wait_until


def operations(nbd: Nbd, vdi: Vdi) -> dict[str, str]:
    found: dict[str, str] = nbd.site.gateway.call("VDI.get_current_operations", vdi.ref)
    return found


def task_of(nbd: Nbd, vdi: Vdi) -> str:
    """The reference of the task under which the disk is used, once bytes have moved."""
    wait_until(
        lambda: any(not ref.startswith("DummyRef") for ref in operations(nbd, vdi)), "the task of the bytes"
    )
    [task] = operations(nbd, vdi)
    return task


def ends(libnbd: Any, handle: Any) -> None:
    """Requests fail from now on, with the errno that NBD has for it."""

    def shut_down() -> bool:
        try:
            handle.pread(512, 0)
        except libnbd.Error as error:
            assert error.errno == "ESHUTDOWN"
            return True
        return False

    wait_until(shut_down, "requests to fail")
    with contextlib.suppress(libnbd.Error):
        handle.shutdown()


def test_the_task_of_a_connection_says_who_which_disk_how_and_how_much(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(8 * MIB)
    writer = nbd.connect(libnbd, vdi, write=True, session=nbd.site.gateway.session)
    writer.pwrite(b"d" * MIB, 0)
    assert writer.pread(3, 0) == b"ddd"
    task = task_of(nbd, vdi)
    told = nbd.site.task(task)
    assert told["name_label"] == "nbd write"
    assert told["name_description"].startswith("root (logged in at ")
    assert (
        f"writes to the VDI {vdi.uuid} 'system test', process {nbd.process.pid}" in told["name_description"]
    )
    assert (told["other_config"]["vdi"], told["other_config"]["mode"]) == (vdi.uuid, "rw")
    writer.pwrite(b"e" * MIB, MIB)
    wait_until(
        lambda: nbd.site.task(task)["other_config"]["bytes-written"] == str(2 * MIB), "all bytes to be told"
    )
    writer.shutdown()
    ended = nbd.site.finished_task(task)
    assert (ended["status"], ended["result"]) == ("success", f"3 bytes read, {2 * MIB} bytes written")


def test_cancelling_the_task_of_a_connection_ends_its_requests(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(8 * MIB)
    reader, other = nbd.connect(libnbd, vdi), nbd.connect(libnbd, vdi)
    reader.pread(512, 0)
    wait_until(lambda: any(ref.startswith("OpaqueRef") for ref in operations(nbd, vdi)), "a task")
    [task] = [ref for ref in operations(nbd, vdi) if ref.startswith("OpaqueRef")]
    nbd.site.gateway.call("task.cancel", task)
    ends(libnbd, reader)
    assert nbd.site.finished_task(task)["status"] == "cancelled"
    assert other.pread(512, 0) == bytes(512)
    other.shutdown()


def test_a_disk_is_taken_away_from_all_connections_also_from_idle_ones(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(8 * MIB)
    busy, idle = nbd.connect(libnbd, vdi), nbd.connect(libnbd, vdi)
    busy.pread(512, 0)
    nbd.site.gateway.call("VDI.force_unlock", vdi.ref)
    wait_until(lambda: operations(nbd, vdi) == {}, "the leases to end")
    writer = nbd.connect(libnbd, vdi, write=True)
    ends(libnbd, busy)
    ends(libnbd, idle)
    writer.pwrite(b"w" * 512, 0)
    writer.shutdown()


def test_why_a_connection_was_refused_stands_with_the_disk(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi()
    assert "last-refusal" not in nbd.site.gateway.call("VDI.get_sm_config", vdi.ref)
    writer = nbd.connect(libnbd, vdi, write=True)
    with contextlib.suppress(libnbd.Error):
        nbd.connect(libnbd, vdi)
    told = nbd.site.gateway.call("VDI.get_sm_config", vdi.ref)["last-refusal"]
    assert f"reading by root (nbd, process {nbd.process.pid}): VDI_IN_USE: " in told
    assert f"write by root (nbd, process {nbd.process.pid})" in told
    writer.shutdown()
