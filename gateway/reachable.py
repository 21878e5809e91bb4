"""At which addresses others reach a server of this machine.

The trap: a server that listens on all addresses has none that can be told or certified, so the machine's own
are looked for; no packet is sent for that.
"""

import ipaddress
import socket
from collections.abc import Iterator
from typing import Final

# Of the networks for documentation (RFC 5737, RFC 3849): nobody is there, and the way there is the usual one.
_ELSEWHERE: Final = {4: (socket.AF_INET, "192.0.2.1"), 6: (socket.AF_INET6, "2001:db8::1")}


def reachable_addresses(host: str) -> Iterator[str]:
    """Addresses at which others reach who listens on `host`: itself, or what this machine has for the whole
    of IPv4 or IPv6.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        yield host
        return
    if not address.is_unspecified:
        yield host
        return
    yield from list(_own_addresses(address.version)) or [socket.gethostname()]


def _own_addresses(version: int) -> Iterator[str]:
    family, elsewhere = _ELSEWHERE[version]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asked:
            asked.connect((elsewhere, 9))
            own = ipaddress.ip_address(asked.getsockname()[0])
    except OSError:
        return  # There is no such network here.
    if not own.is_loopback and not own.is_link_local:
        yield str(own)
