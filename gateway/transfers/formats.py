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
MAGIC_BYTES: Final = 512

# Raises VDI_TOO_SMALL where there isn't room for so many bytes of a disk.
Fits = Callable[[int], None]


class BodyFormat(StrEnum):
    """The formats of a body; the values are those of the parameter `format`."""

    RAW = "raw"
    VHD = "vhd"
    CHUNKED = "chunked"
    QCOW2 = "qcow2"
    VHDX = "vhdx"
    VMDK = "vmdk"
    AUTO = "auto"


_MAGIC: Final = (
    (b"conectix", BodyFormat.VHD),
    (b"QFI\xfb", BodyFormat.QCOW2),
    (b"vhdxfile", BodyFormat.VHDX),
    (b"KDMV", BodyFormat.VMDK),
)
_CONVERT: Final = "convert it (qemu-img convert -O qcow2)"
_UNPACK: Final = "unpack it"
# What nobody means to write to a disk as it is: the place of the magic, the magic, what it is, what to do.
_OTHERS: Final = (
    (0, b"COWD", "a VMDK image of an old ESX host", _CONVERT),
    (
        0,
        b"# Disk DescriptorFile",
        "the description of a VMDK image, whose data is in other files",
        f"give the file with the data if it is one (-flat.vmdk is a raw disk), or {_CONVERT}",
    ),
    # Of its text each program has its own: QEMU, Oracle and those before.
    (64, b"\x7f\x10\xda\xbe", "a VirtualBox image", _CONVERT),
    (0, b"QED\0", "a QED image", _CONVERT),
    (0, b"WithoutFreeSpace", "a Parallels image", _CONVERT),
    (0, b"WithouFreSpacExt", "a Parallels image", _CONVERT),
    (257, b"ustar", "a tar archive, as an OVA is", _UNPACK),
    (0, b"\x1f\x8b\x08", "compressed by gzip", _UNPACK),
    (0, b"\xfd7zXZ\0", "compressed by xz", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK),
    # Frames to be skipped (RFC 8878, section 3.1.2), with which pzstd begins.
    *((0, bytes((low, 0x2A, 0x4D, 0x18)), "compressed by zstd", _UNPACK) for low in range(0x50, 0x60)),
    (0, b"BZh", "compressed by bzip2", _UNPACK),
    (0, b"PK\x03\x04", "a ZIP archive", _UNPACK),
    # What a server sends instead of a file: a list, a form to log in, an excuse.
    *(
        (0, begin, "a web page", "give the address of the file itself")
        for begin in (b"<!DOCTYPE ", b"<!doctype ", b"<html", b"<HTML")
    ),
)


def body_format(name: str) -> BodyFormat:
    """The format of this name, in any case. Raises IMPORT_ERROR_UNKNOWN_FORMAT."""
    try:
        return BodyFormat(name.lower())
    except ValueError:
        raise XenAPIError("IMPORT_ERROR_UNKNOWN_FORMAT", name[:50]) from None


def recognise(begin: bytes) -> BodyFormat:
    """The format of a body that begins so: RAW where nothing is known of it, which may be a fixed VHD, too.

    Raises IMPORT_ERROR_UNSUPPORTED_IMAGE for what is known and can't be read.
    """
    for magic, name in _MAGIC:
        if begin.startswith(magic):
            return name
    for place, magic, what, remedy in _OTHERS:
        if begin.startswith(magic, place):
            raise unsupported_image(
                "auto", f"it is {what}; {remedy}, or name the format raw if that is the disk"
            )
    return BodyFormat.RAW


def refuse_others(begin: bytes, wanted: BodyFormat) -> None:
    """Raise IMPORT_ERROR_WRONG_FORMAT for the beginning of another format."""
    for magic, name in _MAGIC:
        if begin.startswith(magic) and name is not wanted:
            raise wrong_format(wanted, f"it is a {name} image")
    if wanted is BodyFormat.VHD:
        return  # A fixed one begins as its disk does.
    for place, magic, what, remedy in _OTHERS:
        if begin.startswith(magic, place):
            raise wrong_format(wanted, f"it is {what}; {remedy}")


def wrong_format(wanted: str, why: str) -> XenAPIError:
    """The body isn't of the format that the request names."""
    return XenAPIError("IMPORT_ERROR_WRONG_FORMAT", wanted, why)


def corrupt_image(name: str, problem: str) -> XenAPIError:
    """The body contradicts its own format."""
    return XenAPIError("IMPORT_ERROR_CORRUPT_IMAGE", name, problem)


def unsupported_image(name: str, problem: str) -> XenAPIError:
    """The body may be right, but it can't be read here."""
    return XenAPIError("IMPORT_ERROR_UNSUPPORTED_IMAGE", name, problem)
