"""What an import kept on its way and can't remove says nothing of how the import ended."""

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.task import Operation
from gateway.images.files import FileCalls
from gateway.repository.inventory import Inventory
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_disk import IntoSR, Sent, fill_target
from tests.repository.conftest import OpenInventory
from tests.transfers.pulling import MIB, House, image, require_same
from tests.transfers.test_import_raw import Pieces


class KeepsImports(FileCalls):
    """No file that an import keeps can be removed."""

    def unlink(self, path: str) -> None:
        if os.path.basename(path).startswith("import."):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        super().unlink(path)


@pytest.fixture
async def broken(open_inventory: OpenInventory, tmp_path: Path) -> AsyncIterator[House]:
    async with open_inventory(files=KeepsImports()) as inventory:
        sr = await inventory.sr_create("broken", str(tmp_path / "broken"))
        yield House(inventory, sr, tmp_path / "broken")


async def imported(inventory: Inventory, sr: str, body: bytes) -> str:
    sent = Sent(Pieces(body, iter(lambda: MIB, None)), BodyFormat.AUTO, len(body))
    target = IntoSR(inventory, sr, "the test", "OpaqueRef:task")
    operation = Operation("OpaqueRef:task", None)
    return await fill_target(operation, sent=sent, target=target, spool_bytes=64 * MIB)


@pytest.mark.parametrize("form", ["qcow2", "vhdx", "vhd"])
async def test_a_disk_that_is_there_is_no_failure(broken: House, files: Path, form: str) -> None:
    ref = await imported(broken.inventory, broken.sr, image(files, form))
    require_same(broken, broken.inventory.records.vdis.get(ref), files)


@pytest.mark.parametrize("form", ["qcow2", "vhdx"])
async def test_a_failure_keeps_its_reason(broken: House, files: Path, form: str) -> None:
    body = image(files, form)
    with pytest.raises(XenAPIError) as failed:
        await imported(broken.inventory, broken.sr, body[: len(body) // 2])
    assert failed.value.code == "IMPORT_ERROR_CORRUPT_IMAGE"
    assert not broken.inventory.records.vdis_of_sr(broken.sr)
