"""What VDIs are, told without a lease, while others rename their files and give them new content."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from gateway.access import described as module
from gateway.access.described import Describing
from gateway.access.protocol import Describe, Described
from gateway.core.leases import Holder, LeaseMode
from gateway.core.limits import Limits
from gateway.core.records import VDI
from gateway.core.refs import new_uuid
from gateway.core.roles import Role
from gateway.images.chain import ChainFiles
from gateway.images.files import FileIdentity
from gateway.repository.reconcile import CBT_METADATA
from gateway.transfers.publications import Publications
from tests.access.conftest import MIB, Room, open_files, refused, stranger


async def described(room: Room, vdi: VDI, session: str | None = None) -> Described:
    talk = room.connect()
    await talk.send(Describe(vdi.uuid, session))
    answer = await talk.receive()
    assert isinstance(answer, Described), answer
    assert await talk.receive() is None
    return answer


async def code_of(room: Room, uuid: str, session: str | None = None) -> str:
    talk = room.connect()
    await talk.send(Describe(uuid, session))
    return refused(await talk.receive()).code


def path_of(room: Room, vdi: VDI) -> str:
    return room.inventory.repository_of(vdi).image_path(vdi.uuid)


def leaf_of(room: Room, vdi: VDI) -> FileIdentity:
    status = os.stat(path_of(room, vdi))
    return FileIdentity(status.st_dev, status.st_ino)


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
async def test_a_vdi_is_described_with_its_content_and_file_and_without_a_lease(
    room: Room, tmp_path: Path, image_format: str
) -> None:
    vdi = await room.vdi(image_format)
    told = await described(room, vdi)
    assert (told.content_id, told.leaf, told.size) == (vdi.content_id, leaf_of(room, vdi), 4 * MIB)
    assert told.stored == 0
    assert told.vhd is not None
    assert told.qcow2 is not None
    assert not room.operations(vdi)
    assert open_files(tmp_path) == []
    assert room.tasks.all() == []


async def test_of_the_last_block_counts_what_the_disk_has_of_it(room: Room) -> None:
    ref = await room.inventory.vdi_create(sr=room.sr, virtual_size=3 * MIB, sm_config={"type": "raw"})
    vdi = room.inventory.records.vdis.get(ref)
    fd = os.open(path_of(room, vdi), os.O_WRONLY)
    os.pwrite(fd, b"x", 5 * MIB // 2)
    os.close(fd)
    assert (await described(room, vdi)).stored == MIB


async def test_a_writer_of_the_vdi_keeps_nobody_from_asking(room: Room) -> None:
    vdi = await room.vdi()
    lease = await room.inventory.lease(vdi, LeaseMode.WRITE, Holder("test", "write", vdi.ref))
    assert (await described(room, vdi)).content_id == vdi.content_id
    lease.release()
    await lease.released()


async def test_the_roles_that_may_read_may_ask(room: Room) -> None:
    vdi = await room.vdi()
    assert await code_of(room, vdi.uuid, await room.session(Role.VM_OPERATOR)) == "RBAC_PERMISSION_DENIED"
    assert await code_of(room, vdi.uuid, "OpaqueRef:none") == "SESSION_INVALID"
    assert (await described(room, vdi, await room.session(Role.VM_ADMIN))).size == 4 * MIB


async def test_what_could_not_be_opened_for_reading_is_refused(room: Room, tmp_path: Path) -> None:
    vdi = await room.vdi()
    assert await code_of(room, new_uuid()) == "UUID_INVALID"
    await room.inventory.records.vdis.change(vdi.ref, type=CBT_METADATA)
    assert await code_of(room, vdi.uuid) == "VDI_INCOMPATIBLE_TYPE"
    damaged = await room.vdi()
    os.truncate(path_of(room, damaged), 100)
    assert await code_of(room, damaged.uuid) == "VDI_IO_ERROR"
    os.unlink(path_of(room, damaged))
    assert await code_of(room, damaged.uuid) == "VDI_MISSING"
    assert open_files(tmp_path) == []


async def test_refusals_of_questions_are_not_kept_with_the_vdi(room: Room) -> None:
    damaged = await room.vdi()
    os.truncate(path_of(room, damaged), 100)
    assert await code_of(room, damaged.uuid) == "VDI_IO_ERROR"
    assert not room.refusals.last(damaged.ref)


class Meddled:
    """Lets a test do something between opening the files and looking at them, the first time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
        self.looks = 0
        self._then = then
        self._look = module._described
        monkeypatch.setattr(module, "_described", self._meddle)

    def _meddle(self, chain: ChainFiles, content_id: str) -> Described | None:
        self.looks += 1
        if self.looks == 1:
            self._then()
        return self._look(chain, content_id)


async def test_a_file_that_is_renamed_over_meanwhile_is_looked_at_again(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi, other = await room.vdi(), await room.vdi()
    meddled = Meddled(monkeypatch, lambda: os.rename(path_of(room, other), path_of(room, vdi)))
    before = leaf_of(room, vdi)
    told = await described(room, vdi)
    assert meddled.looks == 2
    assert told.leaf == leaf_of(room, vdi) != before
    assert open_files(tmp_path) == []


async def test_a_content_that_becomes_another_meanwhile_is_looked_at_again(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi = await room.vdi()
    change = partial(room.inventory.records.vdis.change, vdi.ref, content_id="new")
    meddled = Meddled(monkeypatch, lambda: trio.from_thread.run(change))
    assert (await described(room, vdi)).content_id == "new"
    assert meddled.looks == 2


async def test_one_that_changes_all_the_time_is_refused(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    vdi = await room.vdi()
    monkeypatch.setattr(module, "_described", lambda chain, content_id: chain.close())
    assert await code_of(room, vdi.uuid) == "VDI_IN_USE"


async def test_a_new_file_is_told_of_with_its_content_and_never_with_the_one_before(room: Room) -> None:
    vdi, other = await room.vdi(), await room.vdi()
    publications = Publications()
    describing = Describing(room.inventory, Limits(lease_wait=1), publications)
    told: list[Described] = []

    async def ask() -> None:
        told.append(await describing.describe(vdi.uuid))

    async with trio.open_nursery() as nursery:
        with (
            pytest.raises(OSError, match="not durable"),
            publications.publishing(vdi.ref, leaf_of(room, vdi)),
        ):
            os.rename(path_of(room, other), path_of(room, vdi))
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert told == []
            await room.inventory.records.vdis.change(vdi.ref, content_id="new")
            raise OSError("renamed, but not durable")
    assert [(each.content_id, each.leaf) for each in told] == [("new", leaf_of(room, vdi))]


async def test_an_sr_whose_files_are_being_renamed_is_waited_for_no_longer_than_a_lease_would(
    room: Room,
) -> None:
    vdi = await room.vdi()
    async with room.inventory.repository_of(vdi).structure_lock:
        assert await code_of(room, vdi.uuid) == "VDI_IN_USE"
    assert (await described(room, vdi)).size == 4 * MIB


async def test_few_are_answered_at_a_time_and_all_in_the_end(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi = await room.vdi()
    running = most = 0
    look = Describing._look

    async def counted(self: Describing, asked: VDI) -> Described | None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await look(self, asked)
        finally:
            running -= 1

    monkeypatch.setattr(Describing, "_look", counted)
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(described, room, vdi)
    assert most == 4


async def test_a_stranger_without_a_session_is_told_nothing(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi = await room.vdi()
    monkeypatch.setattr("gateway.access.server_link.peer_of", stranger)
    assert await code_of(room, vdi.uuid) == "SESSION_AUTHENTICATION_FAILED"
    assert (await described(room, vdi, await room.session(Role.VM_ADMIN))).size == 4 * MIB


async def test_an_sr_that_is_not_attached_is_refused(room: Room) -> None:
    vdi = await room.vdi()
    for pbd in room.inventory.records.pbds.all():
        await room.inventory.pbd_unplug(pbd.ref)
    assert await code_of(room, vdi.uuid) == "SR_NOT_ATTACHED"
