"""What the storage says while a disk is filled becomes the error that a client is told."""

import errno
import os
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.task import Operation
from gateway.images.files import Buffer, FileCalls
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_disk import IntoSR, Sent, fill_target
from tests.repository.conftest import OpenInventory
from tests.transfers.copying import MIB, copy, filled
from tests.transfers.test_import_raw import Pieces


class Fails(FileCalls):
    """Fails to write the bytes of a disk, once `number` is set."""

    number = 0

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        if self.number and len(data) >= MIB // 16:
            raise OSError(self.number, os.strerror(self.number))
        super().pwrite(fd, data, offset)


@pytest.mark.parametrize("way", ["copied", "imported"])
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "SR_FULL"),
        (errno.EDQUOT, "SR_FULL"),
        (errno.EFBIG, "VDI_TOO_LARGE"),
        (errno.EIO, "VDI_IO_ERROR"),
    ],
)
async def test_what_keeps_a_disk_from_being_stored_is_told(
    open_inventory: OpenInventory, tmp_path: Path, way: str, number: int, told: str
) -> None:
    files = Fails()
    async with open_inventory(files=files) as inventory:
        sr, ref = await filled(inventory, tmp_path)
        files.number = number
        with pytest.raises((XenAPIError, OSError)) as failed:
            if way == "copied":
                await copy(inventory, ref, sr)
            else:
                body = b"x" * MIB
                sent = Sent(Pieces(body, iter(lambda: MIB, None)), BodyFormat.RAW, len(body))
                target = IntoSR(inventory, sr, "the test", "OpaqueRef:task")
                await fill_target(
                    Operation("OpaqueRef:task", None), sent=sent, target=target, spool_bytes=MIB
                )
        assert as_xenapi_error(failed.value).code == told
