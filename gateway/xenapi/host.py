"""The class host: this gateway, and other hosts that it knows of.

A VDI that only another host reaches is answered with a redirect to that host's address, and the client
follows it with its credentials. So making and changing hosts takes a pool-admin, more than XenServer asks.
"""

from __future__ import annotations

import platform
import re
import socket
from datetime import UTC, datetime
from typing import Any, Final

from gateway.core.errors import XenAPIError
from gateway.core.records import Host
from gateway.core.refs import NULL_REF, is_uuid, new_ref, new_uuid
from gateway.core.roles import Role
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, computed, fixed, message, stored
from gateway.xenapi.types import (
    BOOL,
    DATETIME,
    INT,
    STRING,
    STRING_MAP,
    STRINGS,
    Choice,
    MapOf,
    Reference,
    SetOf,
    Text,
)

API_VERSION: Final = (2, 21)
"""The version of XenAPI whose calls are offered: that of XenServer 8 and XCP-ng 8.3."""

ADDRESS: Final = Text(
    # It becomes part of a Location header, so nothing but an address may pass.
    pattern=re.compile(
        r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?"
    ),
    form="a host name, an IPv4 address or an IPv6 address in brackets, with a port or without",
)

BRAND: Final = "VDI Gateway"


def software_version(version: str) -> dict[str, str]:
    """host.software_version of a gateway of this version, with the keys that XenAPI's clients look for.

    `product_version` has three numbers there, and `xapi` the version of the API that is offered.
    """
    return {
        "product_brand": BRAND,
        "product_version": version,
        "product_version_text": version,
        "product_version_text_short": ".".join(version.split(".")[:2]),
        "platform_name": BRAND,
        "platform_version": version,
        "build_number": version,
        "hostname": socket.gethostname(),
        "xapi": ".".join(map(str, API_VERSION)),
        "linux": platform.release(),
    }


_OPERATIONS: Final = Choice("host_allowed_operations", ("evacuate", "shutdown", "reboot", "power_on"))

FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    stored("name_label", STRING, "a human-readable name", writer=Role.POOL_OPERATOR),
    stored("name_description", STRING, "a human-readable description", writer=Role.POOL_OPERATOR),
    fixed("memory_overhead", INT, 0, "always 0"),
    fixed("allowed_operations", SetOf(_OPERATIONS), (), "always empty"),
    fixed("current_operations", MapOf(_OPERATIONS, STRING), {}, "always empty"),
    fixed("API_version_major", INT, API_VERSION[0], "major version of the API"),
    fixed("API_version_minor", INT, API_VERSION[1], "minor version of the API"),
    fixed("API_version_vendor", STRING, "XenSource", "vendor of the API"),
    fixed("API_version_vendor_implementation", STRING_MAP, {"name": BRAND}, "what implements the API"),
    stored("enabled", BOOL, "whether it takes work"),
    stored("software_version", STRING_MAP, "versions of what runs on it"),
    stored("other_config", STRING_MAP, "additional configuration", writer=Role.POOL_OPERATOR),
    fixed("capabilities", STRINGS, (), "always empty"),
    fixed("cpu_configuration", STRING_MAP, {}, "always empty"),
    fixed("sched_policy", STRING, "", "always empty"),
    fixed("supported_bootloaders", STRINGS, (), "always empty"),
    fixed("resident_VMs", SetOf(Reference("VM")), (), "always empty"),
    fixed("logging", STRING_MAP, {}, "always empty"),
    computed(
        "PIFs",
        SetOf(Reference("PIF")),
        "this gateway's connection to its network; of other hosts nothing is known",
        lambda host, estate: (estate.nbd.interface.ref,) if host.ref == estate.nbd.host else (),
    ),
    fixed("suspend_image_sr", Reference("SR"), NULL_REF, "always null"),
    fixed("crash_dump_sr", Reference("SR"), NULL_REF, "always null"),
    fixed("crashdumps", SetOf(Reference("host_crashdump")), (), "always empty"),
    fixed("patches", SetOf(Reference("host_patch")), (), "always empty"),
    fixed("updates", SetOf(Reference("pool_update")), (), "always empty"),
    computed(
        "PBDs",
        SetOf(Reference("PBD")),
        "the SRs it reaches",
        lambda host, estate: tuple(pbd.ref for pbd in estate.records.pbds_of_host(host.ref)),
    ),
    fixed("host_CPUs", SetOf(Reference("host_cpu")), (), "always empty"),
    fixed("cpu_info", STRING_MAP, {}, "always empty"),
    stored("hostname", STRING, "its host name", writer=Role.POOL_ADMIN),
    stored("address", ADDRESS, "the address to which clients are redirected", writer=Role.POOL_ADMIN),
    fixed("metrics", Reference("host_metrics"), NULL_REF, "always null"),
    fixed("license_params", STRING_MAP, {}, "always empty"),
    fixed("ha_statefiles", STRINGS, (), "always empty"),
    fixed("ha_network_peers", STRINGS, (), "always empty"),
    fixed("blobs", MapOf(Reference("blob"), STRING), {}, "always empty"),
    stored("tags", STRINGS, "words for sorting", writer=Role.VM_OPERATOR),
    fixed("external_auth_type", STRING, "", "always empty"),
    fixed("external_auth_service_name", STRING, "", "always empty"),
    fixed("external_auth_configuration", STRING_MAP, {}, "always empty"),
    fixed("edition", STRING, "", "always empty"),
    fixed("license_server", STRING_MAP, {}, "always empty"),
    fixed("bios_strings", STRING_MAP, {}, "always empty"),
    fixed("power_on_mode", STRING, "", "always empty"),
    fixed("power_on_config", STRING_MAP, {}, "always empty"),
    fixed("local_cache_sr", Reference("SR"), NULL_REF, "always null"),
    fixed("chipset_info", STRING_MAP, {}, "always empty"),
    fixed("PCIs", SetOf(Reference("PCI")), (), "always empty"),
    fixed("PGPUs", SetOf(Reference("PGPU")), (), "always empty"),
    fixed("PUSBs", SetOf(Reference("PUSB")), (), "always empty"),
    fixed("display", STRING, "enabled", "always enabled"),
    fixed("updates_requiring_reboot", SetOf(Reference("pool_update")), (), "always empty"),
    fixed("pending_guidances", STRINGS, (), "always empty"),
    fixed("ssl_legacy", BOOL, False, "whether old versions of TLS are accepted"),
    fixed("guest_VCPUs_params", STRING_MAP, {}, "always empty"),
    fixed("virtual_hardware_platform_versions", SetOf(INT), (), "always empty"),
    fixed("control_domain", Reference("VM"), NULL_REF, "always null"),
    fixed("features", SetOf(Reference("Feature")), (), "always empty"),
    fixed("iscsi_iqn", STRING, "", "always empty"),
    fixed("multipathing", BOOL, False, "always false"),
    fixed("certificates", SetOf(Reference("Certificate")), (), "always empty"),
    fixed("editions", STRINGS, (), "always empty"),
    fixed("tls_verification_enabled", BOOL, False, "whether hosts verify each other's certificates"),
    fixed("https_only", BOOL, False, "whether plain HTTP is refused"),
)

_SELF = Parameter("self", Reference("host"), "the host")


@message(
    "create",
    "Make another host known, so that uploads to VDIs which only it reaches are redirected to its address.",
    Parameter("uuid", STRING, "uuid of the host; empty for a new one"),
    Parameter("name_label", STRING, "name of the host"),
    Parameter("name_description", STRING, "description of the host"),
    Parameter("hostname", STRING, "its host name"),
    Parameter("address", ADDRESS, "host name or IP address, with a port if it is not the scheme's own"),
    Parameter("external_auth_type", STRING, "not used", default=""),
    Parameter("external_auth_service_name", STRING, "not used", default=""),
    Parameter("external_auth_configuration", STRING_MAP, "not used", default={}),
    Parameter("license_params", STRING_MAP, "not used", default={}),
    result=Reference("host"),
    role=Role.POOL_ADMIN,
    errors=("VALUE_NOT_SUPPORTED",),
)
async def create(  # noqa: PLR0917 - xapi's parameters in xapi's order
    call: Call,
    uuid: str,
    name_label: str,
    name_description: str,
    hostname: str,
    address: str,
    *_unused: Any,
) -> str:
    if uuid and not is_uuid(uuid):
        raise XenAPIError("VALUE_NOT_SUPPORTED", "uuid", uuid, "it must be a uuid or empty")
    hosts = call.estate.records.hosts
    if any(host.uuid == uuid for host in hosts.all()):
        raise XenAPIError("VALUE_NOT_SUPPORTED", "uuid", uuid, "there is a host with this uuid already")
    host = Host(
        ref=new_ref(),
        uuid=uuid or new_uuid(),
        name_label=name_label,
        name_description=name_description,
        hostname=hostname,
        address=address,
    )
    await hosts.add(host)
    return host.ref


@message(
    "destroy",
    "Forget another host. Its PBDs must be destroyed before.",
    _SELF,
    role=Role.POOL_ADMIN,
    errors=("OPERATION_NOT_ALLOWED",),
)
async def destroy(call: Call, ref: str) -> None:
    records = call.estate.records
    records.hosts.get(ref)
    if ref == records.this_host.ref:
        raise XenAPIError("OPERATION_NOT_ALLOWED", "a gateway cannot forget itself")
    if any(pbd.host == ref for pbd in records.pbds.all()):
        raise XenAPIError("OPERATION_NOT_ALLOWED", "the host still has PBDs; destroy them first")
    await records.hosts.remove(ref)


def _enabled(value: bool) -> Any:
    async def run(call: Call, ref: str) -> None:
        await call.estate.records.hosts.change(ref, enabled=value)

    return run


@message("get_servertime", "The host's clock.", _SELF, result=DATETIME, asynchronous=False)
async def get_servertime(call: Call, ref: str) -> datetime:
    call.estate.records.hosts.get(ref)
    return datetime.now(UTC)


HOST = ApiClass(
    name="host",
    doc="A machine that reaches SRs: this gateway, or another one.",
    fields=FIELDS,
    messages=(
        create,
        destroy,
        get_servertime,
        message("enable", "Let the host take work.", _SELF, role=Role.POOL_OPERATOR)(_enabled(True)),
        message("disable", "Let the host take no work.", _SELF, role=Role.POOL_OPERATOR)(_enabled(False)),
    ),
    objects=lambda estate: estate.records.hosts,
)
