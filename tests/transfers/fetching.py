"""A file is fetched from a server of a test: what comes of it, or which error.

The trap: between two attempts nothing is waited for, or tests of broken connections would take long.
"""

import hashlib
import random

import pytest

from gateway.core.errors import XenAPIError
from gateway.transfers.pull import Checksum, Pull
from gateway.transfers.pull_connection import Client
from gateway.transfers.pull_socket import Interrupt, Patience
from gateway.transfers.pull_source import ImageURL, PullRules
from tests.transfers.pull_server import LOOPBACK

MIB = 1 << 20
DATA = random.Random(3).randbytes(3 * MIB + 77)
EAGER = Patience(connect=10, idle=10, pauses=(0.0, 0.0, 0.0))
NO_PATIENCE = Patience(connect=0.3, idle=0.3, pauses=(0.0,))
SHA256 = Checksum("sha256", hashlib.sha256(DATA).hexdigest())


def fetched(
    url: str,
    checksum: Checksum | None = None,
    *,
    rules: PullRules | None = None,
    patience: Patience = EAGER,
    pieces: int = 300_000,
) -> bytes:
    interrupt = Interrupt()
    pull = Pull(ImageURL.parse(url), Client(rules or PullRules.of(LOOPBACK), patience, interrupt))
    found = bytearray()
    try:
        pull.open(checksum)
        view = memoryview(bytearray(pieces))
        while got := pull.recv_into(view):
            found += view[:got]
        pull.finish()
        assert pull.received == len(found)
        assert pull.checksum == Checksum("sha256", hashlib.sha256(found).hexdigest())
        assert pull.fraction() == (1.0 if pull.length else 0.0)
    finally:
        pull.close()
        interrupt.close()
    return bytes(found)


def refusal(url: str, checksum: Checksum | None = None, **more: object) -> XenAPIError:
    with pytest.raises(XenAPIError) as refused:
        fetched(url, checksum, **more)  # type: ignore[arg-type]
    return refused.value
