"""A snapshot that was interrupted, where a file can't be used by which it would be undone or finished."""

import os
from pathlib import Path

import msgspec
import pytest

from gateway.core.errors import XenAPIError
from gateway.images.files import FILES
from gateway.repository.directory import SRDirectory, replace_file
from gateway.repository.fork import _Journal, unfinished_forks
from tests.repository.conftest import OpenInventory
from tests.repository.vdis import content, make, root_of

BASE, CHILD = (f"0000000{number}-0000-4000-8000-000000000000" for number in (7, 8))


async def test_an_image_that_cannot_be_used_keeps_no_sr_from_being_attached_and_nothing_is_destroyed(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    async with open_inventory() as inventory:
        sr, ref = await make(inventory, tmp_path)
        other = await inventory.vdi_create(sr=sr, virtual_size=4 << 20)
        leaf, root = inventory.records.vdis.get(ref).uuid, root_of(inventory, sr)
    directory = SRDirectory(str(root))
    # The base copy has its name, the new leaf hasn't.
    os.link(root / f"{leaf}.vhd", root / f"{BASE}.vhd")
    (root / f"{CHILD}.vhd").write_bytes(b"broken" * 1000)
    journal = _Journal(leaf, BASE, CHILD)
    replace_file(journal.path(directory), msgspec.json.encode(journal), FILES)
    async with open_inventory() as inventory:
        assert content(inventory, ref)[:4096] == b"\x11" * 4096
        with pytest.raises(XenAPIError, match=f"{CHILD}.vhd"):
            await inventory.sr_scan(sr)
        with pytest.raises(XenAPIError, match="nothing is destroyed in this SR"):
            await inventory.vdi_destroy(other)
        found = await inventory.repository(sr).scan()
        (name,) = found.journals
        assert name == f"fork-{leaf}.json"
        assert f"{CHILD}.vhd" in found.unresolved[name]
        (root / f"{CHILD}.vhd").unlink()
        await inventory.sr_scan(sr)
        assert unfinished_forks(directory) == []
        assert not (root / f"{BASE}.vhd").exists()
        await inventory.vdi_destroy(other)
        assert content(inventory, ref)[:4096] == b"\x11" * 4096
