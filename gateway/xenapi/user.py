"""The class user: who may log in, with which role. Administrators alone see and change users.

XenAPI's class has names and no rights; the fields `role` and `disabled` and the messages that set them are
this gateway's own. The trap: a user is a name in the core, so a reference and a uuid are made of the name,
and a user who is removed and made anew has the same ones.
"""

from __future__ import annotations

import uuid as uuids
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gateway.core.errors import XenAPIError
from gateway.core.roles import Role
from gateway.core.users import ADMINISTRATOR
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, computed, fixed, message, stored
from gateway.xenapi.types import BOOL, SECRET, STRING, STRING_MAP, Choice, Item, Record, Reference

if TYPE_CHECKING:
    from gateway.core.users import User, Users

_NAMES: Final = uuids.UUID("8b0c6c35-8f0f-4a0c-9a63-5b7f1f0f3c11")
ROLE: Final = Choice("role", tuple(role.wire_name for role in Role))


def user_uuid(name: str) -> str:
    """The uuid of the user with this name."""
    return str(uuids.uuid5(_NAMES, name))


def user_ref(name: str) -> str:
    """The reference of the user with this name."""
    return f"OpaqueRef:{user_uuid(name)}"


@dataclass(frozen=True, slots=True)
class _Listed:
    """A user as an object of the API."""

    user: User

    @property
    def ref(self) -> str:
        return user_ref(self.user.name)

    @property
    def uuid(self) -> str:
        return user_uuid(self.user.name)

    @property
    def name(self) -> str:
        return self.user.name


class _ListedUsers:
    """The users as objects of the API; there are few, so they are looked through."""

    def __init__(self, users: Users) -> None:
        self._users = users

    def __len__(self) -> int:
        return len(self._users.all())

    def all(self) -> list[_Listed]:
        return [_Listed(user) for user in self._users.all()]

    def get(self, ref: str) -> _Listed:
        for listed in self.all():
            if listed.ref == ref:
                return listed
        raise XenAPIError("HANDLE_INVALID", "user", ref)

    def by_uuid(self, uuid: str) -> _Listed:
        for listed in self.all():
            if listed.uuid == uuid.lower():
                return listed
        raise XenAPIError("UUID_INVALID", "user", uuid)


FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    stored("short_name", STRING, "the name to log in with", attribute="name"),
    stored("fullname", STRING, "the same name", attribute="name"),
    fixed("other_config", STRING_MAP, {}, "always empty"),
    computed("role", ROLE, "what the user may do", lambda listed, _estate: listed.user.role.wire_name),
    computed(
        "disabled", BOOL, "whether the user is not let in", lambda listed, _estate: listed.user.disabled
    ),
)

_SELF = Parameter("self", Reference("user"), "the user")
_MESSAGE: Final[dict[str, Any]] = {"role": Role.POOL_ADMIN, "asynchronous": False}


def _name(call: Call, ref: str) -> str:
    return _ListedUsers(call.estate.users).get(ref).name


def _tell(call: Call, operation: Any, name: str) -> None:
    call.estate.events.publish("user", operation, user_ref(name))


def _require_dispensable(name: str) -> None:
    """The administrator stays: with nobody to let others in again, the gateway would be lost."""
    if name == ADMINISTRATOR:
        raise XenAPIError("OPERATION_NOT_ALLOWED", f"{ADMINISTRATOR} is the gateway's own administrator")


@message(
    "create",
    "Make a user who may log in.",
    Parameter(
        "record",
        Record(
            "user",
            {
                "short_name": Item(STRING),
                "password": Item(SECRET),
                "role": Item(ROLE, Role.READ_ONLY.wire_name),
            },
        ),
        "the fields of the new user: short_name, password and role; read-only is the role if none is given",
    ),
    result=Reference("user"),
    errors=("DB_UNIQUENESS_CONSTRAINT_VIOLATION", "VALUE_NOT_SUPPORTED"),
    **_MESSAGE,
)
async def create(call: Call, record: dict[str, Any]) -> str:
    name = record["short_name"]
    await call.estate.users.create(name, record["password"], Role.from_wire(record["role"]))
    _tell(call, "add", name)
    return user_ref(name)


@message(
    "destroy",
    "Remove a user and all sessions of that user.",
    _SELF,
    errors=("OPERATION_NOT_ALLOWED",),
    **_MESSAGE,
)
async def destroy(call: Call, ref: str) -> None:
    name = _name(call, ref)
    _require_dispensable(name)
    await call.estate.users.remove(name)
    _tell(call, "del", name)


@message(
    "set_password",
    "Give a user another password. Sessions go on.",
    _SELF,
    Parameter("value", SECRET, "the new password"),
    errors=("VALUE_NOT_SUPPORTED",),
    **_MESSAGE,
)
async def set_password(call: Call, ref: str, value: str) -> None:
    await call.estate.users.set_password(_name(call, ref), value)


@message(
    "set_role",
    "Give a user another role, in open sessions too.",
    _SELF,
    Parameter("value", ROLE, "the new role"),
    errors=("OPERATION_NOT_ALLOWED",),
    **_MESSAGE,
)
async def set_role(call: Call, ref: str, value: str) -> None:
    name = _name(call, ref)
    _require_dispensable(name)
    await call.estate.users.set_role(name, Role.from_wire(value))
    _tell(call, "mod", name)


@message(
    "set_disabled",
    "Let a user in no more, or again. Open sessions of a disabled user are not valid.",
    _SELF,
    Parameter("value", BOOL, "whether the user is not let in"),
    errors=("OPERATION_NOT_ALLOWED",),
    **_MESSAGE,
)
async def set_disabled(call: Call, ref: str, value: bool) -> None:
    name = _name(call, ref)
    _require_dispensable(name)
    await call.estate.users.set_disabled(name, value)
    _tell(call, "mod", name)


USER = ApiClass(
    name="user",
    doc="Somebody who may log in.",
    fields=FIELDS,
    messages=(create, destroy, set_password, set_role, set_disabled),
    objects=lambda estate: _ListedUsers(estate.users),
    named=False,
    reader=Role.POOL_ADMIN,
)
