"""Fields of classes, as data, and where the objects that have them live."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

from gateway.xenapi.types import Item, Record, WireType, WireValue

if TYPE_CHECKING:
    from gateway.core.roles import Role
    from gateway.xenapi.estate import Estate


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

    def __len__(self) -> int: ...


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
