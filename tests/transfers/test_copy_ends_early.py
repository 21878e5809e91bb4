"""A copy that is cancelled, or whose SR fills up: nothing of it is left, unless it was being published."""

import errno
import os
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF
from gateway.core.task import Operation
from gateway.images.files import Buffer, FileCalls
from gateway.repository.inventory import Inventory
from tests.repository.conftest import OpenInventory
from tests.repository.vdis import make, root_of
from tests.repository.vdis import replace as import_into
from tests.transfers.copying import MIB, Held, copy, filled, foreign_reads, names


@pytest.mark.parametrize("place", ["new", "into"])
async def test_a_cancelled_copy_stops_at_the_next_piece_and_leaves_nothing(
    open_inventory: OpenInventory, tmp_path: Path, place: str
) -> None:
    with trio.CancelScope() as scope:
        files = Held(1000, lambda: trio.from_thread.run_sync(scope.cancel))
        async with open_inventory(files=files) as inventory:
            with trio.CancelScope(shield=True):
                sr, ref = await filled(inventory, tmp_path)
                into = (
                    NULL_REF if place == "new" else await inventory.vdi_create(sr=sr, virtual_size=16 * MIB)
                )
                before, records = names(root_of(inventory, sr)), inventory.records.vdis_of_sr(sr)
                operation = Operation("OpaqueRef:task", None)
                files.number, files.writes = 3, 0
            try:
                await copy(inventory, ref, sr, into, operation=operation)
            finally:
                with trio.CancelScope(shield=True):
                    assert files.writes == 3
                    assert 0.05 < operation.current_progress() < 0.5
                    assert names(root_of(inventory, sr)) == before
                    assert inventory.records.vdis_of_sr(sr) == records
                    assert inventory.leases.holders_for(ref) == ()
                    await inventory.sr_scan(sr)
                    assert inventory.records.vdis_of_sr(sr) == records
    assert scope.cancelled_caught


async def test_a_commit_that_begins_is_not_cancelled(open_inventory: OpenInventory, tmp_path: Path) -> None:
    class CancelledAtTheRename(FileCalls):
        scope: trio.CancelScope | None = None

        def rename(self, source: str, target: str) -> None:
            if self.scope is not None and target.endswith(".vhd"):
                trio.from_thread.run_sync(self.scope.cancel)
            super().rename(source, target)

    files = CancelledAtTheRename()
    async with open_inventory(files=files) as inventory:
        sr, ref = await make(inventory, tmp_path)
        await inventory._copies.write(sr)
        with trio.CancelScope() as files.scope:
            made = await copy(inventory, ref, sr)
        files.scope = None
        assert inventory.records.vdis.get(made.ref) == made
        assert foreign_reads(inventory, made) == foreign_reads(inventory, ref)


class Full(FileCalls):
    """Is full from the n-th of the calls on that take space or names, until there is room again."""

    def __init__(self) -> None:
        self.left = -1

    def _count(self) -> None:
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_CREAT:
            self._count()
        return super().open(path, flags, mode)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        self._count()
        super().pwrite(fd, data, offset)

    def sync(self, fd: int) -> None:
        self._count()
        super().sync(fd)

    def datasync(self, fd: int) -> None:
        self._count()
        super().datasync(fd)

    def rename(self, source: str, target: str) -> None:
        self._count()
        super().rename(source, target)

    def sync_directory(self, path: str) -> None:
        self._count()
        super().sync_directory(path)


@pytest.mark.parametrize("source_format", ["vhd", "raw"])
@pytest.mark.parametrize("place", ["new", "into"])
async def test_on_a_full_sr_nothing_is_left_behind_whenever_the_space_ends(
    open_inventory: OpenInventory, tmp_path: Path, place: str, source_format: str
) -> None:
    files = Full()
    async with open_inventory(files=files) as inventory:
        sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
        sm_config = {"type": source_format}
        ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, sm_config=sm_config)
        await import_into(inventory, ref, b"\x5a" * 3 * MIB)
        into = NULL_REF
        if place == "into":
            into = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, sm_config=sm_config)
        before, records = names(root_of(inventory, sr)), inventory.records.vdis_of_sr(sr)
        number = 0
        while True:
            # The copy of the records must not take the failure.
            await inventory._copies.write(sr)
            files.left = number
            try:
                made = await copy(inventory, ref, sr, into)
            except XenAPIError as error:
                assert error.code == "SR_FULL"
                files.left = -1
            else:
                files.left = -1
                break
            assert names(root_of(inventory, sr)) == before
            after = inventory.records.vdis_of_sr(sr)
            if after != records:
                # The rename over the target's image was done, but its durability isn't known.
                assert place == "into"
                break
            if place == "into":
                assert not any(foreign_reads(inventory, into))
            number += 1
        assert number > 5
        if after == records:
            assert foreign_reads(inventory, made) == foreign_reads(inventory, ref)


async def test_a_file_system_that_fills_up_is_as_free_as_before(
    small_file_system: Path, inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    small = await inventory.sr_create("small", str(small_file_system / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=64 * MIB)
    await import_into(inventory, ref, b"\x5a" * 60 * MIB)
    await inventory._copies.write(small)
    before = await inventory.repository(small).space()
    with pytest.raises(XenAPIError) as refused:
        await copy(inventory, ref, small)
    assert refused.value.error_info[:2] == ["SR_FULL", str(64 * MIB)]
    assert names(root_of(inventory, small)) == set()
    assert await inventory.repository(small).space() == before
    assert [vdi.ref for vdi in inventory.records.vdis.all()] == [ref]
