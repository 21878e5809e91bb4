import pytest

from gateway.core.errors import XenAPIError
from gateway.core.refs import is_uuid, new_ref, new_session_ref, new_uuid
from gateway.core.roles import Permission, Role


@pytest.mark.parametrize("role", Role)
def test_a_role_is_found_by_its_wire_name(role: Role) -> None:
    assert Role.from_wire(role.wire_name) is role


def test_the_ladder_has_xenservers_names_in_order() -> None:
    names = [role.wire_name for role in sorted(Role)]
    assert names == ["read-only", "vm-operator", "vm-admin", "vm-power-admin", "pool-operator", "pool-admin"]


def test_an_unknown_role_is_refused_with_the_known_ones() -> None:
    with pytest.raises(XenAPIError, match=r"emperor.*read-only"):
        Role.from_wire("emperor")


def test_a_permission_is_held_from_its_role_upwards() -> None:
    permission = Permission("VDI.create", Role.VM_ADMIN)
    permission.check(Role.VM_ADMIN)
    permission.check(Role.POOL_ADMIN)
    with pytest.raises(XenAPIError) as refusal:
        permission.check(Role.VM_OPERATOR)
    assert refusal.value.error_info[:2] == ["RBAC_PERMISSION_DENIED", "VDI.create"]


def test_references_have_the_form_that_clients_expect() -> None:
    for ref in (new_ref(), new_session_ref()):
        prefix, _, uuid = ref.partition(":")
        assert prefix == "OpaqueRef"
        assert is_uuid(uuid)
    assert is_uuid(new_uuid().upper())
    assert not is_uuid(new_uuid() + "\n")
    assert not is_uuid("OpaqueRef:NULL")
