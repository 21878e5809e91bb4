"""What the methods of the API work on: the parts of the core and the repositories, handed over as one
object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.leases import Leases
    from gateway.core.records import Records
    from gateway.core.sessions import Sessions
    from gateway.core.tasks import Tasks
    from gateway.repository.inventory import Inventory


@dataclass(frozen=True, kw_only=True)
class Estate:
    """Everything that a message may reach. `changing` is held while a field is read, changed and written
    back."""

    records: Records
    tasks: Tasks
    sessions: Sessions
    inventory: Inventory
    leases: Leases
