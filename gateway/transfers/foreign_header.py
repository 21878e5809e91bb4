"""What the headers of qcow2, VHDX and VMDK images say, looked at before another program reads the file.

An image can name other files of the machine that reads it: a backing file, a data file, a parent, extents. It
can be encrypted, or have tables that take all memory. All of that is refused here, by a reader that follows
no name and reads a few kilobytes. The trap: what qemu goes by counts, not what the specification says; for
VMDK it looks for a parent's name in twenty sectors from the second one on, wherever the description is.

Sources: docs/interop/qcow2.txt and block/vmdk.c of QEMU, [MS-VHDX], VMware's "Virtual Disk Format 5.0".
"""

import os
import re
import struct
import sys
from array import array
from typing import TYPE_CHECKING, Final
from uuid import UUID

from gateway.core.errors import XenAPIError
from gateway.images.files import pread_exactly
from gateway.transfers.formats import BodyFormat, corrupt_image, unsupported_image, wrong_format

if TYPE_CHECKING:
    from collections.abc import Callable

_QCOW2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_QCOW2_V3: Final = struct.Struct(">QQQII")
_QCOW2_MAGIC: Final = b"QFI\xfb"
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED = (1 << bit for bit in range(5))
_MOST_L1_BYTES: Final = 32 << 20
_MOST_REFCOUNT_BYTES: Final = 8 << 20
_MOST_SNAPSHOTS: Final = 1024

_VMDK: Final = struct.Struct("<4sIIqqqqIQQQB4sH")
_GD_AT_END: Final = (1 << 64) - 1
_CREATE_TYPE: Final = re.compile(rb'^createType="([^"]*)"', re.MULTILINE)
_PARENT_CID: Final = re.compile(rb"^parentCID=([0-9a-fA-F]*)", re.MULTILINE)
_VMDK_TYPES: Final = (b"monolithicSparse", b"streamOptimized")

_VHDX_REGIONS: Final = 192 << 10
_VHDX_METADATA: Final = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
_VHDX_PARAMETERS: Final = UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
_VHDX_SIZE: Final = UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le
_VHDX_TABLE: Final = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le
_VHDX_HAS_PARENT: Final = 2
_VHDX_PRESENT: Final = 6  # the state of a block that lies in the file, and 7
_MOST_TABLE_BYTES: Final = 1 << 30
_TABLE_PIECE: Final = 1 << 20


class NotYet(Exception):  # noqa: N818 - a state of the file
    """More of the file is needed."""


def virtual_size(name: BodyFormat, fd: int, *, whole: bool) -> int:
    """The size in bytes of the disk in the image that `fd` holds the beginning of, or all if `whole`.

    Raises XenAPIError for what must not be read, NotYet if it can't be told from the beginning. Blocks.
    """
    look: Callable[[int, bool], int] = {
        BodyFormat.QCOW2: _qcow2,
        BodyFormat.VHDX: _vhdx,
        BodyFormat.VMDK: _vmdk,
    }[name]
    size = look(fd, whole)
    if size <= 0:
        raise corrupt_image(name, f"its virtual size is {size}")
    return size


def end_unit(name: BodyFormat, fd: int) -> int | None:
    """The length of a whole file is a multiple of so many bytes, if only its tables tell how long it is.

    None of an image that is found whole without that: all blocks of a VHDX lie in it, it has its mark at its
    end, or nothing is stored in it. Blocks.
    """
    if name is BodyFormat.QCOW2:
        _, _, _, _, bits, _, _, entries, table, *_ = _QCOW2.unpack(pread_exactly(fd, _QCOW2.size, 0))
        first = pread_exactly(fd, 8 * entries, table)
        # An image that stores nothing ends with the table that says so.
        return 1 << int(bits) if any(first) or len(first) < 8 * entries else None
    if name is BodyFormat.VMDK and _VMDK.unpack(pread_exactly(fd, _VMDK.size, 0))[9] != _GD_AT_END:
        return 512
    return None


def _read(name: BodyFormat, fd: int, length: int, offset: int, *, whole: bool) -> bytes:
    data = pread_exactly(fd, length, offset)
    if len(data) < length:
        if not whole:
            raise NotYet
        raise corrupt_image(name, f"it ends before {offset + length}")
    return data


def _unsupported(name: BodyFormat, what: str) -> XenAPIError:
    return unsupported_image(name, what)


def _qcow2(fd: int, whole: bool) -> int:
    name = BodyFormat.QCOW2
    data = _read(name, fd, _QCOW2.size, 0, whole=whole)
    magic, version, backing, backing_size, bits, size, crypt, l1_size, l1, table, clusters, snapshots, _ = (
        _QCOW2.unpack(data)
    )
    if magic != _QCOW2_MAGIC:
        raise wrong_format(name, "it begins with something else")
    if version not in (2, 3):
        raise _unsupported(name, f"its version is {version}")
    if backing or backing_size:
        raise _unsupported(name, "it has a backing file")
    if crypt:
        raise _unsupported(name, "it is encrypted")
    if not 9 <= bits <= 21:
        raise corrupt_image(name, f"its clusters have 2^{bits} bytes")
    l2_entry = 8
    if version == 3:
        incompatible = _QCOW2_V3.unpack(_read(name, fd, _QCOW2_V3.size, _QCOW2.size, whole=whole))[0]
        if incompatible & _DATA_FILE:
            raise _unsupported(name, "its data is in another file")
        if incompatible & _CORRUPT:
            raise corrupt_image(name, "it says that it is corrupt")
        if incompatible & ~(_DIRTY | _COMPRESSION | _EXTENDED):
            raise _unsupported(name, f"it uses features ({incompatible:#x}) that are not known")
        l2_entry = 16 if incompatible & _EXTENDED else 8
    if size >= 1 << 63:
        raise corrupt_image(name, f"its virtual size is {size}")
    cluster = 1 << bits
    needed = -(-size // (cluster * (cluster // l2_entry)))
    if l1_size < needed or 8 * l1_size > _MOST_L1_BYTES or l1 % cluster:
        raise corrupt_image(name, f"its first table has {l1_size} entries at {l1}, {needed} are needed")
    if not clusters or clusters * cluster > _MOST_REFCOUNT_BYTES or table % cluster:
        raise corrupt_image(name, f"its table of references has {clusters} clusters at {table}")
    end = os.fstat(fd).st_size
    if whole and max(l1 + 8 * l1_size, table + clusters * cluster) > -(-end // cluster) * cluster:
        raise corrupt_image(name, "its tables lie beyond its end")
    if snapshots > _MOST_SNAPSHOTS:
        raise _unsupported(name, f"it has {snapshots} snapshots in it")
    return int(size)


def _vmdk(fd: int, whole: bool) -> int:
    name = BodyFormat.VMDK
    header = _VMDK.unpack(_read(name, fd, _VMDK.size, 0, whole=whole))
    magic, version, _, capacity, grain, place, sectors, entries, _, directory, *_ = header
    if magic != b"KDMV":
        raise wrong_format(name, "it begins with something else")
    if version not in (1, 2, 3):
        raise _unsupported(name, f"its version is {version}")
    if capacity <= 0 or capacity >= 1 << 54:
        raise _unsupported(name, "it has no disk, but names other files that do")
    if not 1 <= grain <= 4096 or grain & (grain - 1):
        raise corrupt_image(name, f"its grains have {grain} sectors")
    if not 1 <= entries <= 512:
        raise corrupt_image(name, f"its tables have {entries} entries")
    if place <= 0 or not 1 <= sectors <= 2048 or place > 1 << 20:
        raise _unsupported(name, "it has no description")
    text = _read(name, fd, 512 * sectors, 512 * place, whole=whole)
    begin = pread_exactly(fd, 21 * 512, 0)
    if b"parentFileNameHint" in text or b"parentFileNameHint" in begin:
        raise _unsupported(name, "it has a parent")
    parent = _PARENT_CID.search(text)
    if parent is not None and parent.group(1).lower() != b"ffffffff":
        raise _unsupported(name, "it has a parent")
    kind = _CREATE_TYPE.search(text)
    if kind is None or kind.group(1) not in _VMDK_TYPES:
        shown = "" if kind is None else kind.group(1)[:40].decode("ascii", "replace")
        raise _unsupported(name, f"its type is {shown!r}, not monolithicSparse or streamOptimized")
    if whole and directory == _GD_AT_END:
        _check_vmdk_footer(fd, header)
    return int(capacity * 512)


def _check_vmdk_footer(fd: int, header: "tuple[object, ...]") -> None:
    """qemu goes by the copy of the header near the end then; it has to be the same but for the directory."""
    name = BodyFormat.VMDK
    end = os.fstat(fd).st_size
    data = pread_exactly(fd, _VMDK.size, max(0, end - 1024))
    if len(data) < _VMDK.size or data[:4] != b"KDMV":
        raise corrupt_image(name, "it ends without its footer")
    footer = _VMDK.unpack(data)
    same = (0, 1, 3, 4, 7)  # magic, version, capacity, grain, entries
    if any(footer[field] != header[field] for field in same) or footer[9] == _GD_AT_END:
        raise corrupt_image(name, "its footer is that of another disk")


def _vhdx(fd: int, whole: bool) -> int:
    name = BodyFormat.VHDX
    if _read(name, fd, 8, 0, whole=whole) != b"vhdxfile":
        raise wrong_format(name, "it begins with something else")
    table = _read(name, fd, 64 << 10, _VHDX_REGIONS, whole=whole)
    signature, _, count = struct.unpack_from("<4sII", table)
    if signature != b"regi" or not 1 <= count <= 2047:
        raise corrupt_image(name, "its region table is broken")
    regions = {
        guid: (offset, length)
        for guid, offset, length, _ in (
            struct.unpack_from("<16sQII", table, 16 + 32 * index) for index in range(count)
        )
    }
    offset, length = regions.get(_VHDX_METADATA, (0, 0))
    if not 1 << 20 <= offset < 1 << 50 or not 64 << 10 <= length <= 64 << 20:
        raise corrupt_image(name, f"its metadata lies at {offset}")
    head = _read(name, fd, 64 << 10, offset, whole=whole)
    signature, _, items = struct.unpack_from("<8sHH", head)
    if signature != b"metadata" or items > 2047:
        raise corrupt_image(name, "its metadata is broken")
    found: dict[bytes, bytes] = {}
    for index in range(items):
        item, place, size = struct.unpack_from("<16sII", head, 32 + 32 * index)
        if item in (_VHDX_PARAMETERS, _VHDX_SIZE):
            if size != 8 or place + size > length:
                raise corrupt_image(name, "its metadata is broken")
            found[item] = _read(name, fd, 8, offset + place, whole=whole)
    if len(found) < 2:
        raise corrupt_image(name, "it doesn't say how large the disk is")
    block, flags = struct.unpack("<II", found[_VHDX_PARAMETERS])
    if flags & _VHDX_HAS_PARENT:
        raise _unsupported(name, "it has a parent")
    if not 1 << 20 <= block <= 256 << 20 or block & (block - 1):
        raise corrupt_image(name, f"its blocks have {block} bytes")
    if whole:
        _check_vhdx_blocks(fd, *regions.get(_VHDX_TABLE, (0, 0)), block)
    return int(struct.unpack("<Q", found[_VHDX_SIZE])[0])


def _check_vhdx_blocks(fd: int, offset: int, length: int, block: int) -> None:
    """All blocks lie in the file as a whole: qemu reads zeroes beyond its end."""
    name = BodyFormat.VHDX
    end = os.fstat(fd).st_size
    if not 1 << 20 <= offset < end or not 0 < length <= _MOST_TABLE_BYTES:
        raise corrupt_image(name, f"its block allocation table lies at {offset}")
    # Programs that enlarge a disk put a longer table at the end of the file.
    if offset + length > end:
        raise corrupt_image(name, f"it ends at {end}, within its block allocation table")
    for start in range(offset, offset + length, _TABLE_PIECE):
        piece = pread_exactly(fd, min(_TABLE_PIECE, offset + length - start), start)
        entries = array("Q", piece[: len(piece) // 8 * 8])
        if sys.byteorder == "big":
            entries.byteswap()
        for entry in entries:
            if entry & 7 >= _VHDX_PRESENT and (entry >> 20 << 20) + block > end:
                raise corrupt_image(name, "its blocks lie beyond its end")
