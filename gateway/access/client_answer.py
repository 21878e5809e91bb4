"""What the gateway answers to the first message of a client, and which errno fits a refusal. Standard library
only.
"""

import errno
from typing import Final

from gateway.access.client_link import ANSWER_SECONDS, ClientLink
from gateway.access.protocol import Message, Refused

_ERRNO: Final = {
    "VDI_IN_USE": errno.EBUSY,
    "OTHER_OPERATION_IN_PROGRESS": errno.EBUSY,
    "SESSION_INVALID": errno.EACCES,
    "SESSION_AUTHENTICATION_FAILED": errno.EACCES,
    "RBAC_PERMISSION_DENIED": errno.EACCES,
    "OPERATION_NOT_ALLOWED": errno.EPERM,
    "VDI_READONLY": errno.EROFS,
    "UUID_INVALID": errno.ENOENT,
    "VDI_MISSING": errno.ENOENT,
    "SR_NOT_ATTACHED": errno.ENODEV,
    "TOO_MANY_TRANSFERS": errno.EAGAIN,
}


class AccessRefused(OSError):  # noqa: N818 - an answer, not a fault
    """The gateway refused: a XenAPI code with its parameters, one sentence, and the errno that fits it."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(_ERRNO.get(refused.code, errno.EIO), f"{refused.code}: {refused.message}")
        self.code = refused.code
        self.params = refused.params
        self.message = refused.message


def answer(link: ClientLink) -> Message:
    """The answer, or AccessRefused; ConnectionError when there comes none, OSError, ProtocolError."""
    message = link.receive(ANSWER_SECONDS)
    if isinstance(message, Refused):
        raise AccessRefused(message)
    if message is None:
        raise ConnectionError("the gateway went away without an answer")
    return message
