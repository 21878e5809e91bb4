"""What a body may be, how one knows it by its first bytes, and what is said of one that can't be taken.

A raw disk may begin with anything, so that nothing is known for is raw, and what is known and can't be read
is refused rather than stored as it is. The trap: a fixed VHD is a raw disk with a footer behind it; nothing
at its beginning tells.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Final

from gateway.core.errors import XenAPIError

# So many bytes are enough to tell formats apart.
MAGIC_BYTES: Final = 64

# Raises VDI_TOO_SMALL where there isn't room for so many bytes of a disk.
Fits = Callable[[int], None]


class BodyFormat(StrEnum):
    """The formats of a body; the values are those of the parameter `format`."""

    RAW = "raw"
    VHD = "vhd"
    CHUNKED = "chunked"


def body_format(name: str) -> BodyFormat:
    """The format of this name, in any case. Raises IMPORT_ERROR_UNKNOWN_FORMAT."""
    try:
        return BodyFormat(name.lower())
    except ValueError:
        raise XenAPIError("IMPORT_ERROR_UNKNOWN_FORMAT", name[:50]) from None


def wrong_format(wanted: str, why: str) -> XenAPIError:
    """The body isn't of the format that the request names."""
    return XenAPIError("IMPORT_ERROR_WRONG_FORMAT", wanted, why)


def corrupt_image(name: str, problem: str) -> XenAPIError:
    """The body contradicts its own format."""
    return XenAPIError("IMPORT_ERROR_CORRUPT_IMAGE", name, problem)


def unsupported_image(name: str, problem: str) -> XenAPIError:
    """The body may be right, but it can't be read here."""
    return XenAPIError("IMPORT_ERROR_UNSUPPORTED_IMAGE", name, problem)
