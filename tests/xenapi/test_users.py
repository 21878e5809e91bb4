from dataclasses import replace
from typing import Any, cast

import pytest
import trio.testing

from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.core.passwords import Passwords
from gateway.core.roles import Role
from gateway.core.sessions import Sessions
from gateway.core.users import Users
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.dispatch import LOCAL, Api, Caller

from .estate_for_tests import Site, refusal

LOCAL_CALLER = Caller(LOCAL, LOCAL)


@pytest.fixture
async def house(site: Site) -> Site:
    """The site with real users and sessions."""
    database = site.estate.records.hosts._database
    users = await Users.load(database, Passwords())
    await users.create("root", "password", Role.POOL_ADMIN)
    sessions = await Sessions.load(database, users)
    estate = replace(site.estate, sessions=sessions, users=users)
    return replace(site, api=Api(estate, cast("Any", None), CLASSES), estate=estate)


@pytest.fixture
async def admin(house: Site) -> str:
    ref = await house.api.call("session.login_with_password", ["root", ""], LOCAL_CALLER)
    assert isinstance(ref, str)
    return ref


async def test_the_unix_socket_lets_its_user_in_without_a_password(house: Site, admin: str) -> None:
    record = await house.call("session.get_record", admin, admin)
    assert (record["auth_user_name"], record["is_local_superuser"]) == ("root", True)
    for user in ("", "nobody"):
        with pytest.raises(XenAPIError, match="SESSION_AUTHENTICATION_FAILED"):
            await house.api.call("session.login_with_password", [user, ""], LOCAL_CALLER)
    await house.api.call("session.login_with_password", ["root", "password", "1.0", "me"], LOCAL_CALLER)


async def test_nobody_else_is_let_in_without_a_password(house: Site) -> None:
    for transport in ("http", "https"):
        with pytest.raises(XenAPIError, match="SESSION_AUTHENTICATION_FAILED"):
            await house.api.call("session.login_with_password", ["root", ""], Caller("127.0.0.1", transport))


async def test_a_user_is_made_changed_and_removed(house: Site, admin: str) -> None:
    anna = await house.call(
        "user.create", admin, {"short_name": "anna", "password": "first", "role": "vm-admin"}
    )
    record = await house.call("user.get_record", admin, anna)
    assert (record["short_name"], record["role"], record["disabled"]) == ("anna", "vm-admin", False)
    assert "first" not in str(record)
    assert await house.call("user.get_by_uuid", admin, record["uuid"]) == anna
    assert set(await house.call("user.get_all_records", admin)) == {
        anna,
        *await house.call("user.get_all", admin),
    }
    session = await house.call("session.login_with_password", "anna", "first")
    assert await house.call("session.get_this_user", session, session) == anna
    assert not await house.call("session.get_is_local_superuser", session, session)
    await house.call("user.set_role", admin, anna, "read-only")
    assert (await refusal(house, "VDI.destroy", session, "x"))[0] == "RBAC_PERMISSION_DENIED"
    await house.call("user.set_password", admin, anna, "second")
    await house.call("user.set_disabled", admin, anna, True)
    assert (await refusal(house, "VDI.get_all", session))[0] == "SESSION_INVALID"
    await house.call("user.set_disabled", admin, anna, False)
    await house.call("session.login_with_password", "anna", "second")
    await house.call("user.destroy", admin, anna)
    assert await refusal(house, "user.get_uuid", admin, anna) == ["HANDLE_INVALID", "user", anna]
    assert (await refusal(house, "user.get_by_uuid", admin, record["uuid"]))[0] == "UUID_INVALID"


async def test_the_administrator_stays(house: Site, admin: str) -> None:
    (root,) = await house.call("user.get_all", admin)
    for call in (("destroy",), ("set_disabled", True), ("set_role", "read-only")):
        assert (await refusal(house, f"user.{call[0]}", admin, root, *call[1:]))[0] == "OPERATION_NOT_ALLOWED"


async def test_users_change_their_own_password_by_knowing_it(house: Site, admin: str) -> None:
    await house.call("user.create", admin, {"short_name": "anna", "password": "first"})
    session = await house.call("session.login_with_password", "anna", "first")
    wrong = await refusal(house, "session.change_password", session, "wrong", "second")
    assert wrong[:2] == ["SESSION_AUTHENTICATION_FAILED", "anna"]
    await house.call("session.change_password", session, "first", "second")
    assert await house.call("VDI.get_all", session) == []
    await house.call("session.login_with_password", "anna", "second")
    assert (await refusal(house, "session.login_with_password", "anna", "first"))[0] == (
        "SESSION_AUTHENTICATION_FAILED"
    )


async def test_administrators_see_who_is_logged_in_and_no_secret(house: Site, admin: str) -> None:
    await house.call(
        "user.create", admin, {"short_name": "anna", "password": "first", "role": "pool-operator"}
    )
    session = await house.call("session.login_with_password", "anna", "first", "1.0", "a client")
    records = await house.call("session.get_all_records", admin)
    assert {record["originator"] for record in records.values()} == {"", "a client"}
    assert session not in str(records)
    assert admin not in str(records)
    for ref in records:
        assert (await refusal(house, "VDI.get_all", ref))[0] == "SESSION_INVALID"
    assert (await refusal(house, "session.get_all_records", session))[0] == "RBAC_PERMISSION_DENIED"
    assert "session.get_all_records" not in await house.call("system.listMethods")


async def test_a_session_that_waits_for_events_does_not_end(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    database = site.estate.records.hosts._database
    users = await Users.load(database, Passwords())
    await users.create("root", "password", Role.POOL_ADMIN)
    sessions = await Sessions.load(database, users, limits=Limits(session_idle=100.0))
    estate = replace(site.estate, sessions=sessions, users=users)
    house = replace(site, api=Api(estate, cast("Any", None), CLASSES), estate=estate)
    session, idle = [await sessions.login("root", "password", address="192.0.2.1") for _ in range(2)]
    token = await house.call("event.inject", session, "pool", site.estate.records.pool.ref)
    token = (await house.call("event.from", session, ["pool"], token, 0.0))["token"]
    batch = await house.call("event.from", session, ["pool"], token, 1000.0)
    assert batch["events"] == []
    await house.call("VDI.get_all", session)
    assert (await refusal(house, "VDI.get_all", idle))[0] == "SESSION_INVALID"
