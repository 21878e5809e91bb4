"""What went wrong, as NBD can say it: the protocol carries eight numbers and no text."""

import errno
from typing import Final

from gateway.images.errors import ImageTooLarge

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
    match error:
        case PermissionError(errno=None):  # a disk that is open for reading only
            return errno.EPERM
        case OSError(errno=int(code)):
            code = _NEAREST.get(code, code)
            return code if code in _CARRIED else errno.EIO
        case ImageTooLarge():
            return errno.ENOSPC
        case ValueError():
            return errno.EINVAL
        case MemoryError():
            return errno.ENOMEM
    return errno.EIO
