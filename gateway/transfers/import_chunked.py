"""The chunked body of XenServer's hosts (not HTTP's): pieces of a disk, each behind its place.

    offset  u64, little-endian   where the piece belongs on the disk, in bytes
    length  u32, little-endian   its length in bytes, below 2 GiB
    the bytes of the piece

twelve zero bytes at the end. Pieces come in any order and may overlap; the later one counts. What no piece
names stays as it was. A piece without bytes elsewhere than at 0 says nothing. Source: xapi's vhd-tool,
chunked.ml. The trap: there is no size and no checksum, so the end mark alone tells that nothing is missing.
"""

import struct
from dataclasses import dataclass, field
from typing import Final

from gateway.images.disk import Disk
from gateway.images.files import FILES, FileCalls
from gateway.transfers.body import BodyReader
from gateway.transfers.formats import Fits, corrupt_image
from gateway.transfers.import_raw import BUFFER_BYTES, WRITEBACK_BYTES, start_writeback, store

_HEAD: Final = struct.Struct("<QI")
_LENGTHS: Final = 1 << 31


@dataclass(slots=True)
class ChunkedDisk:
    """Pieces for a disk of `virtual_size` bytes."""

    reader: BodyReader
    virtual_size: int
    fits: Fits
    patches: bool = field(default=True, init=False)

    def fraction(self) -> float:
        """How far it is, from 0.0 to 1.0; always 0.0 without a length."""
        return self.reader.fraction(self.reader.length or 0)

    def receive(self, disk: Disk, *, files: FileCalls = FILES) -> None:
        """Write all pieces to `disk`. Blocks.

        Raises VDI_TOO_SMALL for a piece beyond the disk, IMPORT_ERROR_CORRUPT_IMAGE, BodyEnded, OSError and
        what a body raises.
        """
        reader = self.reader
        buffer = bytearray(BUFFER_BYTES)
        with memoryview(buffer) as view:
            while True:
                offset, length = _HEAD.unpack(reader.read(_HEAD.size))
                if not length:
                    if not offset:
                        return
                    continue
                if length >= _LENGTHS:
                    raise corrupt_image("chunked", f"the piece at {offset} is said to have {length} bytes")
                self.fits(offset + length)
                for done in range(0, length, len(buffer)):
                    count = min(len(buffer), length - done)
                    reader.fill_whole(view[:count])
                    store(disk, buffer, view, count, offset + done, fresh=False)
                if length >= WRITEBACK_BYTES:
                    start_writeback(disk, offset, length, files)
