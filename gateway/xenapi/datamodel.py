"""What the API is made of, as data: classes, their typed fields, their messages, and who may call what.

From one ApiClass come all methods of that class: a getter for each field, setters, add_to_ and remove_from_
for those that may be changed, get_record, get_all_records, get_by_uuid, get_by_name_label, and the messages
written by hand. Each is a Message: a name, typed parameters, a result, the lowest role that may call it, and
a function. The dispatcher knows Messages alone, and so do the method list and the reference documentation.
The trap: an error in a table would only show when a client calls it, so `ApiClass` checks itself when it is
made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import trio

from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF
from gateway.core.roles import Permission, Role
from gateway.xenapi.types import (
    STRING,
    VOID,
    Item,
    MapOf,
    Record,
    Records,
    Reference,
    SetOf,
    WireType,
    WireValue,
)

if TYPE_CHECKING:
    from gateway.core.sessions import Identity
    from gateway.xenapi.dispatch import Caller
    from gateway.xenapi.estate import Estate

_RECORDS_PER_TURN = 500
"""So many records are built before other tasks of the trio loop get their turn: some two milliseconds'
work."""


class Objects(Protocol):
    """Where the objects of one class live: a table of the core, or something of the same shape.

    Each object has the attributes `ref` and `uuid`.
    """

    def get(self, ref: str) -> Any:
        """The object; HANDLE_INVALID where there is none."""
        ...


class ListedObjects(Objects, Protocol):
    """Those of an enumerable class."""

    def by_uuid(self, uuid: str) -> Any:
        """The object; UUID_INVALID where there is none."""
        ...

    def all(self) -> list[Any]: ...


class StoredObjects(ListedObjects, Protocol):
    """Those of a class that is named, or whose fields can be changed: a Table."""

    def by_name_label(self, label: str) -> list[Any]: ...

    async def edit(self, ref: str, compute: Callable[[Any], Mapping[str, Any]], *actor: Any) -> Any:
        """Change the attributes that `compute` makes of the object as it is then, durably, and publish an
        event.

        Nobody writes in between. What `compute` raises goes to the caller, and nothing is changed.
        """
        ...


Read = Callable[[Any, "Estate"], WireValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a class.

    `read` gets the object and the estate. A field with a `writer` may be changed by that role and higher
    ones: its `attribute` of the object is changed. `key_writers` names keys of a map that a lower role may
    add and remove. A field with `given` may be given when an object is created, and has the value `default`
    if it is left out (None: it may not be). A reference with a `target` is set only to an object that is
    there.
    """

    name: str
    type: WireType
    doc: str
    read: Read
    attribute: str | None = None
    writer: Role | None = None
    key_writers: tuple[tuple[str, Role], ...] = ()
    given: bool = False
    default: Any = None
    target: Callable[[Estate], Objects] | None = None


def stored(
    name: str,
    type: WireType,  # noqa: A002 - the word XenAPI's documentation has for it
    doc: str,
    *,
    attribute: str | None = None,
    writer: Role | None = None,
    key_writers: tuple[tuple[str, Role], ...] = (),
    given: bool = False,
    default: Any = None,
    target: Callable[[Estate], Objects] | None = None,
) -> Field:
    """A field that is an attribute of the object: by default the one with the field's name in lower case."""
    attribute = attribute or name.lower()
    get = attrgetter(attribute)
    return Field(
        name=name,
        type=type,
        doc=doc,
        read=lambda item, _estate: get(item),
        attribute=attribute,
        writer=writer,
        key_writers=key_writers,
        given=given,
        default=default,
        target=target,
    )


def computed(name: str, type: WireType, doc: str, read: Read) -> Field:  # noqa: A002 - as above
    """A read-only field that follows from other things."""
    return Field(name=name, type=type, doc=doc, read=read)


def fixed(name: str, type: WireType, value: WireValue, doc: str) -> Field:  # noqa: A002 - as above
    """A read-only field that has one value here: clients expect it, and there is nothing behind it."""
    return Field(name=name, type=type, doc=doc, read=lambda _item, _estate: value)


def given(class_name: str, fields: Iterable[Field]) -> Record:
    """The type of a record that creates an object: only the members that a caller may choose are looked
    at."""
    return Record(class_name, {each.name: Item(each.type, each.default) for each in fields if each.given})


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

    The session reference is a secret. `task` is the task under which an asynchronous call runs.
    """

    estate: Estate
    caller: Caller
    method: str
    session_ref: str
    authorized: Identity | None
    task: str | None = None

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


Run = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One method of a class. `run` gets the Call and the checked parameters, and returns the result.

    Without `session` the method takes no session reference and asks for no permission. `asynchronous` methods
    exist as `Async.` too.
    """

    name: str
    doc: str
    run: Run
    role: Role = Role.READ_ONLY
    parameters: tuple[Parameter, ...] = ()
    result: WireType = VOID
    session: bool = True
    asynchronous: bool = True
    errors: tuple[str, ...] = ()
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
    errors: tuple[str, ...] = (),
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
            errors=errors,
        )

    return decorate


@dataclass(frozen=True, kw_only=True)
class ApiClass:
    """One class of the API. `objects` finds where its objects live (None: it has no objects, only messages).

    An `enumerable` class has get_all, get_all_records and get_by_uuid; a `named` one has get_by_name_label.
    The objects of an `owned` class belong to users: their `edit` is told who changes them.
    """

    name: str
    doc: str
    fields: tuple[Field, ...] = ()
    messages: tuple[Message, ...] = ()
    objects: Callable[[Estate], Objects] | None = None
    enumerable: bool = True
    named: bool = True
    owned: bool = False
    all_messages: Mapping[str, Message] = field(init=False)

    def __post_init__(self) -> None:
        by_name: dict[str, Message] = {}
        # What is written by hand comes last: it stands in for what would have come from the table.
        for each in self._implicit_messages():
            if each.name in by_name:
                raise ValueError(f"{self.name}.{each.name} is declared twice")
            by_name[each.name] = each
        names = [each.name for each in self.messages]
        if len(set(names)) != len(names):
            raise ValueError(f"{self.name} declares a message twice")
        by_name.update({each.name: each for each in self.messages})
        for each in by_name.values():
            defaults = [parameter.default is not REQUIRED for parameter in each.parameters]
            if defaults != sorted(defaults):
                raise ValueError(f"{self.name}.{each.name}: only last parameters may have defaults")
        object.__setattr__(self, "all_messages", MappingProxyType(by_name))

    def permission(self, called: Message) -> Permission:
        """What a caller of this message of this class must hold."""
        return Permission(f"{self.name}.{called.name}", called.role)

    def record(self, item: Any, estate: Estate) -> dict[str, WireValue]:
        """All fields of one object."""
        return {name: read(item, estate) for name, read in self._readers}

    @property
    def _readers(self) -> list[tuple[str, Read]]:
        return [(each.name, each.read) for each in self.fields]

    def _implicit_messages(self) -> Iterator[Message]:
        if self.objects is None:
            return
        for each in self.fields:
            yield _getter(self, each)
            if each.writer is not None:
                yield from _setters(self, each)
        yield _get_record(self)
        if self.enumerable:
            yield from _queries(self)


def find(model: ApiClass, call: Call, ref: str) -> Any:
    """The object of `model` that `ref` names."""
    if model.objects is None:
        raise AssertionError(f"{model.name} has no objects")
    return model.objects(call.estate).get(ref)


def _own(model: ApiClass) -> Parameter:
    return Parameter("self", Reference(model.name), "reference to the object")


def _getter(model: ApiClass, each: Field) -> Message:
    async def run(call: Call, ref: str) -> WireValue:
        return each.read(find(model, call, ref), call.estate)

    return Message(
        name=f"get_{each.name}",
        doc=f"Get the {each.name} field of the given {model.name}: {each.doc}.",
        run=run,
        parameters=(_own(model),),
        result=each.type,
        asynchronous=False,
    )


def _get_record(model: ApiClass) -> Message:
    async def run(call: Call, ref: str) -> WireValue:
        return model.record(find(model, call, ref), call.estate)

    return Message(
        name="get_record",
        doc=f"Get all fields of the given {model.name}.",
        run=run,
        parameters=(_own(model),),
        result=Record(model.name, {}),
        asynchronous=False,
    )


def _queries(model: ApiClass) -> Iterator[Message]:
    objects = cast("Callable[[Estate], StoredObjects]", model.objects)

    async def get_all(call: Call) -> WireValue:
        return [item.ref for item in objects(call.estate).all()]

    async def get_all_records(call: Call) -> WireValue:
        readers, estate = model._readers, call.estate
        records: dict[str, WireValue] = {}
        for number, item in enumerate(objects(estate).all(), start=1):
            records[item.ref] = {name: read(item, estate) for name, read in readers}
            if number % _RECORDS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
        return records

    async def get_by_uuid(call: Call, uuid: str) -> WireValue:
        ref: str = objects(call.estate).by_uuid(uuid).ref
        return ref

    async def get_by_name_label(call: Call, label: str) -> WireValue:
        return [item.ref for item in objects(call.estate).by_name_label(label)]

    yield Message(
        name="get_all",
        doc=f"List the references of all objects of the class {model.name}.",
        run=get_all,
        result=SetOf(Reference(model.name)),
        asynchronous=False,
    )
    yield Message(
        name="get_all_records",
        doc=f"Get all objects of the class {model.name} with all their fields, by reference.",
        run=get_all_records,
        result=Records(model.name),
        asynchronous=False,
    )
    yield Message(
        name="get_by_uuid",
        doc=f"Get the reference of the {model.name} with the given uuid.",
        run=get_by_uuid,
        parameters=(Parameter("uuid", STRING, "uuid of the object"),),
        result=Reference(model.name),
        asynchronous=False,
        errors=("UUID_INVALID",),
    )
    if model.named:
        yield Message(
            name="get_by_name_label",
            doc=f"List the references of each {model.name} with the given name_label.",
            run=get_by_name_label,
            parameters=(Parameter("label", STRING, "name to look for"),),
            result=SetOf(Reference(model.name)),
            asynchronous=False,
        )


def _setters(model: ApiClass, each: Field) -> Iterator[Message]:
    """Everything that changes one field. A change is computed from the object as it is when it is written, so
    two clients that add a key at once both have theirs afterwards."""
    assert each.attribute is not None and each.writer is not None
    attribute, writer = each.attribute, each.writer
    objects = cast("Callable[[Estate], StoredObjects]", model.objects)

    async def change(call: Call, ref: str, new: Callable[[Any], Any]) -> None:
        def compute(item: Any) -> dict[str, Any]:
            value = new(getattr(item, attribute))
            return {} if value is None else {attribute: value}

        actor = (call.identity,) if model.owned else ()
        await objects(call.estate).edit(ref, compute, *actor)

    async def set_(call: Call, ref: str, value: Any) -> None:
        if each.target is not None and value != NULL_REF:
            each.target(call.estate).get(value)
        await change(call, ref, lambda _: value)

    def setter(name: str, doc: str, run: Run, *parameters: Parameter, **more: Any) -> Message:
        return Message(
            name=name, doc=doc, run=run, role=writer, parameters=(_own(model), *parameters), **more
        )

    named = f"the {each.name} field of the given {model.name}"
    yield setter(
        f"set_{each.name}", f"Set {named}: {each.doc}.", set_, Parameter("value", each.type, "new value")
    )
    if isinstance(each.type, MapOf):

        async def add_to(call: Call, ref: str, key: Any, value: Any) -> None:
            def added(old: Mapping[Any, Any]) -> dict[Any, Any]:
                if key in old:
                    raise XenAPIError("MAP_DUPLICATE_KEY", model.name, each.name, ref, str(key))
                return {**old, key: value}

            await change(call, ref, added)

        async def remove_from(call: Call, ref: str, key: Any) -> None:
            def removed(old: Mapping[Any, Any]) -> dict[Any, Any] | None:
                return {name: old[name] for name in old if name != key} if key in old else None

            await change(call, ref, removed)

        key_parameter = Parameter("key", each.type.key, "key of the entry")
        yield setter(
            f"add_to_{each.name}",
            f"Add a key and its value to {named}.",
            add_to,
            key_parameter,
            Parameter("value", each.type.value, "value of the entry"),
            errors=("MAP_DUPLICATE_KEY",),
            key_roles=each.key_writers,
        )
        yield setter(
            f"remove_from_{each.name}",
            f"Remove a key and its value from {named}; nothing happens if it is not there.",
            remove_from,
            key_parameter,
            key_roles=each.key_writers,
        )
    if isinstance(each.type, SetOf):

        async def add(call: Call, ref: str, value: Any) -> None:
            await change(call, ref, lambda old: None if value in old else (*old, value))

        async def remove(call: Call, ref: str, value: Any) -> None:
            def removed(old: tuple[Any, ...]) -> tuple[Any, ...] | None:
                return tuple(item for item in old if item != value) if value in old else None

            await change(call, ref, removed)

        element = Parameter("value", each.type.item, "the element")
        yield setter(f"add_{each.name}", f"Add an element to {named}.", add, element)
        yield setter(f"remove_{each.name}", f"Remove an element from {named}.", remove, element)
