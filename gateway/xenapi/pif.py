"""The class PIF: this gateway's connection to its network. Clients compare its addresses with those that
VDI.get_nbd_info tells.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Final

from gateway.core.refs import NULL_REF
from gateway.xenapi.datamodel import ApiClass, computed, fixed, stored
from gateway.xenapi.network import only
from gateway.xenapi.types import BOOL, INT, STRING, STRING_MAP, STRINGS, Choice, Reference, SetOf

if TYPE_CHECKING:
    from gateway.core.nbd_service import Named
    from gateway.xenapi.estate import Estate

_IP_MODE: Final = Choice("ip_configuration_mode", ("None", "DHCP", "Static"))
_IPV6_MODE: Final = Choice("ipv6_configuration_mode", ("None", "DHCP", "Static", "Autoconf"))
_ADDRESS_TYPE: Final = Choice("primary_address_type", ("IPv4", "IPv6"))
_IGMP: Final = Choice("pif_igmp_status", ("enabled", "disabled", "unknown"))


def _addresses(estate: Estate, version: int) -> tuple[str, ...]:
    """The addresses of that IP version, where NBD is served; without NBD those that the host has."""
    service = estate.nbd.service
    told = (estate.records.this_host.address.strip("[]"),) if service is None else service.addresses
    found = []
    for address in told:
        try:
            parsed = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            continue  # A name.
        if parsed.version == version:
            found.append(address)
    return tuple(found)


def _ipv4(_pif: Named, estate: Estate) -> str:
    return next(iter(_addresses(estate, 4)), "")


FIELDS = (
    stored("uuid", STRING, "unique identifier"),
    fixed("device", STRING, "", "always empty"),
    computed(
        "network",
        Reference("network"),
        "the network",
        lambda _pif, estate: estate.nbd.network.ref,
    ),
    computed("host", Reference("host"), "this gateway", lambda _pif, estate: estate.nbd.host),
    fixed("MAC", STRING, "", "always empty"),
    fixed("MTU", INT, 1500, "always 1500"),
    fixed("VLAN", INT, -1, "always -1"),
    fixed("metrics", Reference("PIF_metrics"), NULL_REF, "always null"),
    fixed("physical", BOOL, True, "always true"),
    fixed("currently_attached", BOOL, True, "always true"),
    fixed("ip_configuration_mode", _IP_MODE, "Static", "always Static"),
    computed("IP", STRING, "the first IPv4 address at which clients reach it, or empty", _ipv4),
    fixed("netmask", STRING, "", "always empty"),
    fixed("gateway", STRING, "", "always empty"),
    fixed("DNS", STRING, "", "always empty"),
    fixed("bond_slave_of", Reference("Bond"), NULL_REF, "always null"),
    fixed("bond_master_of", SetOf(Reference("Bond")), (), "always empty"),
    fixed("VLAN_master_of", Reference("VLAN"), NULL_REF, "always null"),
    fixed("VLAN_slave_of", SetOf(Reference("VLAN")), (), "always empty"),
    fixed("management", BOOL, True, "always true"),
    fixed("other_config", STRING_MAP, {}, "always empty"),
    fixed("disallow_unplug", BOOL, True, "always true"),
    fixed("tunnel_access_PIF_of", SetOf(Reference("tunnel")), (), "always empty"),
    fixed("tunnel_transport_PIF_of", SetOf(Reference("tunnel")), (), "always empty"),
    fixed("ipv6_configuration_mode", _IPV6_MODE, "Static", "always Static"),
    computed(
        "IPv6",
        STRINGS,
        "the IPv6 addresses at which clients reach it",
        lambda _pif, estate: _addresses(estate, 6),
    ),
    fixed("ipv6_gateway", STRING, "", "always empty"),
    fixed("primary_address_type", _ADDRESS_TYPE, "IPv4", "always IPv4"),
    fixed("managed", BOOL, True, "always true"),
    fixed("properties", STRING_MAP, {}, "always empty"),
    fixed("capabilities", STRINGS, (), "always empty"),
    fixed("igmp_snooping_status", _IGMP, "unknown", "always unknown"),
    fixed("sriov_physical_PIF_of", SetOf(Reference("network_sriov")), (), "always empty"),
    fixed("sriov_logical_PIF_of", SetOf(Reference("network_sriov")), (), "always empty"),
    fixed("PCI", Reference("PCI"), NULL_REF, "always null"),
)

PIF = ApiClass(
    name="PIF",
    doc="This gateway's connection to its network. There is one.",
    fields=FIELDS,
    objects=only("PIF", lambda nbd: nbd.interface),
    named=False,
)
