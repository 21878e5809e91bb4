"""XenServer's roles and the permission that each method asks for.

The roles form a ladder: each may do all that those below it may (ocaml/idl/datamodel_roles.ml). A permission
is data: the method's name and the lowest role that has it.
"""

from dataclasses import dataclass
from enum import IntEnum

from gateway.core.errors import XenAPIError


class Role(IntEnum):
    """A rung of the ladder; `wire_name` is how XenAPI and the command line call it."""

    READ_ONLY = 1
    VM_OPERATOR = 2
    VM_ADMIN = 3
    VM_POWER_ADMIN = 4
    POOL_OPERATOR = 5
    POOL_ADMIN = 6

    @property
    def wire_name(self) -> str:
        return self.name.lower().replace("_", "-")

    @classmethod
    def from_wire(cls, name: str) -> "Role":
        """The role called `name`. Raises VALUE_NOT_SUPPORTED."""
        for role in cls:
            if role.wire_name == name:
                return role
        known = ", ".join(role.wire_name for role in cls)
        raise XenAPIError("VALUE_NOT_SUPPORTED", "role", name, f"the roles are {known}")


@dataclass(frozen=True, slots=True)
class Permission:
    """The right to call `name` ("VDI.create", "http/put_import_raw_vdi"), held from `role` upwards."""

    name: str
    role: Role

    def check(self, role: Role) -> None:
        """Raise RBAC_PERMISSION_DENIED unless `role` is high enough."""
        if role < self.role:
            raise XenAPIError(
                "RBAC_PERMISSION_DENIED",
                self.name,
                f"it takes the role {self.role.wire_name}, yours is {role.wire_name}",
            )
