import errno

import pytest

from fuse_mount.errnos import errno_of
from gateway.access.client import AccessRefused
from gateway.access.protocol import Refused
from gateway.images.errors import CorruptImage, ImageTooLarge, MissingParent, UnsupportedImage


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("VDI_IN_USE", errno.EBUSY),
        ("OTHER_OPERATION_IN_PROGRESS", errno.EBUSY),
        ("TOO_MANY_TRANSFERS", errno.EBUSY),
        ("UUID_INVALID", errno.ENOENT),
        ("VDI_MISSING", errno.ENOENT),
        ("SESSION_INVALID", errno.EACCES),
        ("RBAC_PERMISSION_DENIED", errno.EACCES),
        ("OPERATION_NOT_ALLOWED", errno.EPERM),
        ("VDI_READONLY", errno.EROFS),
        ("SR_NOT_ATTACHED", errno.ENODEV),
        ("SR_FULL", errno.ENOSPC),
        ("VDI_INCOMPATIBLE_TYPE", errno.EOPNOTSUPP),
        ("VDI_IO_ERROR", errno.EIO),
        ("A_CODE_OF_LATER", errno.EIO),
    ],
)
def test_a_refusal_has_the_number_that_its_code_is_for_a_file(code: str, number: int) -> None:
    assert errno_of(AccessRefused(Refused(code, (), "why"))) == number


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ConnectionRefusedError("the gateway doesn't answer"), errno.EHOSTDOWN),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), errno.EHOSTDOWN),
        (FileNotFoundError(errno.ENOENT, "no socket"), errno.EHOSTDOWN),
        (ConnectionError("the gateway went away"), errno.EHOSTDOWN),
        (BrokenPipeError(errno.EPIPE, "gone"), errno.EHOSTDOWN),
        (TimeoutError("it says nothing"), errno.ETIMEDOUT),
        (OSError(errno.ESHUTDOWN, "the lease has ended"), errno.ESTALE),
        (OSError(errno.EBADF, "closed"), errno.EIO),
        (BlockingIOError(errno.EAGAIN, "not at hand"), errno.EIO),
        (OSError(errno.ENOSYS, "not here"), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EMFILE, "too many"), errno.EMFILE),
        (OSError("without a number"), errno.EIO),
        (PermissionError("open for reading only"), errno.EROFS),
        (PermissionError(errno.EACCES, "a directory of others"), errno.EACCES),
        (ValueError("beyond the end"), errno.EINVAL),
        (MemoryError(), errno.ENOMEM),
        (CorruptImage("a.vhd", "broken"), errno.EIO),
        (MissingParent("a.vhd", "gone"), errno.EIO),
        (UnsupportedImage("a.vhd", "new"), errno.EIO),
        (ImageTooLarge("a.vhd", "3 TiB"), errno.EFBIG),
        (KeyError("a mistake of ours"), errno.EIO),
    ],
)
def test_a_failure_has_the_number_that_programs_know_for_files(error: Exception, number: int) -> None:
    assert errno_of(error) == number
