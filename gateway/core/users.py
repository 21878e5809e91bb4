"""The local users: name, role, password hash. In memory, written through; who caches a user's rights listens
for changes.
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import trio
from sqlalchemy import Connection, delete, insert, select, update

from gateway.core import schema
from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.passwords import Passwords
from gateway.core.roles import Role

# XenServer's own name for its administrator.
ADMINISTRATOR: Final = "root"

LONGEST_NAME: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A user as it is now; each change makes another object, so identity tells whether one has changed."""

    name: str
    role: Role
    disabled: bool = False
    password_hash: str = field(repr=False)


class Users:
    """All users. Made by `Users.load`."""

    def __init__(self, database: Database, passwords: Passwords) -> None:
        self.passwords: Final = passwords
        self._database = database
        self._lock = trio.Lock()
        self._users: dict[str, User] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._keepers: list[Callable[[str, str], Awaitable[None]]] = []

    @classmethod
    async def load(cls, database: Database, passwords: Passwords | None = None) -> "Users":
        """Read every user."""
        users = cls(database, passwords or Passwords())

        def rows(connection: Connection) -> list[dict[str, Any]]:
            query = select(schema.users).order_by(schema.users.c.name)
            return [dict(row) for row in connection.execute(query).mappings()]

        for row in await database.run(rows):
            user = User(**{**row, "role": Role(row["role"])})
            users._users[user.name] = user
        return users

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call `listener(name)` whenever a user's password, role or state changes or the user goes."""
        self._listeners.append(listener)

    def keep_passwords(self, keeper: Callable[[str, str], Awaitable[None]]) -> None:
        """Await `keeper(name, password)` before a password that was set counts; if it raises, it doesn't."""
        self._keepers.append(keeper)

    def all(self) -> list[User]:
        """Every user, by name."""
        return [self._users[name] for name in sorted(self._users)]

    def find(self, name: str) -> User | None:
        """The user, or None."""
        return self._users.get(name)

    def get(self, name: str) -> User:
        """The user. Raises HANDLE_INVALID."""
        user = self._users.get(name)
        if user is None:
            raise XenAPIError("HANDLE_INVALID", "user", name)
        return user

    async def ensure_administrator(self, password: str | None = None) -> str | None:
        """At the first start, when there is no user at all: make `root`, pool-admin, with this or a generated
        password.

        The password if the user was made, else None. Keep it where the administrator finds it before calling
        this with it, and no crash can lose it.
        """
        if self._users:
            return None
        chosen = secrets.token_urlsafe(18) if password is None else password
        await self.create(ADMINISTRATOR, chosen, Role.POOL_ADMIN)
        return chosen

    async def create(self, name: str, password: str, role: Role) -> User:
        """A new user. Raises VALUE_NOT_SUPPORTED for an unusable name or password,
        DB_UNIQUENESS_CONSTRAINT_VIOLATION.
        """
        # Basic credentials end a name at the first colon (RFC 7617).
        if not name or len(name) > LONGEST_NAME or ":" in name or not name.isprintable():
            raise XenAPIError(
                "VALUE_NOT_SUPPORTED",
                "name",
                name[:LONGEST_NAME],
                "it is empty, too long or has a colon in it",
            )
        password_hash = await self.passwords.hash(password)
        user = User(name=name, role=role, password_hash=password_hash)
        async with self._lock:
            if name in self._users:
                raise XenAPIError("DB_UNIQUENESS_CONSTRAINT_VIOLATION", "user", "name", name)
            await self._keep(name, password)
            row = {"name": name, "role": int(role), "disabled": False, "password_hash": password_hash}
            await self._database.run(lambda connection: connection.execute(insert(schema.users), row))
            self._users[name] = user
        return user

    async def set_password(self, name: str, password: str) -> None:
        """Give the user another password; sessions go on. Raises HANDLE_INVALID, VALUE_NOT_SUPPORTED."""
        self.get(name)
        password_hash = await self.passwords.hash(password)
        async with self._lock:
            user = self.get(name)
            # Both or neither.
            with trio.CancelScope(shield=True):
                await self._keep(name, password)
                await self._store(replace(user, password_hash=password_hash))
        self._tell(name)

    async def set_role(self, name: str, role: Role) -> None:
        """Give the user another role, in sessions that are open too. Raises HANDLE_INVALID."""
        await self._change(name, role=role)

    async def set_disabled(self, name: str, disabled: bool) -> None:
        """Let the user in no more, or again; open sessions of a disabled user are not valid. Raises
        HANDLE_INVALID.
        """
        await self._change(name, disabled=disabled)

    async def remove(self, name: str) -> None:
        """Remove the user with all sessions. Raises HANDLE_INVALID."""
        async with self._lock:
            self.get(name)
            statement = delete(schema.users).where(schema.users.c.name == name)
            await self._database.run(lambda connection: connection.execute(statement))
            del self._users[name]
        self._tell(name)

    async def renew_hash(self, user: User, password: str) -> None:
        """Hash the password, just verified for `user`, by today's parameters; not if the user changed
        meanwhile.
        """
        password_hash = await self.passwords.hash(password)
        async with self._lock:
            if self._users.get(user.name) is user:
                await self._store(replace(user, password_hash=password_hash))

    async def _keep(self, name: str, password: str) -> None:
        for keeper in self._keepers:
            await keeper(name, password)

    async def _change(self, name: str, **changes: Any) -> None:
        async with self._lock:
            await self._store(replace(self.get(name), **changes))
        self._tell(name)

    async def _store(self, user: User) -> None:
        values = {
            "role": int(user.role),
            "disabled": user.disabled,
            "password_hash": user.password_hash,
        }
        statement = update(schema.users).where(schema.users.c.name == user.name).values(values)
        await self._database.run(lambda connection: connection.execute(statement))
        self._users[user.name] = user

    def _tell(self, name: str) -> None:
        for listener in self._listeners:
            listener(name)
