"""What makes a VDI and fails at any of its steps leaves none behind, and no disk reads otherwise."""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from gateway.core.database import DatabaseFailed
from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, Leases
from gateway.core.records import VDI
from gateway.core.refs import new_ref, new_uuid
from gateway.repository.inventory import Inventory
from gateway.repository.repository import Repository
from gateway.repository.scan import ScannedImage, Scanner
from tests.repository.chains import Chains, H, L, Q, image
from tests.repository.conftest import SR_UUID, OpenInventory
from tests.repository.failing_once import FailingOnce
from tests.repository.tracked import marked
from tests.repository.vdis import MIB, content, root_of, write


@pytest.mark.parametrize("what", ["clone", "tracked snapshot"])
async def test_what_fails_anywhere_leaves_no_vdi(
    open_inventory: OpenInventory, tmp_path: Path, what: str
) -> None:
    files = FailingOnce()
    failures = 0
    async with open_inventory(files=files) as inventory:
        for number in itertools.count():
            sr = await inventory.sr_create("sr", str(tmp_path / f"sr{number}"))
            ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, name_label="disk")
            await write(inventory, ref, b"\x11" * 4096)
            first: list[str] = []
            if what == "tracked snapshot":
                await inventory.vdi_enable_cbt(ref)
                first = [await inventory.vdi_snapshot(ref)]
                await write(inventory, ref, b"\x22" * 4096, 2 * MIB)
            expected = content(inventory, ref)
            files.left = number
            try:
                await (inventory.vdi_clone if what == "clone" else inventory.vdi_snapshot)(ref)
                failed = False
            except (XenAPIError, OSError):
                failed = True
            done, files.left = files.left >= 0, float("inf")
            await inventory.sr_scan(sr)
            made = [
                vdi
                for vdi in inventory.records.vdis_of_sr(sr)
                if vdi.managed and vdi.ref not in (ref, *first)
            ]
            assert [vdi.name_label for vdi in made] == ([] if failed else ["disk"]), number
            for vdi in (inventory.records.vdis.get(ref), *made):
                assert content(inventory, vdi.ref) == expected, number
            for since in first:
                assert marked(await inventory.vdi_list_changed_blocks(since, ref)) == {2 * MIB >> 16}, number
            assert len([*root_of(inventory, sr).glob("*.cbtlog")]) == (2 + len(made) if first else 0)
            assert os.listdir(inventory.repository(sr).directory.staging) == [], number
            failures += failed
            if done:
                break
    assert failures > 20


@pytest.mark.parametrize("what", ["create", "fill", "clone", "snapshot"])
async def test_where_the_database_is_full_a_vdi_is_made_or_a_failure_is_told(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = inventory.records.vdis._database.run
    left = 0

    async def full_once(work: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            raise DatabaseFailed("(database or disk is full)")
        return await run(work)

    ended = set()
    for number in itertools.count():
        sr = await inventory.sr_create("sr", str(tmp_path / f"sr{number}"))
        ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, name_label="disk")
        await write(inventory, ref, b"\x11" * 4096)
        left = number
        with monkeypatch.context() as patch:
            patch.setattr(inventory.records.vdis._database, "run", full_once)
            try:
                await make_one(inventory, what, ref)
                failed = False
            except DatabaseFailed:
                failed = True
        if left >= 0:
            break
        ended.add(failed)
        await inventory.sr_scan(sr)
        managed = [vdi.name_label for vdi in inventory.records.vdis_of_sr(sr) if vdi.managed]
        assert managed == ["disk"] * (1 if failed else 2), number
        assert content(inventory, ref).startswith(b"\x11" * 4096), number
        service = set(os.listdir(inventory.repository(sr).directory.service))
        assert service <= {"sr.json", "staging", "owner", "records.json", "records.json.new"}, number
    assert ended == {True, False}


async def make_one(inventory: Inventory, what: str, ref: str) -> None:
    """Make a VDI called "disk", as another is."""
    sr = inventory.records.vdis.get(ref).sr
    match what:
        case "create":
            await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, name_label="disk")
        case "fill":
            new = VDI(ref=new_ref(), uuid=new_uuid(), sr=sr, virtual_size=4 * MIB, name_label="disk")
            async with inventory.vdi_new(new, Holder("root", "import", new.ref)) as filled:
                await filled.staging.commit()
        case "clone":
            await inventory.vdi_clone(ref)
        case _:
            await inventory.vdi_snapshot(ref)


async def test_what_could_be_looked_at_after_a_change_is_noted_although_one_file_cannot(
    tmp_path: Path, leases: Leases, chains: Chains, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "sr"
    chains.place(root, H, Q, L)
    repository = await Repository.attach(str(root), leases, writable=True, who="me", uuid=SR_UUID)
    await repository.scan()
    look = Scanner.scan_one

    def failing(scanner: Scanner, path: str) -> ScannedImage:
        if path == str(image(root, Q)):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return look(scanner, path)

    monkeypatch.setattr(Scanner, "scan_one", failing)
    with pytest.raises(OSError, match="Too many open files"):
        await repository.restructure(image(root, L).unlink, (Q, L))
    assert set(repository.images) == {H, Q}
    await repository.detach()


async def test_a_filled_vdi_that_cannot_be_looked_at_is_told_of_and_keeps_its_name_for_the_next_attach(
    open_inventory: OpenInventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_scanner: Scanner, _path: str) -> ScannedImage:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with open_inventory() as inventory:
        sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
        new = VDI(ref="OpaqueRef:new", uuid=L, sr=sr, virtual_size=4 * MIB, name_label="filled")
        with pytest.raises(OSError, match="Too many open files"):
            async with inventory.vdi_new(new, Holder("root", "import", new.ref)) as filled:
                await filled.staging.commit()
                monkeypatch.setattr(Scanner, "scan_one", failing)
    async with open_inventory() as inventory:
        assert inventory.records.vdis.by_uuid(L).name_label == "filled"
