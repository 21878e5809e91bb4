"""A whole disk as a file of another format, the same wherever it goes out.

What is in the file follows from the content id, the disk's size and the blocks of its chain alone, so that
everybody who makes it of the same content makes the same bytes, ids included.
"""

from enum import Enum
from typing import TYPE_CHECKING

from gateway.images.errors import ImageTooLarge
from gateway.images.qcow2.layout import Backing, qcow2_layout
from gateway.images.vhd.layout import VhdParent, vhd_id, vhd_layout

if TYPE_CHECKING:
    from array import array

    from gateway.images.disk import Disk
    from gateway.images.layout import Layout


class SparseFormat(Enum):
    """A format that has only the blocks that are stored."""

    VHD = "vhd"
    QCOW2 = "qcow2"


def sparse_layout(
    disk: "Disk",
    blocks: "array[int]",
    content_id: str,
    sparse_format: SparseFormat,
    base: tuple[str, str] | None = None,
) -> "Layout":
    """The file with these `blocks` of 2 MiB (ascending) of a disk with that content.

    `base` is what a delta stands on: the uuid of the VDI, which names its file, and its content id. Raises
    ImageTooLarge.
    """
    if sparse_format is SparseFormat.VHD:
        parent = None if base is None else VhdParent(vhd_id(base[1]), f"{base[0]}.vhd")
        return vhd_layout(disk, blocks, vhd_id(content_id), parent)
    return qcow2_layout(disk, blocks, None if base is None else Backing(f"{base[0]}.qcow2"))


def sparse_size(disk: "Disk", blocks: "array[int]", sparse_format: SparseFormat) -> int | None:
    """The length in bytes of the whole disk's file, None where the format can't hold it."""
    try:
        return sparse_layout(disk, blocks, "", sparse_format).size
    except ImageTooLarge:
        return None
