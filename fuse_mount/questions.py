"""Questions that several tasks have at the same time: one of them asks, the others wait for its answer.

This knows nothing of what is asked, and remembers nothing that has been answered.

The trap: who asks is a task like the others, and may be cancelled while they wait. Its cancellation is not
theirs, so the next of them asks anew.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

T = TypeVar("T")


@dataclass(frozen=True)
class _Answer(Generic[T]):
    value: T


@dataclass(eq=False)
class _Question(Generic[T]):
    """A question on its way. If it ends without an outcome, who asked was cancelled."""

    ended: trio.Event = field(default_factory=trio.Event)
    outcome: _Answer[T] | Exception | None = None


class Questions(Generic[T]):
    """Questions about things, each thing known by its name; at most one about each is on its way."""

    def __init__(
        self, ask: Callable[[str], Awaitable[T]], keep: Callable[[str, T], None] | None = None
    ) -> None:
        """`ask` finds the answer about a name; it must not want the answer about the same name itself.

        `keep`, if any, gets each name and answer before those who wait do; but none about a name that was
        forgotten while the question was on its way.
        """
        self._ask: Final = ask
        self._keep: Final = keep
        self._on_their_way: Final[dict[str, _Question[T]]] = {}

    async def answer(self, name: str) -> T:
        """The answer about `name`, asked for all who want it until it is there.

        An exception that `ask` raises is raised for each of them and then forgotten: who comes later asks
        anew. If the task that asks is cancelled, or ended by anything else that is no Exception, this is its
        own affair: one of those who wait asks anew, and the others wait for that one. If a task that waits
        is cancelled, nobody notices.
        """
        while True:
            question = self._on_their_way.get(name)
            if question is None:
                return await self._put(name)
            await question.ended.wait()
            if isinstance(question.outcome, Exception):
                raise question.outcome
            if question.outcome is not None:
                return question.outcome.value
            # Who asked was cancelled.

    def forget(self, name: str) -> None:
        """An answer that is on its way may be an old one: who wants one from now on asks anew.

        Those who wait already get the one that they wait for.
        """
        self._on_their_way.pop(name, None)

    async def _put(self, name: str) -> T:
        question = self._on_their_way[name] = _Question[T]()
        try:
            value = await self._ask(name)
            if self._keep is not None and self._is_current(name, question):
                self._keep(name, value)
            question.outcome = _Answer(value)
        except Exception as failure:
            question.outcome = failure
            raise
        finally:
            if self._is_current(name, question):
                del self._on_their_way[name]
            question.ended.set()
        return value

    def _is_current(self, name: str, question: _Question[T]) -> bool:
        return self._on_their_way.get(name) is question
