"""What went wrong, as NBD can say it, which is one of eight numbers, and as the log does, for people."""

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
_REMEDIES: Final = {
    errno.ENOSPC: "free space in its storage repository",
    errno.EDQUOT: "free space in its storage repository, or raise the quota there",
    errno.EIO: "its storage fails; the kernel's log says more",
}


class RequestFailed(OSError):  # noqa: N818  it says what happened
    """What storage has failed a request, in one line: which VDI it was, and what to do."""

    def __init__(self, vdi: str, error: OSError) -> None:
        super().__init__(error.errno, f"the VDI {vdi}: {error.strerror}; {_REMEDIES[error.errno or 0]}")


def has_remedy(error: OSError) -> bool:
    """Whether people can be told what to do, for which where it was met in the code is of no use to them."""
    return error.errno in _REMEDIES


def nbd_errno(error: BaseException) -> int:
    """The number for a failed request; EIO for all that the protocol has no word for."""
    code = errno_of_failure(error)
    code = _NEAREST.get(code, code)
    return code if code in _CARRIED else errno.EIO
