"""How many tasks there are: finished ones are kept for a while, so that clients may ask how they ended.

Users don't share what is allowed: each may make tasks, also who may do nothing else.
"""

from collections import Counter
from collections.abc import Collection, Container, Iterable
from datetime import datetime, timedelta

from gateway.core.limits import Limits
from gateway.core.task import Task


def beyond_the_limits(
    tasks: Collection[Task], running: Container[str], limits: Limits, now: datetime
) -> list[str]:
    """Finished tasks that are too old, and of each user the oldest finished ones while there are too many,
    clients' own last. `running` are those whose operation has still to say that it has ended.
    """
    oldest = now - timedelta(seconds=limits.task_keep_seconds)
    finished = [
        (task.client_made, task.finished, task.ref, task.user)
        for task in tasks
        if task.status.is_final and task.ref not in running
    ]
    old = [ref for _, moment, ref, _ in finished if moment < oldest]
    # Those that clients leave pending don't count: else the end of each operation would be forgotten at once.
    kept: Counter[str] = Counter()
    for _, moment, ref, user in sorted(finished, reverse=True):
        if moment >= oldest:
            kept[user] += 1
            if kept[user] > limits.task_keep:
                old.append(ref)
    return old


def waiting_for_clients(tasks: Iterable[Task], user: str) -> int:
    """How many of a user's wait for their clients to end them."""
    return sum(task.user == user and not task.worked_on and not task.status.is_final for task in tasks)
