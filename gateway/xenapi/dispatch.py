"""From a method name and its parameters to a result: looks up, authorises, checks types, calls.

Knows the table of classes and nothing of any class. A method is found under `class.method` and
`class_method`, its class in any case, and behind `Async.`, where it runs under a task whose reference is the
answer. The order is fixed: the number of parameters, then the session and its permission, then the types, so
that nobody without a session learns more than the documentation tells. The first parameter is the session
reference, a secret: it is never logged.
"""

from __future__ import annotations

import itertools
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.roles import Permission
from gateway.core.sessions import Credentials
from gateway.xenapi.datamodel import ApiClass, Call, Message, message
from gateway.xenapi.types import STRINGS, VOID
from gateway.xenapi.xmlrpc import dump_value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from gateway.core.sessions import Identity
    from gateway.core.task import Task
    from gateway.xenapi.estate import Estate
    from gateway.xenapi.types import WireValue

log = structlog.get_logger(__name__)

LOCAL: Final = "unix"
"""The transport of calls through the Unix socket, and the address of those who call."""

_ASYNC: Final = "Async."
_LONGEST_NAME: Final = 100
"""Characters of an unknown method's name that are sent back."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Where a call comes from: the peer's address, and the transport ("http", "https" or LOCAL).

    `ending` returns when there is no use in waiting for something to tell: the client has gone, or the
    gateway stops.
    """

    address: str
    transport: str
    ending: Callable[[], Awaitable[None]] | None = None

    @property
    def is_local(self) -> bool:
        """Whether the caller came through the Unix socket, whose file permissions have let it in."""
        return self.transport == LOCAL


@dataclass(frozen=True, slots=True)
class Method:
    """One message of one class, ready to be called."""

    model: ApiClass
    message: Message

    @property
    def name(self) -> str:
        """The name as XenAPI documents it: VDI.create."""
        return f"{self.model.name}.{self.message.name}"

    def permission(self, params: list[Any]) -> Permission:
        """What the caller must hold for these parameters (without the session)."""
        called = self.message
        if len(params) > 1 and isinstance(params[1], str):
            for pattern, role in called.key_roles:
                if params[1] == pattern or (pattern.endswith("*") and params[1].startswith(pattern[:-1])):
                    return Permission(f"{self.name}/key:{pattern}", role)
        return self.model.permission(called)


class Api:
    """All methods of the API over one estate. `nursery` runs what was called with `Async.`."""

    def __init__(self, estate: Estate, nursery: trio.Nursery, classes: Iterable[ApiClass]) -> None:
        self._estate = estate
        self._nursery = nursery
        self._methods: dict[str, Method] = {}
        for model in (*classes, _system(self)):
            for called in model.all_messages.values():
                method = Method(model, called)
                for separator in "._":
                    key = f"{model.name.lower()}{separator}{called.name}"
                    if key in self._methods:
                        raise ValueError(f"two methods are called {key}")
                    self._methods[key] = method

    @property
    def methods(self) -> tuple[Method, ...]:
        """Every method once."""
        return tuple({method.name: method for method in self._methods.values()}.values())

    def find(self, name: str) -> tuple[Method, bool]:
        """The method called `name`, and whether it is asked to run asynchronously; MESSAGE_METHOD_UNKNOWN."""
        wanted = name.removeprefix(_ASYNC)
        asynchronous = name.startswith(_ASYNC)
        method = self._methods.get(wanted) or self._methods.get(_folded(wanted, "."))
        if method is None:
            # The class ends at one of the first underscores; which one, only the table knows.
            ends = (place for place, letter in enumerate(wanted[:40]) if letter == "_")
            keys = (wanted[:end].lower() + wanted[end:] for end in itertools.islice(ends, 4))
            method = next((self._methods[key] for key in keys if key in self._methods), None)
        if method is None or (asynchronous and not method.message.asynchronous):
            raise XenAPIError("MESSAGE_METHOD_UNKNOWN", name[:_LONGEST_NAME])
        return method, asynchronous

    async def call(self, name: str, params: list[Any], caller: Caller) -> WireValue:
        """Call a method with all its parameters, the session's reference among them. Raises nothing but
        XenAPIError."""
        method, asynchronous = self.find(name)
        try:
            return await self._call(method, asynchronous, params, caller)
        except XenAPIError:
            raise
        except Exception as error:
            told = as_xenapi_error(error)
            # Never the parameters: one of them is the session's reference.
            if told.code == "INTERNAL_ERROR":
                log.exception("method failed", method=method.name)
            else:
                log.warning("method failed", method=method.name, why=str(told))
            raise told from error

    async def _call(self, method: Method, asynchronous: bool, params: list[Any], caller: Caller) -> WireValue:
        called = method.message
        session_ref, given = "", params
        if called.session:
            # No session at all and a session that is none get the same answer, so that clients log in.
            session_ref = params[0] if params and isinstance(params[0], str) else ""
            given = params[1:]
        if not called.required <= len(given) <= len(called.parameters):
            raise XenAPIError(
                "MESSAGE_PARAMETER_COUNT_MISMATCH", method.name, str(called.required), str(len(given))
            )
        identity = await self._authorize(method, session_ref, given, caller)
        arguments = [
            parameter.type.accept(value, parameter.name)
            for parameter, value in zip(called.parameters, given, strict=False)
        ]
        arguments += [copy(parameter.default) for parameter in called.parameters[len(given) :]]
        call = Call(self._estate, caller, method.name, session_ref, identity)
        if asynchronous or called.tasked:
            task = await self._new_task(f"{_ASYNC if asynchronous else ''}{method.name}", call)
            if not asynchronous:
                return await self._work(task, method, call, arguments)
            # It goes on when the session ends.
            self._nursery.start_soon(self._run, task, method, call, arguments)
            return task.ref
        result: WireValue = await called.run(call, *arguments)
        return result

    async def _authorize(
        self, method: Method, session_ref: str, given: list[Any], caller: Caller
    ) -> Identity | None:
        if not method.message.session:
            return None
        credentials = Credentials(address=caller.address, session_ref=session_ref, user=None, password=None)
        return await self._estate.sessions.authorize(credentials, method.permission(given))

    async def _new_task(self, label: str, call: Call) -> Task:
        identity = call.identity
        return await self._estate.tasks.create(
            label,
            "",
            user=identity.user,
            session_uuid=identity.session.uuid if identity.session is not None else "",
            client_made=False,
        )

    async def _run(self, task: Task, method: Method, call: Call, arguments: list[Any]) -> None:
        try:
            await self._work(task, method, call, arguments)
        except XenAPIError:
            pass  # The task tells it to whoever asks.
        except Exception as error:  # noqa: BLE001  the task has told it, and logged what nobody expected
            log.warning("asynchronous method failed", method=method.name, why=str(as_xenapi_error(error)))

    async def _work(self, task: Task, method: Method, call: Call, arguments: list[Any]) -> WireValue:
        """Run the method as the work of the task; raises what it raises, or TASK_CANCELLED."""
        called = method.message
        with trio.CancelScope() as scope:
            async with self._estate.tasks.operation(task, scope.cancel) as operation:
                call.operation = operation
                value: WireValue = await called.run(call, *arguments)
                operation.result = "" if called.result is VOID else dump_value(value)
            return value
        raise XenAPIError("TASK_CANCELLED", task.ref)


def _folded(name: str, separator: str) -> str:
    """`name` with its class, the part before the first separator, in lower case."""
    head, found, tail = name.partition(separator)
    return f"{head.lower()}{found}{tail}"


def _system(api: Api) -> ApiClass:
    """The introspection that XML-RPC servers offer, without a session."""

    @message(
        "listMethods",
        "List the names of all methods.",
        result=STRINGS,
        session=False,
        asynchronous=False,
    )
    async def list_methods(_call: Call) -> list[str]:
        return [method.name for method in api.methods if method.message.listed]

    return ApiClass(name="system", doc="Introspection.", messages=(list_methods,), enumerable=False)
