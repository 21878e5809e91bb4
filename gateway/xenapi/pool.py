"""The class pool. There is one; clients read master and default_SR from it, and wait for their own changes by
writing to its other_config and watching the event come back.
"""

from __future__ import annotations

from typing import Final

from gateway.core.refs import NULL_REF
from gateway.core.roles import Role
from gateway.xenapi.datamodel import ApiClass, Field, fixed, stored
from gateway.xenapi.types import BOOL, INT, STRING, STRING_MAP, STRINGS, Choice, MapOf, Reference, SetOf

_OPERATIONS: Final = Choice("pool_allowed_operations", ("ha_enable", "ha_disable"))
_CUSTOM_FIELDS: Final = (("folder", Role.VM_OPERATOR), ("XenCenter.CustomFields.*", Role.VM_OPERATOR))


def _sr(name: str, doc: str) -> Field:
    return stored(
        name, Reference("SR"), doc, writer=Role.POOL_OPERATOR, target=lambda estate: estate.records.srs
    )


FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    stored("name_label", STRING, "a human-readable name", writer=Role.POOL_OPERATOR),
    stored("name_description", STRING, "a human-readable description", writer=Role.POOL_OPERATOR),
    stored("master", Reference("host"), "the host that answers calls"),
    _sr("default_SR", "where new VDIs go"),
    _sr("suspend_image_SR", "where suspended machines go"),
    _sr("crash_dump_SR", "where crash dumps go"),
    stored(
        "other_config",
        STRING_MAP,
        "additional configuration",
        writer=Role.POOL_OPERATOR,
        key_writers=_CUSTOM_FIELDS,
    ),
    fixed("ha_enabled", BOOL, False, "always false"),
    fixed("ha_configuration", STRING_MAP, {}, "always empty"),
    fixed("ha_statefiles", STRINGS, (), "always empty"),
    fixed("ha_host_failures_to_tolerate", INT, 0, "always 0"),
    fixed("ha_plan_exists_for", INT, 0, "always 0"),
    fixed("ha_allow_overcommit", BOOL, False, "always false"),
    fixed("ha_overcommitted", BOOL, False, "always false"),
    fixed("blobs", MapOf(Reference("blob"), STRING), {}, "always empty"),
    stored("tags", STRINGS, "words for sorting", writer=Role.VM_OPERATOR),
    stored("gui_config", STRING_MAP, "what user interfaces keep here", writer=Role.VM_OPERATOR),
    fixed("health_check_config", STRING_MAP, {}, "always empty"),
    fixed("wlb_url", STRING, "", "always empty"),
    fixed("wlb_username", STRING, "", "always empty"),
    fixed("wlb_enabled", BOOL, False, "always false"),
    fixed("wlb_verify_cert", BOOL, False, "always false"),
    fixed("redo_log_enabled", BOOL, False, "always false"),
    fixed("redo_log_vdi", Reference("VDI"), NULL_REF, "always null"),
    fixed("vswitch_controller", STRING, "", "always empty"),
    fixed("restrictions", STRING_MAP, {}, "always empty: nothing is licensed"),
    fixed("metadata_VDIs", SetOf(Reference("VDI")), (), "always empty"),
    fixed("ha_cluster_stack", STRING, "", "always empty"),
    fixed("allowed_operations", SetOf(_OPERATIONS), (), "always empty"),
    fixed("current_operations", MapOf(STRING, STRING), {}, "always empty"),
    fixed("guest_agent_config", STRING_MAP, {}, "always empty"),
    fixed("cpu_info", STRING_MAP, {}, "always empty"),
    fixed("policy_no_vendor_device", BOOL, False, "always false"),
    fixed("live_patching_disabled", BOOL, False, "always false"),
    fixed("igmp_snooping_enabled", BOOL, False, "always false"),
    fixed("uefi_certificates", STRING, "", "always empty"),
    fixed("is_psr_pending", BOOL, False, "always false"),
    fixed("tls_verification_enabled", BOOL, False, "whether hosts verify each other's certificates"),
    fixed("repositories", SetOf(Reference("Repository")), (), "always empty"),
    fixed("client_certificate_auth_enabled", BOOL, False, "always false"),
    fixed("client_certificate_auth_name", STRING, "", "always empty"),
    fixed("migration_compression", BOOL, False, "always false"),
    fixed("coordinator_bias", BOOL, False, "always false"),
)

POOL = ApiClass(
    name="pool",
    doc="The hosts that share storage and users.",
    fields=FIELDS,
    objects=lambda estate: estate.records.pools,
)
