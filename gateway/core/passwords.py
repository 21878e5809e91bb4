"""Password hashes: argon2id with 19 MiB, two passes and one lane (OWASP's first choice for it), about 25 ms
each.

One at a time, in a thread of its own: a hundred logins at once must not take 2 GiB and every core. The trap:
a user who is not known has to cost the same time as a wrong password, so `verify` takes None for a hash and
works all the same.
"""

import base64
import secrets
from enum import Enum
from typing import Final

import trio
from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

from gateway.core.errors import XenAPIError
from gateway.core.threads import in_thread

MEMORY_KIB: Final = 19_456
PASSES: Final = 2
LANES: Final = 1

# Nobody types more; hashing a password of megabytes only serves those who want the gateway busy.
LONGEST_PASSWORD: Final = 1024


class Verdict(Enum):
    """What a password is to a hash. OUTDATED is right, but the hash was made with other parameters."""

    WRONG = "wrong"
    RIGHT = "right"
    OUTDATED = "outdated"


class Passwords:
    """Makes and checks hashes, one at a time."""

    def __init__(self, *, memory_kib: int = MEMORY_KIB, passes: int = PASSES, lanes: int = LANES) -> None:
        self._hasher = PasswordHasher(
            time_cost=passes, memory_cost=memory_kib, parallelism=lanes, type=Type.ID
        )
        self._limiter = trio.CapacityLimiter(1)
        self._nobody = _hash_of_nobody(memory_kib, passes, lanes)

    async def hash(self, password: str) -> str:
        """The encoded hash, which carries its salt and parameters. Raises VALUE_NOT_SUPPORTED for an unusable
        password.
        """
        if not password:
            raise XenAPIError("VALUE_NOT_SUPPORTED", "password", "", "a password must not be empty")
        try:
            length = len(password.encode())
        except UnicodeEncodeError as error:
            raise XenAPIError("VALUE_NOT_SUPPORTED", "password", "***", "it is not valid Unicode") from error
        if length > LONGEST_PASSWORD:
            raise XenAPIError(
                "VALUE_NOT_SUPPORTED", "password", "***", f"it is longer than {LONGEST_PASSWORD} bytes"
            )
        return await in_thread(self._hasher.hash, password, limiter=self._limiter)

    async def verify(self, password_hash: str | None, password: str) -> Verdict:
        """Whether the password is the hash's; None (no such user) takes as long and is always wrong."""
        verdict = await in_thread(
            self._verify, password_hash or self._nobody, password[:LONGEST_PASSWORD], limiter=self._limiter
        )
        if password_hash is None or len(password) > LONGEST_PASSWORD:
            return Verdict.WRONG
        return verdict

    def _verify(self, password_hash: str, password: str) -> Verdict:
        try:
            self._hasher.verify(password_hash, password)
        except VerifyMismatchError:
            return Verdict.WRONG
        except UnicodeEncodeError:
            # A lone surrogate: it came from no keyboard.
            return Verdict.WRONG
        except (VerificationError, InvalidHashError) as error:
            raise XenAPIError("INTERNAL_ERROR", f"a stored password hash cannot be read: {error}") from error
        return Verdict.OUTDATED if self._hasher.check_needs_rehash(password_hash) else Verdict.RIGHT


def _hash_of_nobody(memory_kib: int, passes: int, lanes: int) -> str:
    """A hash of no known password in argon2's encoded form, made without hashing anything."""
    salt, tag = (base64.b64encode(secrets.token_bytes(size)).rstrip(b"=").decode() for size in (16, 32))
    return f"$argon2id$v=19$m={memory_kib},t={passes},p={lanes}${salt}${tag}"
