"""What the API is made of, as data: classes, their typed fields, their messages, and who may call what.

From one ApiClass come all methods of that class: a getter for each field, setters, add_to_ and remove_from_
for those that may be changed, get_record, get_all_records, get_by_uuid, get_by_name_label, and the messages
written by hand. Each is a Message: a name, typed parameters, a result, the lowest role that may call it, and
a function. The dispatcher knows Messages alone, and so do the method list and the reference documentation.
The trap: an error in a table would only show when a client calls it, so `ApiClass` checks itself when it is
made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gateway.core.roles import Permission, Role
from gateway.xenapi.fields import (
    Field,
    ListedObjects,
    Objects,
    Read,
    StoredObjects,
    computed,
    fixed,
    given,
    stored,
)
from gateway.xenapi.implicit import implicit_messages
from gateway.xenapi.messages import REQUIRED, Call, Message, Parameter, Run, message

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.xenapi.estate import Estate
    from gateway.xenapi.types import WireValue

__all__ = [
    "REQUIRED",
    "ApiClass",
    "Call",
    "Field",
    "ListedObjects",
    "Message",
    "Objects",
    "Parameter",
    "Read",
    "Run",
    "StoredObjects",
    "computed",
    "fixed",
    "given",
    "message",
    "stored",
]


@dataclass(frozen=True, kw_only=True)
class ApiClass:
    """One class of the API. `objects` finds where its objects live (None: it has no objects, only messages).

    An `enumerable` class has get_all, get_all_records and get_by_uuid, and events; a `named` one has
    get_by_name_label. The objects of an `owned` class belong to users: their `edit` is told who changes them.
    It takes the role `reader` to look at objects.
    """

    name: str
    doc: str
    fields: tuple[Field, ...] = ()
    messages: tuple[Message, ...] = ()
    objects: Callable[[Estate], Objects] | None = None
    enumerable: bool = True
    named: bool = True
    owned: bool = False
    reader: Role = Role.READ_ONLY
    all_messages: Mapping[str, Message] = field(init=False)
    _readers: tuple[tuple[str, Read], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_readers", tuple((each.name, each.read) for each in self.fields))
        by_name: dict[str, Message] = {}
        # What is written by hand comes last: it stands in for what would have come from the table.
        for each in implicit_messages(self) if self.objects is not None else ():
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
    def has_events(self) -> bool:
        """Whether event.from tells of its objects."""
        return self.objects is not None and self.enumerable
