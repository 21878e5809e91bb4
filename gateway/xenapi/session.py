"""The class session: logging in and out.

A session's reference is its secret. So the list that administrators get shows other references, which open
nothing, there is no get_by_uuid, and a getter works for whoever holds the reference, who is the session's
owner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF
from gateway.core.roles import Role
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, computed, fixed, message, stored
from gateway.xenapi.types import (
    BOOL,
    DATETIME,
    SECRET,
    STRING,
    STRING_MAP,
    STRINGS,
    Records,
    Reference,
    SetOf,
)
from gateway.xenapi.user import user_ref

if TYPE_CHECKING:
    from gateway.core.sessions import Session, Sessions
    from gateway.xenapi.estate import Estate


def _is_superuser(session: Session, estate: Estate) -> bool:
    user = estate.users.find(session.user)
    return user is not None and user.role is Role.POOL_ADMIN


FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    computed(
        "this_host", Reference("host"), "this host", lambda _session, estate: estate.records.this_host.ref
    ),
    computed("this_user", Reference("user"), "the user", lambda session, _estate: user_ref(session.user)),
    stored("last_active", DATETIME, "when it was last used"),
    fixed("pool", BOOL, False, "whether it belongs to another host of the pool"),
    fixed("other_config", STRING_MAP, {}, "additional configuration"),
    computed("is_local_superuser", BOOL, "whether the user may do everything", _is_superuser),
    fixed("subject", Reference("subject"), NULL_REF, "always null"),
    stored("validation_time", DATETIME, "when the password was verified"),
    fixed("auth_user_sid", STRING, "", "always empty"),
    stored("auth_user_name", STRING, "the user's name", attribute="user"),
    fixed("rbac_permissions", STRINGS, (), "not listed here; see each method's role"),
    fixed("tasks", SetOf(Reference("task")), (), "not listed here; see the tasks themselves"),
    fixed("parent", Reference("session"), NULL_REF, "always null"),
    stored("originator", STRING, "what the client calls itself"),
    fixed("client_certificate", BOOL, False, "whether a client certificate took the password's place"),
)


@message(
    "login_with_password",
    "Log in. The result is the session's reference: a secret, and the first parameter of all other calls.",
    Parameter("uname", STRING, "user name"),
    Parameter("pwd", SECRET, "password"),
    Parameter("version", STRING, "the client's API version; not used", default="1.0"),
    Parameter("originator", STRING, "what the client calls itself", default=""),
    result=Reference("session"),
    session=False,
    asynchronous=False,
    errors=("SESSION_AUTHENTICATION_FAILED",),
)
async def login_with_password(call: Call, uname: str, pwd: str, version: str, originator: str) -> str:
    sessions, address = call.estate.sessions, call.caller.address
    if call.caller.is_local and not pwd:
        # The kernel has told that it is the gateway's own user or root, who could read the password anyway.
        return await sessions.login_trusted(uname, version=version, originator=originator, address=address)
    return await sessions.login(uname, pwd, version=version, originator=originator, address=address)


@message(
    "change_password",
    "Change the caller's own password. Sessions go on.",
    Parameter("old_pwd", SECRET, "the password until now"),
    Parameter("new_pwd", SECRET, "the new password"),
    asynchronous=False,
    errors=("SESSION_AUTHENTICATION_FAILED", "VALUE_NOT_SUPPORTED"),
)
async def change_password(call: Call, old_pwd: str, new_pwd: str) -> None:
    user = call.identity.user
    await call.estate.sessions.check_password(user, old_pwd, call.caller.address)
    await call.estate.users.set_password(user, new_pwd)


@message(
    "get_all_records",
    "List who is logged in. The references name the sessions here and open nothing.",
    result=Records("session"),
    role=Role.POOL_ADMIN,
    asynchronous=False,
    # Clients watch every class that lists this, and there are no events of sessions.
    listed=False,
)
async def get_all_records(call: Call) -> dict[str, Any]:
    estate = call.estate
    return {session.object_ref: SESSION.record(session, estate) for session in estate.sessions.all()}


@message("logout", "End the session. Uploads and tasks that have begun go on.", asynchronous=False)
async def logout(call: Call) -> None:
    await call.estate.sessions.logout(call.session_ref)


class _Sessions:
    """Sessions as objects: an unknown one is an unknown object, not a reason to log in again."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def get(self, ref: str) -> Session:
        try:
            return self._sessions.get(ref)
        except XenAPIError as error:
            raise XenAPIError("HANDLE_INVALID", "session", ref) from error


SESSION = ApiClass(
    name="session",
    doc="A client that has logged in.",
    fields=FIELDS,
    messages=(login_with_password, change_password, logout, get_all_records),
    objects=lambda estate: _Sessions(estate.sessions),
    enumerable=False,
    named=False,
)
