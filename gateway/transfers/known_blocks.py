"""Which blocks chains have, kept from one request to the next: clients read images in many small ranges.

What was found is used again only for the same content in the same files, none of which has been touched since
by their status: a hole in a raw image changes no content, but the blocks. Who asks holds a lease for reading.
The numbers of the blocks of a full 2 TiB take 4 MiB, those that are kept `MOST_BYTES` at most.

The trap: a merge changes files under a content id that stays. Which blocks are in any of them stays, too.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from gateway.images.allocation import stored_blocks

if TYPE_CHECKING:
    from array import array

    from gateway.images.chain import ChainFiles

MOST_BYTES: Final = 8 << 20
# Small disks cost next to nothing.
_MOST_CHAINS: Final = 64


@dataclass(frozen=True, slots=True)
class Blocks:
    """The numbers of blocks of 2 MiB, ascending, and a digest of them."""

    numbers: "array[int]"
    digest: str

    @classmethod
    def of(cls, numbers: "array[int]") -> "Blocks":
        """With the digest."""
        return cls(numbers, sha256(numbers).hexdigest())

    @property
    def length(self) -> int:
        """Bytes of memory."""
        return self.numbers.itemsize * len(self.numbers)


class KnownBlocks:
    """The blocks of those chains that were asked for last. For any number of threads."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes: Final = most_bytes
        self._lock: Final = threading.Lock()
        self._known: OrderedDict[tuple[object, ...], Blocks] = OrderedDict()
        self._bytes = 0

    def stored(self, content_id: str, chain: "ChainFiles") -> Blocks:
        """The blocks that any file of a leased chain with this content has. Blocks. ImageError, OSError."""
        key = (content_id, *(_stamp(node.fd) for node in chain.nodes))
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known
        found = Blocks.of(stored_blocks(chain))
        with self._lock:
            if found.length <= self._most_bytes and key not in self._known:
                self._known[key] = found
                self._bytes += found.length
                while self._bytes > self._most_bytes or len(self._known) > _MOST_CHAINS:
                    _, dropped = self._known.popitem(last=False)
                    self._bytes -= dropped.length
        return found


def _stamp(fd: int) -> tuple[int, ...]:
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
