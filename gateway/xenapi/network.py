"""The class network: the one that this gateway is reached over. It tells clients whether NBD is served there.

In XenServer the purpose opens a port. Here the gateway's configuration does, and says whether there is TLS,
so the purpose follows from that: removing it switches NBD off for all, and adding it switches it on again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gateway.core.errors import XenAPIError
from gateway.core.nbd_service import INSECURE, SECURE
from gateway.core.roles import Role
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, computed, fixed, message, stored
from gateway.xenapi.types import BOOL, INT, STRING, STRING_MAP, STRINGS, Choice, MapOf, Reference, SetOf

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.nbd_service import Named, NbdDoor
    from gateway.xenapi.estate import Estate

PURPOSE: Final = Choice("network_purpose", (SECURE, INSECURE))
_OPERATIONS: Final = Choice("network_operations", ("attaching",))
_LOCKING_MODE: Final = Choice("network_default_locking_mode", ("unlocked", "disabled"))

NAME: Final = "VDI Gateway"


@dataclass(frozen=True, slots=True)
class OnlyOne:
    """The objects of a class that has one object."""

    class_name: str
    name_label: str
    named: Named

    def __len__(self) -> int:
        return 1

    def all(self) -> list[Any]:
        return [self.named]

    def get(self, ref: str) -> Any:
        if ref != self.named.ref:
            raise XenAPIError("HANDLE_INVALID", self.class_name, ref)
        return self.named

    def by_uuid(self, uuid: str) -> Any:
        if uuid.lower() != self.named.uuid:
            raise XenAPIError("UUID_INVALID", self.class_name, uuid)
        return self.named

    def by_name_label(self, label: str) -> list[Any]:
        return [self.named] if label == self.name_label else []


def only(class_name: str, find: Callable[[NbdDoor], Named], name: str = "") -> Callable[[Estate], OnlyOne]:
    """Where the one object of a class lives."""
    return lambda estate: OnlyOne(class_name, name, find(estate.nbd))


FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    fixed("name_label", STRING, NAME, "a human-readable name"),
    fixed("name_description", STRING, "what this gateway is reached over", "a human-readable description"),
    fixed("allowed_operations", SetOf(_OPERATIONS), (), "always empty"),
    fixed("current_operations", MapOf(STRING, _OPERATIONS), {}, "always empty"),
    fixed("VIFs", SetOf(Reference("VIF")), (), "always empty"),
    computed(
        "PIFs",
        SetOf(Reference("PIF")),
        "this gateway's connection to it",
        lambda _network, estate: (estate.nbd.interface.ref,),
    ),
    fixed("MTU", INT, 1500, "always 1500"),
    fixed("other_config", STRING_MAP, {}, "always empty"),
    fixed("bridge", STRING, "", "always empty"),
    fixed("managed", BOOL, True, "always true"),
    fixed("blobs", MapOf(Reference("blob"), STRING), {}, "always empty"),
    fixed("tags", STRINGS, (), "always empty"),
    fixed("default_locking_mode", _LOCKING_MODE, "unlocked", "always unlocked"),
    fixed("assigned_ips", MapOf(STRING, Reference("VIF")), {}, "always empty"),
    computed(
        "purpose",
        SetOf(PURPOSE),
        "how NBD is served: `nbd` with TLS, `insecure_nbd` without; empty if it isn't, or is switched off",
        lambda _network, estate: estate.nbd.purposes,
    ),
)

_SELF: Final = Parameter("self", Reference("network"), "the network")
_VALUE: Final = Parameter("value", PURPOSE, "the purpose")


@message(
    "add_purpose",
    "Switch NBD on again. The gateway's configuration says whether it has TLS, so only that purpose will do.",
    _SELF,
    _VALUE,
    role=Role.POOL_ADMIN,
    errors=("NETWORK_INCOMPATIBLE_PURPOSES", "OPERATION_NOT_ALLOWED"),
)
async def add_purpose(call: Call, ref: str, value: str) -> None:
    _OBJECTS(call.estate).get(ref)
    await call.estate.nbd.add_purpose(value)


@message(
    "remove_purpose",
    "Switch NBD off, also over restarts: no address is told and no disk opened with a session. What is open "
    "stays open.",
    _SELF,
    _VALUE,
    role=Role.POOL_ADMIN,
)
async def remove_purpose(call: Call, ref: str, value: str) -> None:
    _OBJECTS(call.estate).get(ref)
    await call.estate.nbd.remove_purpose(value)


_OBJECTS: Final = only("network", lambda nbd: nbd.network, NAME)

NETWORK = ApiClass(
    name="network",
    doc="What this gateway is reached over. There is one.",
    fields=FIELDS,
    messages=(add_purpose, remove_purpose),
    objects=_OBJECTS,
)
