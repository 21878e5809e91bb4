"""XenServer's log of the changed blocks of one VDI, `<uuid>.cbtlog`: a header, and a bit for each 64 KiB.

The form is that of blktap's cbt-util (struct cbt_log_metadata on x86-64): 16 bytes each for the uuids of the
log's parent and child, an int32 that says whether the bits are complete, four bytes of padding, the size of
the disk in bytes as a u64, then the bitmap of ceil(ceil(size / 65536) / 8) bytes.
The trap: in the file the lowest bit of a byte is its first block; in XenAPI's answer, and everywhere else
here, it is the highest.
"""

import os
import struct
import uuid as uuids
from dataclasses import dataclass, replace
from typing import Final

from gateway.images.errors import CorruptImage
from gateway.images.files import Buffer, pread_exactly
from gateway.images.vhd.image import REVERSED_BITS

CHANGE_SHIFT: Final = 16
CHANGE_SIZE: Final = 1 << CHANGE_SHIFT
"""So many bytes of the disk are one bit."""

_HEADER: Final = struct.Struct("<16s16si4xQ")
_NOBODY: Final = bytes(16)
_LARGEST: Final = 1 << 50


def bitmap_bytes(size: int) -> int:
    """The bytes that the bits of a disk of `size` bytes take."""
    return -(-size // (8 * CHANGE_SIZE))


@dataclass(frozen=True, slots=True)
class CbtHeader:
    """What a log says beside its bits. `parent` is the VDI since which they tell, `child` the next one.

    `consistent`: the bits are complete. `size` is the disk's in bytes.
    """

    parent: str | None
    child: str | None
    consistent: bool
    size: int

    def pack(self) -> bytes:
        """Return the 48 bytes of the file's beginning."""
        return _HEADER.pack(_packed(self.parent), _packed(self.child), self.consistent, self.size)

    @classmethod
    def unpack(cls, data: bytes, path: str) -> "CbtHeader":
        """Raises CorruptImage for what cannot be the beginning of a log."""
        if len(data) < _HEADER.size:
            raise CorruptImage(path, "the log of changed blocks is cut short")
        parent, child, consistent, size = _HEADER.unpack_from(data)
        if consistent not in (0, 1) or not 0 < size <= _LARGEST:
            raise CorruptImage(path, "this is not a log of changed blocks")
        return cls(_unpacked(parent), _unpacked(child), bool(consistent), size)


@dataclass(frozen=True, slots=True)
class CbtLog:
    """A whole log. `bits` has the highest bit of a byte first, and bitmap_bytes(header.size) bytes."""

    header: CbtHeader
    bits: bytes

    @classmethod
    def empty(cls, size: int, *, parent: str | None = None, child: str | None = None) -> "CbtLog":
        """A log in which nothing has changed yet, and that isn't complete."""
        return cls(CbtHeader(parent, child, consistent=False, size=size), bytes(bitmap_bytes(size)))

    def add(self, bits: Buffer) -> "CbtLog":
        """The same log with more bits; those beyond the end of the disk are left out."""
        return replace(self, bits=clipped(united(self.bits, bits), self.header.size)[: len(self.bits)])

    def resized(self, size: int) -> "CbtLog":
        """The same for a disk of another size; what is new has not changed."""
        bits = clipped(self.bits, size)[: bitmap_bytes(size)].ljust(bitmap_bytes(size), b"\0")
        return CbtLog(replace(self.header, size=size), bits)

    def with_header(
        self, *, parent: str | None, child: str | None, consistent: bool | None = None
    ) -> "CbtLog":
        """The same bits under other neighbours."""
        kept = self.header.consistent if consistent is None else consistent
        return replace(self, header=CbtHeader(parent, child, kept, self.header.size))

    def pack(self) -> tuple[bytes, bytes]:
        """Return the header and the bitmap as they follow each other in the file."""
        return self.header.pack(), self.bits.translate(REVERSED_BITS)


def read_header(path: str) -> CbtHeader:
    """Read the beginning of a log alone. Raises FileNotFoundError, OSError, CorruptImage."""
    fd = _opened(path)
    try:
        return CbtHeader.unpack(pread_exactly(fd, _HEADER.size, 0), path)
    finally:
        os.close(fd)


def read_log(path: str) -> CbtLog:
    """Read a whole log. Raises FileNotFoundError, OSError, CorruptImage."""
    fd = _opened(path)
    try:
        header = CbtHeader.unpack(pread_exactly(fd, _HEADER.size, 0), path)
        length = bitmap_bytes(header.size)
        if os.fstat(fd).st_size < _HEADER.size + length:
            raise CorruptImage(path, "the log of changed blocks is cut short")
        return CbtLog(header, pread_exactly(fd, length, _HEADER.size).translate(REVERSED_BITS))
    finally:
        os.close(fd)


def united(one: Buffer, other: Buffer) -> bytes:
    """The bits that either has; as many bytes as the longer one."""
    length = max(len(one), len(other))
    first = int.from_bytes(one, "big") << 8 * (length - len(one))
    second = int.from_bytes(other, "big") << 8 * (length - len(other))
    return (first | second).to_bytes(length, "big")


def clipped(bits: Buffer, size: int) -> bytes:
    """The same bits without those of blocks that begin at or beyond `size` bytes; as many bytes."""
    blocks = -(-size // CHANGE_SIZE)
    kept = bytearray(bits[: -(-blocks // 8)])
    if blocks % 8 and len(kept) == -(-blocks // 8):
        kept[-1] &= 0xFF00 >> blocks % 8 & 0xFF
    return bytes(kept).ljust(len(bits), b"\0")


def all_changed(size: int) -> bytes:
    """The bits of a disk of `size` bytes of which nothing is known."""
    return clipped(b"\xff" * bitmap_bytes(size), size)


def _opened(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _packed(uuid: str | None) -> bytes:
    return _NOBODY if uuid is None else uuids.UUID(uuid).bytes


def _unpacked(data: bytes) -> str | None:
    return None if data == _NOBODY else str(uuids.UUID(bytes=data))
