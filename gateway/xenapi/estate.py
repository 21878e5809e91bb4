"""What the methods of the API work on: the parts of the core and the repositories, handed over as one
object."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from gateway.access.holding import Holds
from gateway.core.limits import Limits
from gateway.transfers.publications import Publications
from gateway.transfers.pull_source import PullRules

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.current_operations import CurrentOperations
    from gateway.core.events import Events
    from gateway.core.leases import Leases
    from gateway.core.nbd_service import NbdDoor
    from gateway.core.records import Records
    from gateway.core.refusals import Refusals
    from gateway.core.sessions import Sessions
    from gateway.core.tasks import Tasks
    from gateway.core.users import Users
    from gateway.repository.inventory import Inventory

_COPIES: Final = 4
"""So many VDIs are copied at once: more of them would only make each of them slower."""

_PULLS: Final = 4
"""So many images are fetched at once, for the same reason."""

_MOST_REGISTRATIONS: Final = 1000
"""Sessions that listen through event.next; those that began first are forgotten, and told so."""


@dataclass(slots=True)
class Registration:
    """What one session listens to through event.next: class names as it wrote them, and what it knows."""

    counter: int
    classes: dict[str, None] = field(default_factory=dict)


class Registrations:
    """The sessions that listen through event.next."""

    def __init__(self) -> None:
        self._registrations: Final[OrderedDict[str, Registration]] = OrderedDict()

    def find(self, listener: str) -> Registration | None:
        return self._registrations.get(listener)

    def of(self, listener: str, counter: int) -> Registration:
        """The listener's registration; a new one begins at `counter`."""
        registration = self._registrations.setdefault(listener, Registration(counter))
        if len(self._registrations) > _MOST_REGISTRATIONS:
            self._registrations.popitem(last=False)
        return registration


@dataclass(frozen=True, kw_only=True)
class Estate:
    """Everything that a message may reach."""

    records: Records
    tasks: Tasks
    users: Users
    sessions: Sessions
    inventory: Inventory
    leases: Leases
    events: Events
    operations: CurrentOperations
    nbd: NbdDoor
    refusals: Refusals
    holds: Holds = field(default_factory=Holds)
    registrations: Registrations = field(default_factory=Registrations)
    publications: Publications = field(default_factory=Publications)
    copies: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_COPIES))
    pulls: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_PULLS))
    pull_rules: Callable[[], PullRules] = PullRules
    limits: Limits = field(default_factory=Limits)
