"""Users and sessions over a database of their own, with passwords that cost little, for tests."""

from gateway.core.clock import utc_now
from gateway.core.database import Database
from gateway.core.limits import Limits
from gateway.core.passwords import Passwords, Verdict
from gateway.core.roles import Permission, Role
from gateway.core.sessions import Credentials, Identity, Sessions
from gateway.core.users import Users

HERE, THERE = "192.0.2.1", "198.51.100.9"
LOOK = Permission("VDI.get_record", Role.READ_ONLY)


class CountedPasswords(Passwords):
    """Cheap parameters; `verified` counts the hashes that checking passwords took."""

    def __init__(self) -> None:
        super().__init__(memory_kib=8, passes=1)
        self.verified = 0

    async def verify(self, password_hash: str | None, password: str) -> Verdict:
        self.verified += 1
        return await super().verify(password_hash, password)


class Gate:
    """Users and sessions over one database, which can be closed and opened again."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.now = utc_now()
        self.passwords = CountedPasswords()
        self.limits = Limits()

    async def open(self) -> "Gate":
        self.database = await Database.open(self.path)
        self.users = await Users.load(self.database, self.passwords)
        await self.users.ensure_administrator("right")
        self.sessions = await Sessions.load(
            self.database, self.users, limits=self.limits, now=lambda: self.now
        )
        return self

    async def reopen(self) -> None:
        await self.database.aclose()
        await self.open()

    async def login(self, user: str = "root", password: str = "right", address: str = HERE) -> str:
        return await self.sessions.login(user, password, version="1.0", originator="test", address=address)

    async def by_ref(self, ref: str, permission: Permission = LOOK) -> Identity:
        return await self.sessions.authorize(Credentials(HERE, session_ref=ref), permission)

    async def by_password(self, user: str = "root", password: str = "right", address: str = HERE) -> Identity:
        return await self.sessions.authorize(Credentials(address, user=user, password=password), LOOK)
