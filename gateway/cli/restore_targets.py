"""Where a restored disk goes: into the gateway as one upload, or into a file or block device.

Both take the blocks as they are read, and neither is done before the last file's checksum was right: of an
upload the end is held back until then, a file gets its name only afterwards.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gateway.cli.backup_directory import Generation
from gateway.cli.backup_image import BackedUpChain, DamagedError
from gateway.cli.connection import Connection
from gateway.cli.export_target import ExportTarget, open_target
from gateway.cli.output import CommandError, UsageError
from gateway.cli.progress import Display, Transfer
from gateway.cli.upload import Source, Upload, upload
from gateway.images.disk import Literal
from gateway.images.qcow2.layout import BLOCK_SIZE
from gateway.images.vhd.layout import BLOCK_PREFIX, vhd_frame

_NOT_RAW: Final = (".vhd", ".qcow2", ".vmdk", ".vhdx")


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a gateway: the query that names it, and what people call it. `is_new`: a disk is made."""

    query: str
    what: str
    is_new: bool


def restore_to_gateway(
    connection: Connection, chain: BackedUpChain, place: Place, display: Display, transfer: Transfer
) -> str | None:
    """Send the disk as a dynamic VHD; the uuid of the VDI if a new one is made.

    Raises CommandError; then nothing was changed.
    """
    head, footer = vhd_frame(chain.size, chain.blocks, uuid.uuid4())
    size = sum(part.length for part in head) + len(chain.blocks) * (len(BLOCK_PREFIX) + BLOCK_SIZE)
    size += footer.length

    def pieces() -> Iterator[bytes | memoryview]:
        for part in head:
            if isinstance(part, Literal):
                yield part.data
            else:
                yield from map(part.make, range(-(-part.length // part.piece)))
        for _, block in chain.read():
            yield BLOCK_PREFIX
            yield memoryview(block)
        # The gateway takes nothing without it, and all files have been found right by now.
        yield footer.data

    source = Source(-1, "the backup", size, 0, seekable=False, pieces=pieces)
    sent = Upload(source, size, "vhd", place.query, place.what, is_new=place.is_new)
    try:
        return upload(connection, sent, display, transfer)
    except DamagedError as damaged:
        raise CommandError(f"{damaged}; nothing was changed") from None


def restore_to_file(
    chain: BackedUpChain, name: str, newest: Generation, transfer: Transfer, *, force: bool
) -> None:
    """Write the disk to a file, a block device, or stdout. Raises CommandError; then there is no file."""
    if os.path.splitext(name)[1].lower() in _NOT_RAW:
        raise UsageError(f"{name} would be a raw disk; give another name, and convert it with qemu-img")
    try:
        target = open_target(name, newest.snapshot, force=force)
    except OSError as error:
        raise CommandError(f"{error.filename or name}: {error.strerror}") from None
    with contextlib.closing(target):
        try:
            _write(chain, target, newest, transfer)
            target.finish()
        except KeyboardInterrupt:
            target.drop()
            raise
        except CommandError as error:
            raise CommandError(f"{error}{target.drop()}") from None
        except OSError as error:
            said = error.strerror or str(error)
            raise CommandError(f"{error.filename or target.name}: {said}{target.drop()}") from None


def _write(chain: BackedUpChain, target: ExportTarget, newest: Generation, transfer: Transfer) -> None:
    target.begin(newest.snapshot, newest.sha256, chain.size)
    transfer.begin(0, chain.size)
    for number, block in chain.read():
        start = number * BLOCK_SIZE
        target.zeroes(start - target.offset)
        target.write(block, min(BLOCK_SIZE, chain.size - start))
        transfer.logical, transfer.physical = target.offset, target.physical
    target.zeroes(chain.size - target.offset)
    transfer.logical = target.offset
