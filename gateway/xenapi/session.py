"""The class session: logging in and out.

A session's reference is its secret. So there is no list of them, no get_by_uuid, and a getter works for
whoever holds the reference, who is the session's owner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, computed, fixed, message, stored
from gateway.xenapi.types import (
    BOOL,
    DATETIME,
    SECRET,
    STRING,
    STRING_MAP,
    STRINGS,
    Reference,
    SetOf,
)

if TYPE_CHECKING:
    from gateway.core.sessions import Session, Sessions

FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    computed(
        "this_host", Reference("host"), "this host", lambda _session, estate: estate.records.this_host.ref
    ),
    fixed("this_user", Reference("user"), NULL_REF, "always null; see auth_user_name"),
    stored("last_active", DATETIME, "when it was last used"),
    fixed("pool", BOOL, False, "whether it belongs to another host of the pool"),
    fixed("other_config", STRING_MAP, {}, "additional configuration"),
    fixed("is_local_superuser", BOOL, False, "whether it is exempt from roles"),
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
    return await call.estate.sessions.login(
        uname, pwd, version=version, originator=originator, address=call.caller.address
    )


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
    messages=(login_with_password, logout),
    objects=lambda estate: _Sessions(estate.sessions),
    enumerable=False,
    named=False,
)
