"""Slows those who guess passwords, without locking anybody out.

Three counters of wrong passwords. Of one user from one address, and of one address: the next attempt from
there is looked at only after a while, and attempts from one address take turns, so that many at once gain
nothing. Of one user from everywhere: only the answer to a wrong password waits, so an attacker cannot keep
the right password of another address waiting. The tables are bounded, and nothing is held by whoever sleeps.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.core.network import network_of

K = TypeVar("K")

# Several people mistype behind one address; a single one does not so often.
_FREE_PER_ADDRESS: Final = 10


@dataclass(slots=True)
class _Wrong:
    """How often and when last, by trio's clock."""

    count: int
    last: float


class _Counter(Generic[K]):
    """Wrong passwords by some key, the longest untouched forgotten first. The first `free` cost nothing."""

    def __init__(self, limits: Limits, *, free: int = 0) -> None:
        self._limits = limits
        self._free = free
        self._entries: OrderedDict[K, _Wrong] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: K) -> None:
        entry = self._entries.setdefault(key, _Wrong(0, 0.0))
        entry.count = 1 if self._is_forgotten(entry) else entry.count + 1
        entry.last = trio.current_time()
        self._entries.move_to_end(key)
        if len(self._entries) > self._limits.password_delay_entries:
            self._entries.popitem(last=False)

    def forget(self, key: K) -> None:
        self._entries.pop(key, None)

    def delay(self, key: K) -> float:
        """What the wrong passwords so far cost, in seconds."""
        entry = self._entries.get(key)
        if entry is None or self._is_forgotten(entry) or entry.count <= self._free:
            return 0.0
        # Bounded before the power: a float would overflow after a thousand.
        doublings = min(entry.count - self._free - 1, 30)
        return min(self._limits.password_delay_first * 2.0**doublings, self._limits.password_delay_maximum)

    def free_at(self, key: K) -> float:
        """When the next attempt may be looked at, by trio's clock."""
        entry = self._entries.get(key)
        return 0.0 if entry is None else entry.last + self.delay(key)

    def _is_forgotten(self, entry: _Wrong) -> bool:
        return trio.current_time() - entry.last > self._limits.password_delay_forget


@dataclass(slots=True)
class _Turn:
    """One address's turn, kept while somebody holds or awaits it."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    people: int = 0


class PasswordDelay:
    """Asked around each password that is hashed."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pairs: _Counter[tuple[str, str]] = _Counter(limits)
        self._addresses: _Counter[str] = _Counter(limits, free=_FREE_PER_ADDRESS)
        self._users: _Counter[str] = _Counter(limits)
        self._turns: dict[str, _Turn] = {}

    @asynccontextmanager
    async def attempt(self, user: str, address: str) -> AsyncIterator[None]:
        """Wait until an attempt from `address` may be looked at; the block looks at it, alone for that
        address.

        Raises SESSION_AUTHENTICATION_FAILED if that would take longer than `password_queue_seconds`.
        """
        network = network_of(address)
        give_up = trio.current_time() + self._limits.password_queue_seconds
        while True:
            free_at = self._free_at(user, network)
            if free_at > give_up or trio.current_time() > give_up:
                raise XenAPIError(
                    "SESSION_AUTHENTICATION_FAILED",
                    user,
                    "there were too many wrong passwords from this address, wait a minute",
                )
            if free_at > trio.current_time():
                await trio.sleep_until(free_at)
                continue
            async with self._turn(network):
                if self._free_at(user, network) <= trio.current_time():
                    yield
                    return

    def wrong(self, user: str, address: str) -> float:
        """Count a wrong password; how many seconds its answer has to wait, outside of `attempt`."""
        network = network_of(address)
        self._pairs.add((network, user))
        self._addresses.add(network)
        self._users.add(user)
        return self._users.delay(user)

    def right(self, user: str, address: str) -> None:
        """A right password: this user may mistype again from there. Nothing else is forgiven."""
        self._pairs.forget((network_of(address), user))

    def _free_at(self, user: str, network: str) -> float:
        return max(self._pairs.free_at((network, user)), self._addresses.free_at(network))

    @asynccontextmanager
    async def _turn(self, network: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault(network, _Turn())
        turn.people += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.people -= 1
            if not turn.people:
                del self._turns[network]
