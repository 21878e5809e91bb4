"""Sessions over the API, with real users and passwords."""

from dataclasses import replace
from typing import Any, cast

import pytest

from gateway.core.passwords import Passwords
from gateway.core.roles import Role
from gateway.core.sessions import Sessions
from gateway.core.users import Users
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.dispatch import Api

from .estate_for_tests import Site, refusal


@pytest.fixture
async def real_sessions(site: Site) -> Site:
    users = await Users.load(site.estate.records.hosts._database, Passwords())
    await users.create("root", "p\x01w", Role.POOL_ADMIN)
    sessions = await Sessions.load(site.estate.records.hosts._database, users)
    estate = replace(site.estate, sessions=sessions)
    return replace(site, api=Api(estate, cast("Any", None), CLASSES), estate=estate)


async def test_a_session_begins_shows_itself_and_ends(real_sessions: Site) -> None:
    site = real_sessions
    refs = [
        await site.call("session.login_with_password", "root", "p\x01w", *more)
        for more in ((), ("1.0",), ("1.0", "a client"))
    ]
    session = refs[-1]
    record = await site.call("session.get_record", session, session)
    assert (record["originator"], record["auth_user_name"]) == ("a client", "root")
    assert session not in str(record)
    assert await site.call("session.get_uuid", session, session) == record["uuid"]
    assert await site.call("session.get_this_host", session, session) == site.estate.records.this_host.ref
    assert await refusal(site, "session.get_uuid", session, "x") == ["HANDLE_INVALID", "session", "x"]
    await site.call("session.logout", session)
    assert (await refusal(site, "session.logout", session))[0] == "SESSION_INVALID"
    assert await site.call("VDI.get_all", refs[0]) == []


async def test_a_wrong_password_opens_no_session(real_sessions: Site) -> None:
    wrong = await refusal(real_sessions, "session.login_with_password", "root", "wrong")
    assert wrong[:2] == ["SESSION_AUTHENTICATION_FAILED", "root"]
    assert "wrong" not in wrong[1]
