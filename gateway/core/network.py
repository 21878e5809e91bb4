"""Which clients count as one, where a limit is per address."""

import ipaddress


def network_of(address: str) -> str:
    """The address; of IPv6 the /64, since whoever has one has 2^64 addresses. What is no address stays."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
