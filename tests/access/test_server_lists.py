"""Which VDIs are listed, under which names, and to whom."""

import pytest

from gateway.access.protocol import NAME_LENGTH, PAGE, List, Listed
from gateway.core.roles import Role
from tests.access.conftest import Room, Talk, refused, stranger


async def listed(talk: Talk) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    while True:
        page = await talk.receive()
        assert isinstance(page, Listed), page
        found += page.vdis
        if page.last:
            assert await talk.receive() is None
            return found


async def test_all_vdis_are_listed_by_name_whatever_their_names_are(room: Room) -> None:
    talk = room.connect()
    await talk.send(List(None))
    assert await listed(talk) == []
    uuids = {}
    for number in range(PAGE * 2):
        vdi = await room.vdi()
        name = f"{number:02}" + "\U0001f4be" * 500
        await room.inventory.records.vdis.change(vdi.ref, name_label=name)
        uuids[vdi.uuid] = name[:NAME_LENGTH]
    talk = room.connect()
    await talk.send(List(None))
    assert await listed(talk) == list(uuids.items())


async def test_what_nobody_could_open_is_not_listed(room: Room) -> None:
    vdi, gone = await room.vdi(), await room.vdi()
    await room.inventory.vdi_snapshot(vdi.ref, who="the test")
    hidden = [one.uuid for one in room.inventory.records.vdis.all() if not one.managed]
    await room.inventory.records.vdis.change(gone.ref, missing=True)
    talk = room.connect()
    await talk.send(List(None))
    shown = {uuid for uuid, _ in await listed(talk)}
    assert len(shown) == 2 and vdi.uuid in shown
    assert len(hidden) <= 1 and not shown & {gone.uuid, *hidden}
    for pbd in room.inventory.records.pbds.all():
        await room.inventory.pbd_unplug(pbd.ref)
    talk = room.connect()
    await talk.send(List(None))
    assert await listed(talk) == []


async def test_a_list_takes_the_role_that_opening_takes(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    vdi = await room.vdi()
    monkeypatch.setattr("gateway.access.server_link.peer_of", stranger)
    for session, code in (
        (None, "SESSION_AUTHENTICATION_FAILED"),
        ("OpaqueRef:no-session", "SESSION_INVALID"),
        (await room.session(Role.VM_OPERATOR), "RBAC_PERMISSION_DENIED"),
    ):
        talk = room.connect()
        await talk.send(List(session))
        assert refused(await talk.receive()).code == code
    talk = room.connect()
    await talk.send(List(await room.session(Role.VM_ADMIN)))
    assert [uuid for uuid, _ in await listed(talk)] == [vdi.uuid]
