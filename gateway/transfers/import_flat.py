"""A body that is the bytes of a disk, perhaps with the footer of a fixed VHD behind them.

Only the last sector tells a fixed VHD from a raw disk, so it is held back until the body has ended. The trap:
a body without a length may have been cut off; it counts as whole if the protocol told its end, if it has a
footer that fits it, or if it fills the disk.
"""

from dataclasses import dataclass, field
from typing import Final

from gateway.core.errors import XenAPIError
from gateway.images.disk import Disk
from gateway.images.errors import CorruptImage, ImageError
from gateway.images.files import FILES, FileCalls
from gateway.images.vhd.format import BLOCK_SIZE, FOOTER_SIZE, SECTOR, DiskType, Footer
from gateway.transfers.body import BodyEnded, BodyReader
from gateway.transfers.formats import BodyFormat, Fits, corrupt_image, wrong_format
from gateway.transfers.import_raw import BUFFER_BYTES, WRITEBACK_BYTES, start_writeback, store

_COOKIE: Final = b"conectix"


def begin_flat(
    reader: BodyReader, fits: Fits, *, room: int | None, wanted: BodyFormat, is_new: bool
) -> "FlatDisk":
    """Judge by the length. `room` is the size of the disk if that is known. Blocks.

    `wanted` is RAW, VHD (a fixed one) or AUTO (either). `is_new` says that the disk gets the size that it
    needs, at least `room`. Raises XenAPIError, BodyEnded and what a body raises.
    """
    length = reader.length
    if length is None:
        if room is None:
            raise XenAPIError("IMPORT_ERROR_SIZE_REQUIRED")
        held = 0 if wanted is BodyFormat.RAW else FOOTER_SIZE
        return FlatDisk(reader, room, held, fits, must_be_vhd=wanted is BodyFormat.VHD)
    held = _held_back(length, wanted)
    # A raw disk that is one sector longer than the sizes of VHDs are is less likely than a fixed VHD.
    must_be_vhd = wanted is BodyFormat.VHD or (is_new and held > 0 and (length - held) % BLOCK_SIZE == 0)
    fits(length - held)
    if is_new and not must_be_vhd:
        fits(length)
    size = max(length - held if must_be_vhd or not is_new else length, room or 0)
    return FlatDisk(reader, size, held, fits, must_be_vhd=must_be_vhd)


def _held_back(length: int, wanted: BodyFormat) -> int:
    """So many bytes at the end may be a footer."""
    if wanted is BodyFormat.VHD:
        # Old programs wrote 511 bytes.
        held = FOOTER_SIZE - 1 if length % SECTOR == FOOTER_SIZE - 1 else FOOTER_SIZE
        if length <= held:
            raise BodyEnded(SECTOR + held, length)
        if (length - held) % SECTOR:
            raise wrong_format(
                "vhd", "there is no footer at its beginning, and a fixed VHD has whole sectors"
            )
        return held
    if wanted is BodyFormat.AUTO and length > FOOTER_SIZE and not length % SECTOR:
        return FOOTER_SIZE
    return 0


@dataclass(slots=True)
class FlatDisk:
    """The bytes of a disk; the last `held` of them may be a footer, or have to be one."""

    reader: BodyReader
    virtual_size: int
    held: int
    fits: Fits
    must_be_vhd: bool
    patches: bool = field(default=False, init=False)

    def fraction(self) -> float:
        """How far it is, from 0.0 to 1.0."""
        return self.reader.fraction(self.reader.length or self.virtual_size)

    def receive(self, disk: Disk, *, files: FileCalls = FILES) -> None:
        """Write the disk to `disk`, which reads as zeroes all over. Blocks.

        Raises XenAPIError, BodyEnded, OSError and what a body raises.
        """
        reader = self.reader
        if reader.length is None:
            count, tail = self._receive_to_end(disk)
        else:
            count = reader.length - self.held
            _receive_counted(reader, disk, count, files)
            tail = reader.read(self.held)
        if self._is_vhd(count, tail):
            return
        total = count + len(tail)
        if total > disk.size:
            raise self._too_much(disk)
        if tail:
            disk.pwrite(tail, count)
        if reader.end_is_told:
            reader.require_whole()
        if reader.length is None and not reader.end_is_told and total < disk.size:
            raise XenAPIError("IMPORT_ERROR_LENGTH_REQUIRED", str(disk.size), str(total))

    def _receive_to_end(self, disk: Disk) -> tuple[int, bytes]:
        """Write what comes but for the bytes to be held back: how many were written, and those."""
        buffer = bytearray(BUFFER_BYTES)
        offset = ahead = 0
        with memoryview(buffer) as view:
            while True:
                # One byte more than can be right is asked for, so that it is missed if it comes.
                wanted = min(len(buffer) - ahead, disk.size + self.held + 1 - offset - ahead)
                if wanted <= 0:
                    raise self._too_much(disk)
                got = self.reader.fill(view[ahead : ahead + wanted])
                filled = ahead + got
                written = max(0, filled - self.held)
                if offset + written > disk.size:
                    raise self._too_much(disk)
                store(disk, buffer, view, written, offset, fresh=True)
                offset += written
                tail = bytes(view[written:filled])
                if got < wanted:
                    return offset, tail
                ahead = len(tail)
                view[:ahead] = tail

    def _too_much(self, disk: Disk) -> XenAPIError:
        self.fits(disk.size + 1)
        return XenAPIError("VDI_TOO_SMALL", "", str(disk.size))

    def _is_vhd(self, count: int, tail: bytes) -> bool:
        """Whether `tail` is the footer of a fixed disk of `count` bytes. Raises XenAPIError if it must be."""
        try:
            if tail.startswith(_COOKIE):
                footer = Footer.unpack(tail, "vhd")
                if footer.disk_type is not DiskType.FIXED:
                    raise CorruptImage("vhd", "its beginning is missing")
                if footer.current_size != count:
                    said = f"of a disk of {footer.current_size} bytes {count} came"
                    raise CorruptImage("vhd", said)
                return True
        except ImageError as error:
            if self.must_be_vhd:
                raise corrupt_image("vhd", error.problem) from error
        if self.must_be_vhd:
            raise wrong_format("vhd", "there is a footer neither at its beginning nor at its end")
        return False


def _receive_counted(reader: BodyReader, disk: Disk, count: int, files: FileCalls) -> None:
    buffer = bytearray(min(BUFFER_BYTES, count))
    written_back = 0
    with memoryview(buffer) as view:
        for offset in range(0, count, BUFFER_BYTES):
            filled = min(BUFFER_BYTES, count - offset)
            reader.fill_whole(view[:filled])
            store(disk, buffer, view, filled, offset, fresh=True)
            if offset + filled - written_back >= WRITEBACK_BYTES:
                start_writeback(disk, written_back, offset + filled - written_back, files)
                written_back = offset + filled
