"""What went wrong, as the programs that read files know it.

The traps: EAGAIN has programs ask again at once and for ever, and ENOTCONN is what a mount says whose process
has died; so a gateway that isn't there is EHOSTDOWN, as a file server would be. A descriptor whose lease was
taken away is ESTALE: opening the file anew may succeed.
"""

import errno
from typing import Final

from gateway.access.client import AccessRefused
from gateway.access.client_failures import errno_of_failure

_OF_REFUSALS: Final = {
    "VDI_INCOMPATIBLE_TYPE": errno.EOPNOTSUPP,
    "SR_FULL": errno.ENOSPC,
    "TOO_MANY_TRANSFERS": errno.EBUSY,
}
_AS_FILES: Final = {
    errno.ESHUTDOWN: errno.ESTALE,
    # Numbers that are about descriptors of ours, or mean something else to who gets them.
    errno.EBADF: errno.EIO,
    errno.EAGAIN: errno.EIO,
    errno.EINTR: errno.EIO,
    errno.EPIPE: errno.EIO,
    errno.ENOTCONN: errno.EIO,
    errno.ENOSYS: errno.EIO,  # the kernel would never ask again
}


def errno_of(error: BaseException) -> int:
    """The number for a failed open or request on a file of the mount; EIO where nothing says more."""
    match error:
        case AccessRefused(code=str(code)) if code in _OF_REFUSALS:
            return _OF_REFUSALS[code]
        case AccessRefused() | OSError(errno=errno.ESHUTDOWN):  # to Python, ESHUTDOWN is a ConnectionError
            pass
        # No gateway: its socket is refused, or isn't there, or it went away before it answered.
        case ConnectionError() | FileNotFoundError():
            return errno.EHOSTDOWN
        case TimeoutError():
            return errno.ETIMEDOUT
    number = errno_of_failure(error)
    return _AS_FILES.get(number, number)
