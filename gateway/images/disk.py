"""The one interface of a virtual disk, whatever holds its bytes.

A `Disk` blocks and may be used by several threads at once. Offsets and lengths are bytes; requests beyond
the disk raise ValueError, failures of the machine OSError, a broken image CorruptImage. Nothing here knows
a format.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

from gateway.images.files import Buffer


class ExtentKind(Enum):
    """What a range of a disk is made of."""

    DATA = "data"
    ZERO = "zero"  # stored (it hides what a parent has), and reads as zeroes
    HOLE = "hole"  # not stored anywhere; reads as zeroes


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of the virtual disk, in bytes, and what it is made of."""

    offset: int
    length: int
    kind: ExtentKind


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes that lie in an open file."""

    fd: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Hole:
    """Zeroes that lie nowhere."""

    length: int


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes made on the spot."""

    data: bytes

    @property
    def length(self) -> int:
        """Return the number of bytes."""
        return len(self.data)


Segment: TypeAlias = FileRange | Hole | Literal

# Fills a buffer from an offset; unlike `pread_into` it takes the caller's word that the range is on the disk.
Reader: TypeAlias = Callable[[bytearray | memoryview, int], None]


class Disk(Protocol):
    """A virtual disk over open files, which it owns."""

    @property
    def size(self) -> int:
        """Return the virtual size in bytes."""
        ...

    @property
    def read_only(self) -> bool:
        """Return whether writing is refused."""
        ...

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        """Fill `buf` with the bytes at `offset`."""
        ...

    def pwrite(self, buf: Buffer, offset: int) -> None:
        """Write `buf` at `offset`. Durable only after `flush`."""
        ...

    def zero(self, offset: int, length: int, *, trim: bool) -> None:
        """Make a range read as zeroes; with `trim` its space may be given back, without it stays reserved."""
        ...

    def flush(self) -> None:
        """Make every completed write durable."""
        ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what the range is made of, in order and without gaps; neighbours differ in kind."""
        ...

    def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        """Yield where the bytes of the range lie, in order and without gaps.

        A FileRange is good until the disk is closed or written to.
        """
        ...

    def close(self) -> None:
        """Flush what was written and close the files. Closing twice is allowed."""
        ...


class FileDisk(Disk, Protocol):
    """A disk over open files, for doors that are asked for small pieces 100,000 times a second."""

    def reader(self, *, nowait: bool = False) -> Reader:
        """Return the fastest way to read, good until the disk is closed.

        With `nowait` it never waits for storage: BlockingIOError when the bytes are not all in memory, or
        where they lie isn't known yet; what the buffer has then is of no use. OSError EOPNOTSUPP where the
        file system can't tell.
        """
        ...


def check_range(offset: int, length: int, size: int) -> None:
    """Raise ValueError unless [offset, offset + length) lies on a disk of `size` bytes."""
    if offset < 0 or length < 0 or offset + length > size:
        raise ValueError(f"{length} bytes at {offset} are not on a disk of {size} bytes")


def check_writable(read_only: bool) -> None:
    """Raise PermissionError when a disk was opened for reading only."""
    if read_only:
        raise PermissionError("the disk is open for reading only")


def merge_extents(parts: Iterator[tuple[int, int, ExtentKind]]) -> Iterator[Extent]:
    """Join neighbours of one kind. `parts` are (offset, length, kind), in order and without gaps."""
    begin = size = 0
    current: ExtentKind | None = None
    for offset, length, kind in parts:
        if kind is current:
            size += length
            continue
        if current is not None:
            yield Extent(begin, size, current)
        begin, size, current = offset, length, kind
    if current is not None:
        yield Extent(begin, size, current)
