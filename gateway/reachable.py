"""At which addresses others reach a server of this machine.

The trap: a server that listens on all addresses has none that can be told or certified, so those of the
machine's interfaces stand for it. That on the way to other networks comes first, because many clients take
the first; no packet is sent to find it.
"""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from gateway.interfaces import IPAddress, interface_addresses

# Of the networks for documentation (RFC 5737, RFC 3849): nobody is there, and the way there is the usual one.
_ELSEWHERE: Final = {4: (socket.AF_INET, "192.0.2.1"), 6: (socket.AF_INET6, "2001:db8::1")}


def reachable_addresses(host: str) -> Iterator[str]:
    """Addresses at which others reach who listens on `host`: itself, or for the whole of IPv4 or IPv6 each
    that this machine has of them; its name if it has none.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        yield host
        return
    if not address.is_unspecified:
        yield host
        return
    found = _usual_address(address.version)
    with suppress(OSError):
        found += interface_addresses()
    told = [
        str(each)
        for each in dict.fromkeys(found)
        if each.version == address.version and not each.is_loopback and not each.is_link_local
    ]
    yield from told or [socket.gethostname()]


def _usual_address(version: int) -> list[IPAddress]:
    family, elsewhere = _ELSEWHERE[version]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asked:
            asked.connect((elsewhere, 9))
            return [ipaddress.ip_address(asked.getsockname()[0])]
    except OSError:
        return []  # There is no such network here.
