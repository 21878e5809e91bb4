"""What a session and its reference open, and whose sessions end with their users."""

import pytest
from trio.testing import MockClock

from gateway.core.roles import Permission, Role
from gateway.core.sessions import Credentials
from tests.core.refusal import refused
from tests.core.session_gate import HERE, LOOK, THERE, Gate

ADMINISTER = Permission("pool.set_name_label", Role.POOL_ADMIN)


async def test_a_session_opens_what_its_users_role_allows(gate: Gate) -> None:
    await gate.users.create("guest", "right", Role.READ_ONLY)
    ref = await gate.login("guest")
    identity = await gate.by_ref(ref)
    assert (identity.user, identity.role) == ("guest", Role.READ_ONLY)
    assert identity.session is not None
    assert identity.session == gate.sessions.get(ref)
    assert (identity.session.originator, identity.session.address) == ("test", HERE)
    with refused("RBAC_PERMISSION_DENIED"):
        await gate.by_ref(ref, ADMINISTER)
    await gate.users.set_role("guest", Role.POOL_ADMIN)
    await gate.by_ref(ref, ADMINISTER)


async def test_after_logging_out_the_reference_opens_nothing(gate: Gate) -> None:
    ref, other = await gate.login(), await gate.login()
    await gate.sessions.logout(ref)
    for call in (gate.by_ref, gate.sessions.logout):
        with refused("SESSION_INVALID"):
            await call(ref)
    await gate.by_ref(other)
    await gate.reopen()
    with refused("SESSION_INVALID"):
        gate.sessions.get(ref)


@pytest.mark.parametrize("ref", ["", "OpaqueRef:NULL", "OpaqueRef:x", "\ud800"])
async def test_a_strange_reference_is_refused(gate: Gate, ref: str) -> None:
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)


async def test_neither_the_uuid_nor_the_object_reference_of_a_session_opens_it(gate: Gate) -> None:
    session = gate.sessions.get(await gate.login())
    assert gate.sessions.by_uuid(session.uuid) == session
    for name in (session.uuid, session.object_ref, f"OpaqueRef:{session.uuid}"):
        with refused("SESSION_INVALID"):
            await gate.by_ref(name)


async def test_a_disabled_users_sessions_and_passwords_open_nothing(
    gate: Gate, autojump_clock: MockClock
) -> None:
    ref = await gate.login()
    await gate.by_password()
    await gate.users.set_disabled("root", True)
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.by_password()
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.login(address=THERE)
    await gate.users.set_disabled("root", False)
    await gate.by_ref(ref)


async def test_a_removed_users_sessions_go_too(gate: Gate) -> None:
    await gate.users.create("guest", "right", Role.READ_ONLY)
    ref = await gate.login("guest")
    await gate.users.remove("guest")
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)
    await gate.reopen()
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)


async def test_who_listens_is_told_of_every_session_that_ends(gate: Gate) -> None:
    told: list[str] = []
    gate.sessions.on_end(told.append)
    for name in ("disabled", "removed"):
        await gate.users.create(name, "right", Role.VM_ADMIN)
    refs = [await gate.login(name) for name in ("root", "disabled", "removed", "root")]
    uuids = [gate.sessions.get(ref).uuid for ref in refs]
    await gate.sessions.logout(refs[0])
    await gate.users.set_disabled("disabled", True)
    await gate.users.remove("removed")
    assert told == uuids[:3]


async def test_a_session_reference_comes_before_a_password(gate: Gate) -> None:
    credentials = Credentials(HERE, session_ref="OpaqueRef:x", user="root", password="right")
    with refused("SESSION_INVALID"):
        await gate.sessions.authorize(credentials, LOOK)


def test_credentials_do_not_print_their_secrets() -> None:
    text = repr(Credentials(HERE, session_ref="OpaqueRef:secret", user="root", password="hunter2"))
    assert "secret" not in text
    assert "hunter2" not in text
