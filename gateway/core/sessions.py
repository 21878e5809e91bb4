"""Who asks: sessions by their reference, or a user and password with each request (Basic).

A session's reference is its secret: only its SHA-256 is kept, in memory too, and records show sessions by
uuid alone. Sessions outlive a restart, end by logging out or after a day without use, and are valid only
while their user is. Basic credentials cost one hash, then are believed for some minutes. The trap is time:
what outlives a restart is written by the wall clock, but a session ends by trio's clock, which nobody can
set.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Final

import structlog
import trio
from sqlalchemy import Connection, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from gateway.core import schema
from gateway.core.believed_credentials import BelievedCredentials
from gateway.core.clock import utc_now
from gateway.core.database import Database, DatabaseFailed
from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.core.password_delay import PasswordDelay
from gateway.core.passwords import Verdict
from gateway.core.refs import new_ref, new_session_ref, new_uuid
from gateway.core.roles import Permission, Role
from gateway.core.users import LONGEST_NAME, User, Users

log: Final[structlog.typing.FilteringBoundLogger] = structlog.get_logger()

# How often sessions that have ended are looked for, in seconds; one that is used is looked at then anyway.
_EXPIRE_INTERVAL: Final = 600.0

# What a client says of itself is kept in memory and shown, so not without end.
_LONGEST_TEXT: Final = 256


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a request brought, None where it brought nothing. A session reference comes before a password."""

    address: str
    session_ref: str | None = field(default=None, repr=False)
    user: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What may be shown of a session. `object_ref` names it in records and opens nothing."""

    uuid: str
    object_ref: str
    user: str
    version: str
    originator: str
    address: str
    created: datetime
    last_active: datetime

    @property
    def validation_time(self) -> datetime:
        """When the password was verified."""
        return self.created


@dataclass(frozen=True, slots=True)
class Identity:
    """Who was authorized, with the role at that moment; `session` is None for Basic credentials."""

    user: str
    role: Role
    session: Session | None = None


@dataclass(slots=True)
class _Open:
    """A session with what only the gateway needs. `used` is trio's clock."""

    digest: str
    session: Session
    used: float
    touched: float
    users: int = 0


class Sessions:
    """All sessions and all authorization. Made by `Sessions.load`; `run` should be running beside it."""

    def __init__(
        self, database: Database, users: Users, *, limits: Limits, now: Callable[[], datetime]
    ) -> None:
        self._database = database
        self._users = users
        self._limits = limits
        self._now = now
        self._by_digest: dict[str, _Open] = {}
        self._by_uuid: dict[str, _Open] = {}
        # Of sessions that have ended: the rows that are still there.
        self._rows_left: set[str] = set()
        self._ended: list[Callable[[str], None]] = []
        self._delay = PasswordDelay(limits)
        self._believed = BelievedCredentials(users, limits)
        users.on_change(self._user_changed)

    @classmethod
    async def load(
        cls,
        database: Database,
        users: Users,
        *,
        limits: Limits | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> "Sessions":
        """Read the sessions; those that have been idle for too long by the wall clock end at once."""
        sessions = cls(database, users, limits=limits or Limits(), now=now)

        def rows(connection: Connection) -> list[dict[str, Any]]:
            query = select(schema.sessions).order_by(schema.sessions.c.last_active)
            return [dict(row) for row in connection.execute(query).mappings()]

        for row in await database.run(rows):
            digest = row.pop("ref_sha256")
            session = Session(**row)
            # A wall clock that was set back makes a session younger at most by nothing.
            idle = max(0.0, (now() - session.last_active).total_seconds())
            used = trio.current_time() - idle
            sessions._put(_Open(digest, session, used, used))
        await sessions._end_idle()
        return sessions

    async def run(self) -> None:
        """Remove sessions that have ended, and write down that others are in use. Never returns."""
        while True:
            await trio.sleep(_EXPIRE_INTERVAL)
            for entry in list(self._by_digest.values()):
                if entry.users:
                    await self._touch(entry)
            await self._end_idle()

    async def login(
        self, user: str, password: str, *, version: str = "", originator: str = "", address: str
    ) -> str:
        """Open a session; its reference, which is a secret. Raises SESSION_AUTHENTICATION_FAILED, late if
        guessed at.
        """
        verified = await self._verify(user, password, address)
        return await self._open(verified, version=version, originator=originator, address=address)

    async def login_trusted(self, user: str, *, version: str = "", originator: str = "", address: str) -> str:
        """Open a session for whoever the kernel has vouched for. Raises SESSION_AUTHENTICATION_FAILED for a
        user who is not let in.
        """
        known = self._users.find(user)
        if known is None or known.disabled:
            raise XenAPIError("SESSION_AUTHENTICATION_FAILED", user, "there is no such user who may log in")
        return await self._open(known, version=version, originator=originator, address=address)

    async def check_password(self, user: str, password: str, address: str) -> None:
        """Whether somebody who is logged in knows the password. Raises SESSION_AUTHENTICATION_FAILED, late if
        it is guessed at.
        """
        await self._verify(user, password, address)

    async def _open(self, user: User, *, version: str, originator: str, address: str) -> str:
        ref = new_session_ref()
        moment, time = self._now(), trio.current_time()
        session = Session(
            uuid=new_uuid(),
            object_ref=new_ref(),
            user=user.name,
            version=version[:_LONGEST_TEXT],
            originator=originator[:_LONGEST_TEXT],
            address=address,
            created=moment,
            last_active=moment,
        )
        entry = _Open(_digest(ref), session, time, time)
        row = {item.name: getattr(session, item.name) for item in fields(session)}
        row["ref_sha256"] = entry.digest
        try:
            await self._database.run(lambda connection: connection.execute(insert(schema.sessions), row))
        except IntegrityError as error:
            reason = "the user was removed a moment ago"
            raise XenAPIError("SESSION_AUTHENTICATION_FAILED", user.name, reason) from error
        except DatabaseFailed:
            # A full disk must not keep out who comes to make room on it.
            log.warning("the session ends with this process, it could not be recorded", session=session.uuid)
        self._put(entry)
        log.info(
            "logged in", user=user.name, session=session.uuid, originator=session.originator, address=address
        )
        await self._end_or_log(self._beyond_the_limit(session.user))
        return ref

    async def logout(self, ref: str) -> None:
        """End a session. Raises SESSION_INVALID; DatabaseFailed if a restart might still bring it back."""
        await self._end([self._entry(ref)])

    def on_end(self, call: Callable[[str], None]) -> None:
        """`call` gets the uuid of every session that ends, or whose user may not come in any more."""
        self._ended.append(call)

    def get(self, ref: str) -> Session:
        """The session with this secret reference; looking is not using. Raises SESSION_INVALID."""
        return self._entry(ref).session

    def by_uuid(self, uuid: str) -> Session:
        """The session with this uuid. Raises UUID_INVALID."""
        entry = self._by_uuid.get(uuid.lower())
        if entry is None or not self._is_valid(entry):
            raise XenAPIError("UUID_INVALID", "session", uuid)
        return entry.session

    def all(self) -> list[Session]:
        """Every valid session."""
        return [entry.session for entry in self._by_digest.values() if self._is_valid(entry)]

    @contextmanager
    def in_use(self, session: Session | str) -> Iterator[None]:
        """While this is held, the session (or its uuid) does not end by being idle. Logging out ends it all
        the same.
        """
        entry = self._by_uuid.get(session if isinstance(session, str) else session.uuid)
        if entry is None:
            yield
            return
        entry.users += 1
        try:
            yield
        finally:
            entry.users -= 1
            entry.used = trio.current_time()

    async def authorize(self, credentials: Credentials, permission: Permission) -> Identity:
        """Who asks, if that one may. A session is renewed by this.

        Raises SESSION_INVALID, SESSION_AUTHENTICATION_FAILED (after a delay if the password is guessed at, at
        once if there are no credentials), RBAC_PERMISSION_DENIED.
        """
        if credentials.session_ref is not None:
            entry = self._entry(credentials.session_ref)
            await self._touch(entry)
            user, session = self._users.find(entry.session.user), entry.session
            if user is None:
                raise XenAPIError("SESSION_INVALID", credentials.session_ref)
        elif credentials.user is not None and credentials.password is not None:
            user, session = (
                await self._basic(credentials.user, credentials.password, credentials.address),
                None,
            )
        else:
            raise XenAPIError(
                "SESSION_AUTHENTICATION_FAILED", credentials.user or "", "there are no credentials"
            )
        permission.check(user.role)
        return Identity(user.name, user.role, session)

    # Passwords

    async def _basic(self, name: str, password: str, address: str) -> User:
        key = self._believed.key(name, password)
        known = self._believed.user(key)
        if known is not None:
            await trio.lowlevel.checkpoint()
            return known
        return await self._verify(name, password, address, key)

    async def _verify(self, name: str, password: str, address: str, key: bytes | None = None) -> User:
        """The user, after one hash; `key` is where to remember Basic credentials."""
        # Wrong names are remembered, and nobody has a longer one than this.
        name = name[: LONGEST_NAME + 1]
        async with self._delay.attempt(name, address):
            # Several requests that began at once need one hash between them.
            known = None if key is None else self._believed.user(key)
            if known is not None:
                return known
            user, verdict = await self._look_at(name, password)
            if user is not None and verdict is not Verdict.WRONG:
                self._delay.right(name, address)
                if key is not None:
                    self._believed.remember(key, user)
                if verdict is Verdict.OUTDATED:
                    await self._users.renew_hash(user, password)
                return user
            delay = self._delay.wrong(name, address)
        log.warning("wrong password", user=name, address=address)
        await trio.sleep(delay)
        raise XenAPIError("SESSION_AUTHENTICATION_FAILED", name, "the user name or the password is wrong")

    async def _look_at(self, name: str, password: str) -> tuple[User | None, Verdict]:
        """The user, None if there is none who may come in, and what the password is to that user's hash."""
        while True:
            before = self._users.find(name)
            usable = before is not None and not before.disabled
            password_hash = before.password_hash if before is not None and usable else None
            verdict = await self._users.passwords.verify(password_hash, password)
            if self._users.find(name) is before:
                return (before if usable else None), verdict
            # The user changed while the old hash was checked: what it says does not count any more.

    def _user_changed(self, name: str) -> None:
        self._believed.forget(name)
        entries = [entry for entry in self._by_digest.values() if entry.session.user == name]
        user = self._users.find(name)
        for entry in entries:
            if user is None:
                # The database has dropped the sessions with their user.
                self._drop(entry)
            elif user.disabled:
                self._tell_end(entry)

    # Sessions

    def _entry(self, ref: str) -> _Open:
        digest = _digest(ref)
        entry = self._by_digest.get(digest)
        if entry is None or not hmac.compare_digest(entry.digest, digest) or not self._is_valid(entry):
            raise XenAPIError("SESSION_INVALID", ref)
        return entry

    def _is_valid(self, entry: _Open) -> bool:
        user = self._users.find(entry.session.user)
        if user is None or user.disabled:
            return False
        return entry.users > 0 or trio.current_time() - entry.used < self._limits.session_idle

    async def _touch(self, entry: _Open) -> None:
        """Renew the session; written down at most once a minute."""
        time = trio.current_time()
        entry.used = time
        if time - entry.touched < self._limits.session_touch_seconds:
            await trio.lowlevel.checkpoint()
            return
        entry.touched = time
        moment = self._now()
        statement = (
            update(schema.sessions)
            .where(schema.sessions.c.ref_sha256 == entry.digest)
            .values(last_active=moment)
        )
        try:
            await self._database.run(lambda connection: connection.execute(statement))
        except (SQLAlchemyError, DatabaseFailed):
            # A full disk must not keep from working who only wants to read.
            log.exception("the use of a session could not be recorded", session=entry.session.uuid)
            return
        entry.session = replace(entry.session, last_active=moment)

    def _beyond_the_limit(self, user: str) -> list[_Open]:
        own = [entry for entry in self._by_digest.values() if entry.session.user == user]
        excess = len(own) - self._limits.sessions_per_user
        idle = sorted((entry for entry in own if not entry.users), key=lambda entry: entry.used)
        return idle[: max(0, excess)]

    async def _end_idle(self) -> None:
        await self._end_or_log([entry for entry in self._by_digest.values() if not self._is_valid(entry)])

    async def _end_or_log(self, entries: list[_Open]) -> None:
        try:
            await self._end(entries)
        except (SQLAlchemyError, DatabaseFailed):
            log.exception("sessions that have ended could not be removed from the database")

    async def _end(self, entries: list[_Open]) -> None:
        """End sessions. Raises DatabaseFailed; then their rows go with those that end next, or by `run`."""
        # Out of memory first: a session that ends must not open anything while the database is waited for.
        for entry in entries:
            self._drop(entry)
            self._rows_left.add(entry.digest)
        if not self._rows_left:
            return
        statement = delete(schema.sessions).where(schema.sessions.c.ref_sha256 == bindparam("_digest"))
        rows = [{"_digest": digest} for digest in self._rows_left]
        with trio.CancelScope(shield=True):
            await self._database.run(lambda connection: connection.execute(statement, rows))
        self._rows_left.difference_update(row["_digest"] for row in rows)

    def _put(self, entry: _Open) -> None:
        self._by_digest[entry.digest] = entry
        self._by_uuid[entry.session.uuid] = entry

    def _drop(self, entry: _Open) -> None:
        self._by_digest.pop(entry.digest, None)
        self._by_uuid.pop(entry.session.uuid, None)
        self._tell_end(entry)

    def _tell_end(self, entry: _Open) -> None:
        for call in self._ended:
            call(entry.session.uuid)


def _digest(ref: str) -> str:
    return hashlib.sha256(ref.encode("utf-8", "surrogatepass")).hexdigest()
