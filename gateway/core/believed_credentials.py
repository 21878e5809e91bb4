"""User names and passwords that were right a moment ago: Basic credentials come with each request, and a hash
takes long.

The trap: what is remembered would be worth stealing. So it is a keyed hash of the credentials, and the key
dies with the process.
"""

import hmac
import secrets
from collections import OrderedDict
from typing import Final

import trio

from gateway.core.limits import Limits
from gateway.core.users import User, Users


class BelievedCredentials:
    """Those of users who may come in, each for `basic_cache_seconds` by trio's clock."""

    def __init__(self, users: Users, limits: Limits) -> None:
        self._users: Final = users
        self._limits: Final = limits
        self._key: Final = secrets.token_bytes(32)
        # The user, and when that ends; the least recently used ones come first.
        self._verified: Final[OrderedDict[bytes, tuple[str, float]]] = OrderedDict()

    def key(self, name: str, password: str) -> bytes:
        """Under which these are remembered."""
        # The length keeps "ab", "c" and "a", "bc" apart.
        encoded = name.encode("utf-8", "surrogatepass")
        message = len(encoded).to_bytes(8, "big") + encoded + password.encode("utf-8", "surrogatepass")
        return hmac.digest(self._key, message, "sha256")

    def user(self, key: bytes) -> User | None:
        """The user whose credentials these are known to be, without a hash."""
        name, until = self._verified.get(key, ("", 0.0))
        user = self._users.find(name)
        if user is None or user.disabled or trio.current_time() >= until:
            self._verified.pop(key, None)
            return None
        self._verified.move_to_end(key)
        return user

    def remember(self, key: bytes, user: User) -> None:
        """They were verified just now."""
        self._verified[key] = (user.name, trio.current_time() + self._limits.basic_cache_seconds)
        if len(self._verified) > self._limits.basic_cache_entries:
            self._verified.popitem(last=False)

    def forget(self, name: str) -> None:
        """Those of this user have to be verified again."""
        for key in [key for key, (user, _) in self._verified.items() if user == name]:
            del self._verified[key]
