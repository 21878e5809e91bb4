"""The images of a backup, read from their first byte to their last, each byte once.

The gateway's qcow2 images (gateway/images/qcow2/layout.py) have their tables first, then the disk's blocks of
2 MiB in order and without gaps. So a disk can be read forward from all files of its chain at the same time,
and each file's checksum comes for nothing, also over what a later file hides.

The trap: what was read is proven right only behind the last block. Whoever takes a disk from here must be
able to throw it away until then.
"""

import os
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from itertools import compress
from typing import Final, Self

from gateway.cli.backup_directory import Generation, image_name
from gateway.cli.output import CommandError
from gateway.images.qcow2.layout import BLOCK_SIZE, CLUSTER

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")  # QEMU's docs/interop/qcow2.txt
_COPIED: Final = 1 << 63
_ENTRIES: Final = CLUSTER // 8
_PER_BLOCK: Final = BLOCK_SIZE // CLUSTER
_EMPTY: Final = array("Q", bytes(8 * _PER_BLOCK))
_PIECE_BYTES: Final = 1 << 20


class DamagedError(CommandError):
    """A file of a backup isn't what was backed up."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What an image says before its data: size of the disk in bytes, and the blocks that it has (ascending).

    `backing` is the name of the file that it stands on. The last block may be `last_bytes` long only.
    """

    virtual_size: int
    backing: str | None
    blocks: "array[int]"
    last_bytes: int


class ImageFile:
    """One image, read forward. Raises DamagedError, and OSError with the file's name."""

    def __init__(self, path: str, taken: Callable[[int], None] | None = None) -> None:
        self.path: Final = path
        self._taken = taken or (lambda _: None)
        self._sum = sha256()
        self._position = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing") from None
        status = os.fstat(self._fd)
        self.size: Final = status.st_size
        self.modified_ns: Final = status.st_mtime_ns

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def read_into(self, view: memoryview) -> None:
        """Fill it with the next bytes."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done : done + _PIECE_BYTES]], self._position)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.path) from None
            if not count:
                raise DamagedError(f"{self.path} ends at byte {self._position}: it was cut")
            self._sum.update(view[done : done + count])
            self._position += count
            done += count
            self._taken(count)

    def read(self, count: int) -> bytes:
        """The next bytes."""
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)

    def check(self, generation: Generation) -> None:
        """Read what is left, and compare the whole with what was backed up."""
        self.check_size(generation)
        buffer = bytearray(_PIECE_BYTES)
        with memoryview(buffer) as view:
            while self._position < self.size:
                self.read_into(view[: self.size - self._position])
        if self._sum.hexdigest() != generation.sha256:
            raise DamagedError(
                f"{self.path} was altered: its checksum isn't that of generation {generation.number}"
            )

    def check_size(self, generation: Generation) -> None:
        """Whether it has as many bytes as were backed up."""
        if self.size != generation.file_size:
            raise DamagedError(
                f"{self.path} has {self.size} bytes instead of the {generation.file_size}"
                f" of generation {generation.number}"
            )

    def tables(self) -> Tables:
        """Read all that is before the data; afterwards the first block comes."""
        first = self.read(CLUSTER)
        fields = _HEADER.unpack_from(first)
        magic, version, backing_at, backing_length, cluster_bits, size = fields[:6]
        crypt, l1_entries, l1_at, _, _, snapshots, _, incompatible = fields[6:14]
        expected = (b"QFI\xfb", 3, CLUSTER.bit_length() - 1, 0, 0, 0)
        if (magic, version, cluster_bits, crypt, snapshots, incompatible) != expected:
            raise self._foreign()
        if (
            l1_at % CLUSTER
            or not CLUSTER <= l1_at < self.size
            or l1_entries != -(-size // (CLUSTER * _ENTRIES))
        ):
            raise self._foreign()
        while self._position < l1_at:
            self.read(min(_PIECE_BYTES, l1_at - self._position))
        l1 = _numbers(self.read(-(-8 * l1_entries // CLUSTER) * CLUSTER or CLUSTER))
        spans = [number for number, entry in enumerate(l1) if entry]
        if [l1[span] for span in spans] != [
            (self._position + number * CLUSTER) | _COPIED for number in range(len(spans))
        ]:
            raise self._foreign()
        blocks = array("I")
        next_at = data_at = self._position + len(spans) * CLUSTER
        for span in spans:
            next_at = self._add_blocks(_numbers(self.read(CLUSTER)), span, blocks, next_at)
        if next_at != self.size or (blocks and blocks[-1] * BLOCK_SIZE >= size):
            raise self._foreign()
        last = next_at - data_at - max(0, len(blocks) - 1) * BLOCK_SIZE
        name = (
            first[backing_at : backing_at + backing_length].decode("utf-8", "replace") if backing_at else None
        )
        return Tables(size, name, blocks, last)

    def _add_blocks(self, table: "array[int]", span: int, blocks: "array[int]", next_at: int) -> int:
        """Add the blocks of one L2 table, which lie from `next_at` on; where the next one lies."""
        for entry in range(0, _ENTRIES, _PER_BLOCK):
            clusters = table[entry : entry + _PER_BLOCK]
            if clusters == _EMPTY:
                continue
            used = _PER_BLOCK if clusters[-1] else clusters.index(0)
            stop = next_at + used * CLUSTER
            there = array("Q", range(next_at | _COPIED, stop | _COPIED, CLUSTER))
            # Only behind the last block of a file there may be less than a block.
            if clusters[:used] != there or any(clusters[used:]) or (used < _PER_BLOCK and stop != self.size):
                raise self._foreign()
            blocks.append((span * _ENTRIES + entry) // _PER_BLOCK)
            next_at = stop
        return next_at

    def _foreign(self) -> DamagedError:
        return DamagedError(f"{self.path} was altered: it isn't as the gateway wrote it")


def _numbers(table: bytes) -> "array[int]":
    numbers = array("Q", table)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def check_tables(image: ImageFile, tables: Tables, size: int, base: str | None) -> None:
    """Whether an image is of a disk of `size` bytes, and stands on that of the snapshot `base` (uuid)."""
    expected = None if base is None else image_name(base)
    if tables.backing != expected:
        raise DamagedError(
            f"{image.path} stands on {tables.backing or 'nothing'}, not on {expected or 'nothing'}"
        )
    if tables.virtual_size != size:
        raise DamagedError(f"{image.path} is of a disk of {tables.virtual_size} bytes, not {size}")


def is_untouched(path: str, generation: Generation) -> bool:
    """Whether a file has the size and the time of its last change that it had when it was backed up."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (generation.file_size, generation.modified_ns)


class _Layer:
    """One image of a chain, and how far it was read."""

    def __init__(self, image: ImageFile, generation: Generation, base: str | None) -> None:
        image.check_size(generation)
        self.image = image
        self.generation = generation
        self.tables = image.tables()
        check_tables(image, self.tables, generation.virtual_size, base)
        self._next = 0

    def read_block(self, number: int, view: memoryview) -> None:
        """Read the block over what is there, if this image has it."""
        blocks = self.tables.blocks
        if self._next < len(blocks) and blocks[self._next] == number:
            self._next += 1
            whole = self._next < len(blocks)
            self.image.read_into(view if whole else view[: self.tables.last_bytes])


class BackedUpChain:
    """The disk of the last of these generations. `size` in bytes; `blocks` are all that any of them has.

    The files stay open, so it can be read while they are removed. Raises DamagedError, OSError.
    """

    def __init__(
        self, directory: str, chain: Sequence[Generation], taken: Callable[[int], None] | None = None
    ) -> None:
        self.size: Final = chain[-1].virtual_size
        self._files = ExitStack()
        self._layers: list[_Layer] = []
        try:
            base: str | None = None
            for generation in chain:
                image = ImageFile(os.path.join(directory, generation.file), taken)
                self._files.enter_context(image)
                self._layers.append(_Layer(image, generation, base))
                base = generation.snapshot
        except BaseException:
            self._files.close()
            raise
        used = bytearray(-(-self.size // BLOCK_SIZE))
        for layer in self._layers:
            for number in layer.tables.blocks:
                used[number] = 1
        self.blocks: Final = array("I", compress(range(len(used)), used))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self) -> Iterator[tuple[int, bytearray]]:
        """Yield each block's number and bytes, in one buffer for all of them.

        Ends only if every file turned out to be what was backed up.
        """
        buffer = bytearray(BLOCK_SIZE)
        zeroes = bytes(BLOCK_SIZE)
        with memoryview(buffer) as view:
            for number in self.blocks:
                view[:] = zeroes
                for layer in self._layers:
                    layer.read_block(number, view)
                yield number, buffer
        for layer in self._layers:
            layer.image.check(layer.generation)
