"""Tasks that ask about the same things at one time, and a source whose answers come when a test says so.

The trap: where a question goes by way of a thread, all tasks may be waiting before it has been asked; what
tells that it has is `until_asked`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import trio
import trio.testing

T = TypeVar("T")


class Source:
    """Answers each question when a test opens its gate; the answers are numbered."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gates: list[trio.Event] = []
        self.kept: list[tuple[str, str]] = []
        self.failure: Exception | None = None
        self.asked_now = 0

    async def until_asked(self, times: int) -> None:
        with trio.fail_after(10):
            while len(self.asked) < times:
                await trio.testing.wait_all_tasks_blocked(0.001)

    async def ask(self, name: str) -> str:
        number = len(self.asked)
        self.asked.append(name)
        self.gates.append(trio.Event())
        self.asked_now += 1
        try:
            await self.gates[number].wait()
        finally:
            self.asked_now -= 1
        if self.failure is not None:
            raise self.failure
        return f"{name} {number}"

    def keep(self, name: str, answer: str) -> None:
        self.kept.append((name, answer))


class Askers(Generic[T]):
    """Tasks that ask, each with its own cancel scope; all are ended after ten seconds."""

    def __init__(self, nursery: trio.Nursery, ask: Callable[[str], Awaitable[T]]) -> None:
        nursery.cancel_scope.deadline = trio.current_time() + 10
        self._nursery = nursery
        self._ask = ask
        self.outcomes: list[T | Exception | None] = []
        self.scopes: list[trio.CancelScope] = []

    async def more(self, *names: str) -> None:
        """Start a task for each name, and return when all of them wait."""
        for name in names:
            self._nursery.start_soon(self._answer, name, len(self.scopes))
            self.scopes.append(trio.CancelScope())
            self.outcomes.append(None)
            await trio.testing.wait_all_tasks_blocked()

    async def cancel(self, *numbers: int) -> None:
        for number in numbers:
            self.scopes[number].cancel()
        await trio.testing.wait_all_tasks_blocked()

    async def _answer(self, name: str, number: int) -> None:
        with self.scopes[number]:
            try:
                self.outcomes[number] = await self._ask(name)
            except OSError as error:
                self.outcomes[number] = error


@asynccontextmanager
async def asking(ask: Callable[[str], Awaitable[T]]) -> AsyncIterator[Askers[T]]:
    """Askers of `ask`; all of them have ended when the block has."""
    async with trio.open_nursery() as nursery:
        yield Askers(nursery, ask)
