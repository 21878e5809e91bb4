"""What clients are told of an NBD server of this machine: addresses that they can reach, and its certificate.

The trap: a server that listens on all addresses has none that can be told, so the machine's own are looked
for; no packet is sent for that.
"""

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gateway.certificates import subject_of
from gateway.core.nbd_service import NbdService

# Of the networks for documentation (RFC 5737, RFC 3849): nobody is there, and the way there is the usual one.
_ELSEWHERE: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def nbd_service(host: str, port: int, chain: str | None) -> NbdService:
    """The service that listens on `host` (a name or an address, without brackets) and `port`.

    `chain` is the PEM file of the certificates that it sends, None without TLS. It blocks: for a worker
    thread. Raises OSError, ValueError (no certificate in the file).
    """
    addresses = tuple(dict.fromkeys(reachable_addresses(host)))
    if chain is None:
        return NbdService(addresses, port, subject=socket.gethostname())
    certificate = Path(chain).read_bytes()
    subject = subject_of(certificate) or socket.gethostname()
    return NbdService(addresses, port, certificate.decode("ascii"), subject)


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
    for family, elsewhere in _ELSEWHERE:
        if ipaddress.ip_address(elsewhere).version != version:
            continue
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as asked:
                asked.connect((elsewhere, 9))
                own = ipaddress.ip_address(asked.getsockname()[0])
        except OSError:
            continue  # There is no such network here.
        if not own.is_loopback and not own.is_link_local:
            yield str(own)
