"""What a repository says of an SR that is being rearranged, and what goes with an SR that is destroyed."""

import os
import threading
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.images.file_locks import FileUse, lock_file
from gateway.images.files import FileCalls
from gateway.repository.inventory import Inventory
from gateway.repository.relink_steps import leaf_relink
from gateway.repository.repository import Repository
from tests.images.disks import make_child
from tests.images.merges import merge
from tests.repository.chains import BLOCK, VISIBLE, C, Chains, G, H, L, P, Q, image, names
from tests.repository.conftest import SR_UUID, listing

HOLDER = Holder("root", "test", "OpaqueRef:vdi")
NEW = "00000109-0000-4000-8000-000000000000"


class StopsBetweenTheRenames(FileCalls):
    """The leaf has been moved aside, and its parent hasn't got its name yet."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def rename(self, source: str, target: str) -> None:
        if os.path.basename(source) == f"{Q}.vhd":
            self.reached.set()
            self.go_on.wait()
        super().rename(source, target)


async def test_a_scan_in_the_middle_of_a_relink_sees_what_is_there_before_or_after(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    root = tmp_path / "sr"
    chains.place(root, H, Q, L)
    merge(image(root, L), image(root, Q))
    repository = await Repository.attach(str(root), leases, writable=True, who="me", uuid=SR_UUID)
    await repository.scan()
    files = StopsBetweenTheRenames()
    repository.coalescing.add(L)

    async def relink() -> None:
        await repository.restructure(
            lambda: leaf_relink(repository.directory, leaf=L, parent=Q, files=files), (Q, L)
        )

    looked = threading.Event()
    look = repository._scan

    def scan_and_tell() -> object:
        result = look()
        looked.set()
        return result

    repository._scan = scan_and_tell  # type: ignore[method-assign, assignment]
    found = []

    async def scan() -> None:
        found.append(await repository.scan())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(relink)
        await trio.to_thread.run_sync(files.reached.wait)
        assert not image(root, L).exists()
        nursery.start_soon(scan)
        await trio.to_thread.run_sync(looked.wait)
        files.go_on.set()
    assert set(found[0].images) == {H, L}
    assert (found[0].images[L].parent, found[0].journals) == (H, ())
    await repository.detach()


async def test_what_a_scan_has_seen_stays_as_it_was_when_an_image_comes_afterwards(
    repository: Repository,
) -> None:
    seen = (await repository.scan()).images
    await repository.create_image(NEW, 4 << 20, "vhd")
    assert NEW in repository.images
    assert NEW not in seen


async def test_a_node_in_the_middle_of_a_chain_is_leased_with_its_parent_and_removed_only_if_it_is_a_leaf(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    root = tmp_path / "sr"
    chains.place(root, G, P, C)
    repository = await Repository.attach(str(root), leases, writable=True, who="me", uuid=SR_UUID)
    await repository.scan()
    writing = (LeaseMode.WRITE,)
    lease = await repository.lease_to_coalesce(P, LeaseMode.WRITE, HOLDER, parents=writing, wait=0)
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await repository.lease(C, LeaseMode.READ, HOLDER)
    with pytest.raises(XenAPIError, match=f"{C}.vhd stands on it"):
        await repository.collect(lease, P)
    lease.release()
    await lease.released()
    lease = await repository.lease_to_coalesce(C, LeaseMode.WRITE, HOLDER, wait=0)
    await repository.collect(lease, C)
    lease.release()
    await lease.released()
    assert set(repository.images) == {G, P} == set((await repository.scan()).images)
    with pytest.raises(XenAPIError, match="VDI_MISSING"):
        await repository.lease_to_coalesce(C, LeaseMode.WRITE, HOLDER, wait=0)
    await repository.detach()
    reading = await Repository.attach(str(root), leases, writable=False, who="me", uuid=SR_UUID)
    await reading.scan()
    with pytest.raises(XenAPIError, match="VDI_READONLY"):
        await reading.lease_to_coalesce(P, LeaseMode.WRITE, HOLDER, wait=0)
    await reading.detach()


async def unplugged(inventory: Inventory, chains: Chains, root: Path, *uuids: str) -> str:
    chains.place(root, *uuids)
    sr = await inventory.sr_attach(str(root), writable=True)
    await inventory.pbd_unplug(inventory.records.pbds_of_sr(sr)[0].ref)
    return sr


async def test_an_sr_of_hidden_nodes_that_nothing_stands_on_is_destroyed_with_them(
    inventory: Inventory, tmp_path: Path, chains: Chains
) -> None:
    root = tmp_path / "sr"
    sr = await unplugged(inventory, chains, root, G, P, C, H)
    await inventory.sr_destroy(sr)
    assert names(root) == set()
    assert sr not in inventory.records.srs


@pytest.mark.parametrize("visible", VISIBLE)
async def test_an_sr_with_one_vdi_is_not_destroyed_and_keeps_everything(
    inventory: Inventory, tmp_path: Path, chains: Chains, visible: str
) -> None:
    root = tmp_path / "sr"
    sr = await unplugged(inventory, chains, root, G, P, C, H, Q, visible)
    before = listing(root)
    with pytest.raises(XenAPIError, match="SR_NOT_EMPTY"):
        await inventory.sr_destroy(sr)
    assert {name: entry[2] for name, entry in listing(root).items() if name.endswith(".vhd")} == {
        name: entry[2] for name, entry in before.items() if name.endswith(".vhd")
    }


async def test_an_sr_whose_hidden_nodes_are_open_or_broken_is_not_destroyed(
    inventory: Inventory, tmp_path: Path, chains: Chains
) -> None:
    root = tmp_path / "sr"
    sr = await unplugged(inventory, chains, root, H)
    fd = os.open(image(root, H), os.O_RDONLY)
    lock_file(fd, FileUse.READ, H)
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await inventory.sr_destroy(sr)
    os.close(fd)
    make_child(image(root, NEW), image(root, H), block_size=BLOCK)
    content = image(root, H).read_bytes()
    image(root, H).unlink()
    with pytest.raises(XenAPIError, match="SR_NOT_EMPTY"):
        await inventory.sr_destroy(sr)
    image(root, NEW).unlink()
    image(root, H).write_bytes(content)
    await inventory.sr_destroy(sr)
    assert names(root) == set()
