import errno
import os

import pytest

from gateway.images.errors import CorruptImage, ImageTooLarge
from nbd_plugin.failures import nbd_errno


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "full"), errno.ENOSPC),
        (OSError(errno.EFBIG, "full"), errno.ENOSPC),
        (OSError(errno.ESHUTDOWN, "revoked"), errno.ESHUTDOWN),
        (OSError(errno.EROFS, "read-only"), errno.EPERM),
        (OSError(errno.EBADF, "closed"), errno.EIO),
        (OSError("without a number"), errno.EIO),
        (PermissionError("open for reading only"), errno.EPERM),
        (ConnectionError("gone"), errno.EIO),
        (ValueError("beyond the end"), errno.EINVAL),
        (MemoryError(), errno.ENOMEM),
        (CorruptImage("a.vhd", "broken"), errno.EIO),
        (ImageTooLarge("a.vhd", "2 TiB"), errno.ENOSPC),
    ],
)
def test_every_failure_has_a_number_that_nbd_can_carry(error: Exception, number: int) -> None:
    assert nbd_errno(error) == number, os.strerror(nbd_errno(error))
