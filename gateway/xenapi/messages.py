"""Messages, as data: what can be called, with which parameters, by whom, and the function behind it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gateway.core.roles import Role
from gateway.xenapi.types import VOID, WireType

if TYPE_CHECKING:
    from gateway.core.sessions import Identity
    from gateway.core.task import Operation
    from gateway.xenapi.dispatch import Caller
    from gateway.xenapi.estate import Estate


class _Required:
    """Stands where a parameter has no default value."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a message; those with a default may be left out at the end, as older clients do."""

    name: str
    type: WireType
    doc: str = ""
    default: Any = REQUIRED


@dataclass(slots=True)
class Call:
    """One call on its way: what a message gets beside its parameters.

    The session reference is a secret. `operation` is the work of the task under which an asynchronous call
    runs, or one whose message is always `tasked`.
    """

    estate: Estate
    caller: Caller
    method: str
    session_ref: str
    authorized: Identity | None
    operation: Operation | None = None

    @property
    def task(self) -> str | None:
        """The reference of the task under which the call runs."""
        return None if self.operation is None else self.operation.task

    @property
    def identity(self) -> Identity:
        """Who calls. Only messages without a session have nobody here, and they must not ask."""
        if self.authorized is None:
            raise AssertionError(f"{self.method} has no session")
        return self.authorized

    @property
    def who(self) -> str:
        """Who calls, in words for others: a user and an address."""
        return f"{self.identity.user} at {self.caller.address}"

    def operating(self, sr: str, operation: str) -> AbstractContextManager[None]:
        """For the time of a block, the SR's current_operations tell of `operation`."""
        if sr not in self.estate.records.srs:
            return nullcontext()  # What is called in the block says so.
        return self.estate.operations.running("SR", sr, operation, self.task)


Run = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One method of a class. `run` gets the Call and the checked parameters, and returns the result.

    Without `session` the method takes no session reference and asks for no permission. `asynchronous` methods
    exist as `Async.` too. A `tasked` one takes long: it has a task also when it is called without `Async.`,
    so that it can be followed and cancelled. What is not `listed` is left out of system.listMethods.
    """

    name: str
    doc: str
    run: Run
    role: Role = Role.READ_ONLY
    parameters: tuple[Parameter, ...] = ()
    result: WireType = VOID
    session: bool = True
    asynchronous: bool = True
    tasked: bool = False
    errors: tuple[str, ...] = ()
    listed: bool = True
    key_roles: tuple[tuple[str, Role], ...] = ()
    """For add_to_ and remove_from_: keys that a lower role may use. The key is the second parameter."""

    @property
    def required(self) -> int:
        """How many parameters must be there, the session not counted."""
        return sum(parameter.default is REQUIRED for parameter in self.parameters)


def message(
    name: str,
    doc: str,
    *parameters: Parameter,
    result: WireType = VOID,
    role: Role = Role.READ_ONLY,
    session: bool = True,
    asynchronous: bool = True,
    tasked: bool = False,
    errors: tuple[str, ...] = (),
    listed: bool = True,
) -> Callable[[Run], Message]:
    """Make a Message of the function that it decorates."""

    def decorate(run: Run) -> Message:
        return Message(
            name=name,
            doc=doc,
            run=run,
            role=role,
            parameters=parameters,
            result=result,
            session=session,
            asynchronous=asynchronous,
            tasked=tasked,
            errors=errors,
            listed=listed,
        )

    return decorate
