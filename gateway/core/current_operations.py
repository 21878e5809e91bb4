"""Which operations run on objects that have no leases: SR.current_operations. Each change is an event."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from gateway.core.events import Events
from gateway.core.refs import new_uuid


class CurrentOperations:
    """What is being done to whom, by the references of objects and tasks."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._running: Final[dict[str, dict[str, str]]] = {}

    @contextmanager
    def running(self, class_name: str, ref: str, operation: str, task: str | None) -> Iterator[None]:
        """For the time of a block, `operation` runs on the object, under `task` or else under a dummy."""
        key = task or f"DummyRef:|{new_uuid()}|{class_name}.{operation}"
        self._running.setdefault(ref, {})[key] = operation
        self._events.publish(class_name, "mod", ref)
        try:
            yield
        finally:
            operations = self._running[ref]
            del operations[key]
            if not operations:
                del self._running[ref]
            self._events.publish(class_name, "mod", ref)

    def of(self, ref: str) -> dict[str, str]:
        """The operations on one object, by task."""
        return dict(self._running.get(ref, ()))
