"""A body of which nobody knows how long it is, kept until it has ended: a new disk has a size from its begin.

It lies in a file of the SR's staging directory where runs of zeroes are holes, and is read from there like
any other body; the file goes at the end whatever happens, and after a crash the next start sweeps it. The
trap: who aborts the transfer must reach both, the body that comes and the one that is read again.
"""

import os
from typing import Final

from gateway.core.errors import XenAPIError
from gateway.images.vhd.format import MAX_VIRTUAL_SIZE
from gateway.transfers.body import Body, BodyReader
from gateway.transfers.formats import Fits
from gateway.transfers.import_foreign import Spool
from gateway.transfers.import_raw import BUFFER_BYTES, runs


def measured(reader: BodyReader, spool: Spool, fits: Fits) -> BodyReader:
    """Keep all of the body; a reader of the same bytes that knows their number. Blocks.

    `fits` is asked of each size that it reaches. Raises what it raises, BodyEnded, OSError, and what a body
    raises.
    """
    spool.open()
    buffer = bytearray(BUFFER_BYTES)
    length = stored = 0
    with memoryview(buffer) as view:
        while True:
            got = reader.fill(view)
            fits(length + got)
            if length + got > MAX_VIRTUAL_SIZE:
                # Zeroes take no space, and a few bytes that were compressed hold any number of them.
                raise XenAPIError("VDI_TOO_LARGE", "unknown", str(MAX_VIRTUAL_SIZE))
            for start, stop, is_zero in runs(buffer, got):
                if not is_zero:
                    spool.files.pwrite(spool.fd, view[start:stop], length + start)
                    stored += stop - start
            if stored > spool.most:
                raise XenAPIError("IMPORT_ERROR_IMAGE_TOO_LONG", "raw", str(spool.most))
            length += got
            if got < len(view):
                break
    reader.require_whole()
    spool.files.truncate(spool.fd, length)
    return BodyReader(_Kept(spool, reader.body, length), length)


class _Kept:
    """The kept bytes as a body."""

    def __init__(self, spool: Spool, before: Body, length: int) -> None:
        self._spool: Final = spool
        self._before: Final = before
        self._length: Final = length
        self._offset = 0

    def recv_into(self, view: memoryview) -> int:
        self._spool.check()
        count = os.preadv(self._spool.fd, [view[: self._length - self._offset]], self._offset)
        self._offset += count
        return count

    def more_within(self, _seconds: float) -> bool:
        return self._offset < self._length

    def abort(self) -> None:
        self._before.abort()
        self._spool.abort()
