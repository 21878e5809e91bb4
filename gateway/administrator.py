"""The administrator's password is always what its file in the state directory says.

Whoever can read the file can log in, also after the password was changed through the API: both are one.
"""

from dataclasses import dataclass

import structlog

from gateway.core.database import DatabaseFailed
from gateway.core.errors import XenAPIError
from gateway.core.passwords import Verdict
from gateway.core.threads import in_thread
from gateway.core.users import Users
from gateway.listening import ServeRefused
from gateway.state import ADMINISTRATOR, StateDirectory

log = structlog.get_logger("gateway.app")


@dataclass(frozen=True, slots=True)
class AdministratorPassword:
    """`password` is what the file said at the start."""

    state: StateDirectory
    password: str

    async def apply(self, users: Users) -> None:
        """Let the user have it, also when somebody has written another one into the file. ServeRefused."""
        try:
            if await users.ensure_administrator(self.password) is not None:
                return
            user = users.find(ADMINISTRATOR)
            if user is None:
                return
            if await users.passwords.verify(user.password_hash, self.password) is Verdict.WRONG:
                await users.set_password(ADMINISTRATOR, self.password)
                log.info("password changed, as its file says", user=ADMINISTRATOR)
        except DatabaseFailed:
            raise
        except XenAPIError as error:
            raise ServeRefused(f"{self.state.password_file}: {error.message}") from error

    async def keep(self, name: str, password: str) -> None:
        """Write a user's new password to the file if it is the administrator's. Raises XenAPIError."""
        if name != ADMINISTRATOR:
            return
        if password.splitlines() != [password]:
            raise XenAPIError(
                "VALUE_NOT_SUPPORTED", "password", "***", "it goes into a file, where it must be one line"
            )
        try:
            await in_thread(self.state.write_password, password)
        except OSError as error:
            problem = f"{self.state.password_file} can't be written: {error.strerror}"
            log.warning("the password was not changed", user=name, why=problem)
            raise XenAPIError("INTERNAL_ERROR", f"{problem}, the password is as it was") from error
        log.info("password written to its file", user=name, file=self.state.password_file)
