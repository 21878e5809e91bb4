"""What went wrong, as NBD can say it: the protocol carries eight numbers and no text."""

import errno
from typing import Final

from gateway.access.client_failures import errno_of_failure

_CARRIED: Final = frozenset(
    {
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.EOPNOTSUPP,
        errno.ESHUTDOWN,
    }
)
_NEAREST: Final = {
    errno.EACCES: errno.EPERM,
    errno.EROFS: errno.EPERM,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
}


def nbd_errno(error: BaseException) -> int:
    """The number for a failed request; EIO for all that the protocol has no word for."""
    code = errno_of_failure(error)
    code = _NEAREST.get(code, code)
    return code if code in _CARRIED else errno.EIO
