"""What clients are told of an NBD server of this machine: addresses that they reach, and its certificate."""

import socket
from pathlib import Path

from gateway.certificates import subject_of
from gateway.core.nbd_service import NbdService
from gateway.reachable import reachable_addresses


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
    return NbdService(addresses, port, certificate.decode("utf-8", "replace"), subject)
