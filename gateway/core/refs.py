"""References and uuids. A XenAPI reference is an opaque string, "OpaqueRef:" and a uuid by custom
(wire-protocol.md).

The trap: a session's reference is its secret, so it comes from `new_session_ref` alone and is never written
down.
"""

import re
import secrets
import uuid
from typing import Final

REF_PREFIX: Final = "OpaqueRef:"
NULL_REF: Final = "OpaqueRef:NULL"

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")


def new_uuid() -> str:
    """A random uuid in its usual lower-case form."""
    return str(uuid.uuid4())


def new_ref() -> str:
    """A reference for a new object; no secret."""
    return REF_PREFIX + new_uuid()


def new_session_ref() -> str:
    """A reference that is a secret: 122 bits from `secrets` in the form of a uuid, as clients expect it."""
    return REF_PREFIX + str(uuid.UUID(bytes=secrets.token_bytes(16), version=4))


def is_uuid(text: str) -> bool:
    """Whether `text` has the form of a uuid, 8-4-4-4-12 hexadecimal digits, in either case."""
    return _UUID.fullmatch(text) is not None


def is_ref(text: str) -> bool:
    """Whether `text` has the form of a reference (the null reference has it too)."""
    return text.startswith(REF_PREFIX)
