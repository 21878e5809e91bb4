"""The messages that every class has, made from its fields: getters, setters, records and queries."""

from __future__ import annotations

from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF
from gateway.xenapi.messages import Call, Message, Parameter, Run
from gateway.xenapi.query import database_text, parse_query
from gateway.xenapi.types import STRING, MapOf, Record, Records, Reference, SetOf, WireValue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gateway.xenapi.datamodel import ApiClass
    from gateway.xenapi.estate import Estate
    from gateway.xenapi.fields import Field, StoredObjects

_TURN_SECONDS: Final = 0.005


class Turn:
    """A turn on the trio loop. Goes by time, since objects have maps as large as users make them."""

    def __init__(self) -> None:
        self._began = monotonic()

    async def end_in_time(self) -> None:
        """Asked after each object: let the others have their turn if this one has been long enough."""
        if monotonic() - self._began >= _TURN_SECONDS:
            await trio.lowlevel.checkpoint()
            self._began = monotonic()


def implicit_messages(model: ApiClass) -> Iterator[Message]:
    """All messages that follow from the fields of `model`."""
    for each in model.fields:
        yield _getter(model, each)
        if each.writer is not None:
            yield from _setters(model, each)
    yield _get_record(model)
    if model.enumerable:
        yield from _queries(model)


def _find(model: ApiClass, call: Call, ref: str) -> Any:
    """The object of `model` that `ref` names."""
    if model.objects is None:
        raise AssertionError(f"{model.name} has no objects")
    return model.objects(call.estate).get(ref)


def _own(model: ApiClass) -> Parameter:
    return Parameter("self", Reference(model.name), "reference to the object")


def _getter(model: ApiClass, each: Field) -> Message:
    async def run(call: Call, ref: str) -> WireValue:
        return each.read(_find(model, call, ref), call.estate)

    return Message(
        name=f"get_{each.name}",
        doc=f"Get the {each.name} field of the given {model.name}: {each.doc}.",
        run=run,
        parameters=(_own(model),),
        result=each.type,
        role=model.reader,
        asynchronous=False,
    )


def _get_record(model: ApiClass) -> Message:
    async def run(call: Call, ref: str) -> WireValue:
        return model.record(_find(model, call, ref), call.estate)

    return Message(
        name="get_record",
        doc=f"Get all fields of the given {model.name}.",
        run=run,
        parameters=(_own(model),),
        result=Record(model.name, {}),
        role=model.reader,
        asynchronous=False,
    )


def _queries(model: ApiClass) -> Iterator[Message]:
    objects = cast("Callable[[Estate], StoredObjects]", model.objects)

    async def get_all(call: Call) -> WireValue:
        return [item.ref for item in objects(call.estate).all()]

    async def get_all_records(call: Call) -> WireValue:
        estate, turn = call.estate, Turn()
        records: dict[str, WireValue] = {}
        for item in objects(estate).all():
            records[item.ref] = model.record(item, estate)
            await turn.end_in_time()
        return records

    readers = {each.name: each.read for each in model.fields}

    async def get_all_records_where(call: Call, expr: str) -> WireValue:
        estate, turn = call.estate, Turn()
        matches = parse_query(expr, readers)
        records: dict[str, WireValue] = {}

        def text_of(item: Any) -> Callable[[str], str]:
            # A query may name a field hundreds of times, and a map may be large.
            return cache(lambda name: database_text(readers[name](item, estate)))

        for item in objects(estate).all():
            if matches(text_of(item)):
                records[item.ref] = model.record(item, estate)
            await turn.end_in_time()
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
        role=model.reader,
        asynchronous=False,
    )
    yield Message(
        name="get_all_records",
        doc=f"Get all objects of the class {model.name} with all their fields, by reference.",
        run=get_all_records,
        result=Records(model.name),
        role=model.reader,
        asynchronous=False,
    )
    yield Message(
        name="get_all_records_where",
        doc=f"Get the objects of the class {model.name} that a query in XenAPI's language asks for, with all "
        "their fields, by reference.",
        run=get_all_records_where,
        parameters=(Parameter("expr", STRING, 'the query, as in: field "name__label" = "a"'),),
        result=Records(model.name),
        role=model.reader,
        asynchronous=False,
        errors=("VALUE_NOT_SUPPORTED",),
    )
    yield Message(
        name="get_by_uuid",
        doc=f"Get the reference of the {model.name} with the given uuid.",
        run=get_by_uuid,
        parameters=(Parameter("uuid", STRING, "uuid of the object"),),
        result=Reference(model.name),
        role=model.reader,
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
            role=model.reader,
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
