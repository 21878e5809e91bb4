"""Which errno fits a failed request to a disk, before a door has its own say. Standard library only."""

import errno

from gateway.images.errors import ImageTooLarge


def errno_of_failure(error: BaseException) -> int:
    """The number for what a disk or the opening of one has raised; EIO where nothing says more."""
    match error:
        case PermissionError(errno=None):  # a disk that is open for reading only
            return errno.EROFS
        case OSError(errno=int(code)):
            return code
        case ImageTooLarge():
            return errno.EFBIG
        case ValueError():
            return errno.EINVAL
        case MemoryError():
            return errno.ENOMEM
    return errno.EIO
