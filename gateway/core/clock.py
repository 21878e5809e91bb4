"""The wall clock, for what people read and what outlives a restart. Time-outs use trio's clock, which nobody
can set back.
"""

from datetime import UTC, datetime
from typing import Final

# XenAPI has no absent datetime: a task that has not finished says so by this one.
EPOCH: Final = datetime.fromtimestamp(0, UTC)


def utc_now() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(UTC)
