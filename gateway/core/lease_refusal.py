"""Why a lease was refused: the error for the client, and for the gateway itself who stands in the way.

What goes first until some time is told with the time left, for then there is an end to wait for; all else is
in use. The error names one who decides; `blockers` are all that are known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from gateway.core.clock import utc_now
from gateway.core.errors import XenAPIError
from gateway.core.lease_table import Grant, Holder
from gateway.images.file_locks import FileInUse


@dataclass(frozen=True)
class Blocker:
    """Somebody in the way of a request: what is told of them, and since when (UTC) they are known.

    `holder` is None for a program outside this gateway, of which only the locks on a file are known; `since`
    is then the time of the refusal.
    """

    holder: Holder | None
    since: datetime
    description: str

    def __str__(self) -> str:
        return self.description


class LeaseRefused(XenAPIError):  # noqa: N818 - an answer, not a fault
    """VDI_IN_USE or OTHER_OPERATION_IN_PROGRESS, because of `blockers`; the first of them is named."""

    def __init__(self, code: str, *params: str, blockers: Sequence[Blocker] = ()) -> None:
        super().__init__(code, *params)
        self.blockers = tuple(blockers)


def refused_by_grants(vdi: str, in_the_way: Sequence[Grant], now: float) -> LeaseRefused:
    """The refusal of a lease for `vdi` because of others in the table; `now` by trio's clock."""
    blockers = [Blocker(grant.holder, grant.began, str(grant.holder)) for grant in in_the_way]
    first = in_the_way[0]
    if first.until is not None and first.goes_first(now):
        seconds = math.ceil(first.until - now)
        operation = f"{first.holder.operation} by {first.holder.who}, at most {seconds} seconds more"
        return LeaseRefused("OTHER_OPERATION_IN_PROGRESS", "VDI", vdi, operation, blockers=blockers)
    return LeaseRefused("VDI_IN_USE", vdi, str(first.holder), blockers=blockers)


def refused_by_lock(vdi: str, busy: FileInUse) -> LeaseRefused:
    """The refusal of a lease for `vdi` because of somebody's locks on a file."""
    blocker = Blocker(None, utc_now(), f"{busy.path}: {busy.why}")
    return LeaseRefused("VDI_IN_USE", vdi, blocker.description, blockers=[blocker])
