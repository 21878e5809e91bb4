"""A revert gives a VDI other bytes under its old name: nobody gets them under the old content id."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from gateway.core.database import DatabaseFailed
from gateway.images.files import FileCalls, FileIdentity
from gateway.repository.inventory import Inventory
from gateway.transfers.publications import Publications
from tests.repository.conftest import OpenInventory
from tests.repository.vdis import content, make, root_of, write


class FailingToSync(FileCalls):
    """The directory of an SR can't be synced once its VDI `renamed` has been renamed."""

    def __init__(self) -> None:
        self.renamed = ""
        self._failing = False

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self._failing = self._failing or (bool(self.renamed) and self.renamed in target)

    def sync_directory(self, path: str) -> None:
        if self._failing:
            self._failing = False
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        super().sync_directory(path)


async def test_a_revert_that_cannot_be_made_durable_has_another_content_id(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = FailingToSync()
    async with open_inventory(files=files) as inventory:
        _, ref = await make(inventory, tmp_path)
        taken = await inventory.vdi_snapshot(ref)
        expected = content(inventory, taken)
        await write(inventory, ref, b"\x22" * 8192)
        await inventory.vdi_changed(ref)
        before = inventory.records.vdis.get(ref)
        files.renamed = before.uuid
        with pytest.raises(OSError, match="Input/output error"):
            await inventory.vdi_revert(taken)
        assert content(inventory, ref) == expected
        assert inventory.records.vdis.get(ref).content_id != before.content_id


async def test_a_revert_that_cannot_be_written_down_has_another_content_id(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    expected = content(inventory, taken)
    await write(inventory, ref, b"\x22" * 8192)
    await inventory.vdi_changed(ref)
    before = inventory.records.vdis.get(ref)
    table = inventory.records.vdis

    async def no_space(_work: object) -> None:
        raise DatabaseFailed("(database or disk is full)")

    @contextmanager
    def failing(_vdi: str, _replaced: FileIdentity) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(table._database, "run", no_space)
            yield

    with pytest.raises(DatabaseFailed, match="disk is full"):
        await inventory.vdi_revert(taken, publishing=failing)
    assert content(inventory, ref) == expected
    assert table.get(ref).content_id != before.content_id


async def test_who_opens_a_reverted_disk_waits_for_its_content_id(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x22" * 8192)
    await inventory.vdi_changed(ref)
    before = inventory.records.vdis.get(ref)
    path = root_of(inventory, sr) / f"{before.uuid}.vhd"
    replaced = path.stat().st_ino
    publications = Publications()
    publish = inventory.repository(sr).restructure
    waited: list[bool] = []

    async def published(*arguments: object) -> None:
        await publish(*arguments)  # type: ignore[arg-type]
        opened = path.stat()
        if opened.st_ino == replaced:
            return
        assert inventory.records.vdis.get(ref).content_id == before.content_id
        with trio.move_on_after(0) as waiting:
            await publications.settled(ref, FileIdentity(opened.st_dev, opened.st_ino))
        waited.append(waiting.cancelled_caught)

    monkeypatch.setattr(inventory.repository(sr), "restructure", published)
    await inventory.vdi_revert(taken, publishing=publications.publishing)
    assert waited == [True]
    assert inventory.records.vdis.get(ref).content_id != before.content_id
    with trio.fail_after(5):
        await publications.settled(ref, FileIdentity(0, 0))
