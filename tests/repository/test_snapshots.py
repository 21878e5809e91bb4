import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.core.records import VDI
from gateway.images.chain import open_chain_files
from gateway.images.files import FileCalls
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import set_hidden
from gateway.repository.directory import SRDirectory
from gateway.repository.fork import MAX_CHAIN_LENGTH, Fork, Revert, unfinished_forks
from gateway.repository.inventory import Inventory
from gateway.repository.repository import Repository
from tests.crash import CrashState, RecordingFileCalls
from tests.images.disks import inspect, libvhdi_reads, read_all
from tests.repository.conftest import SR_UUID, OpenInventory, listing
from tests.repository.test_crash import CHILD, HOLDER, NEW, PARENT, RAW, SAMPLE, prepare, states
from tests.repository.test_inventory import replace, root_of
from tests.repository.test_repository import read
from tests.repository.test_repository import replace as replace_image

MIB = 1 << 20
BASE = "00000009-0000-4000-8000-000000000000"


async def write(inventory: Inventory, ref: str, data: bytes, offset: int = 0) -> None:
    lease = await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
    disk = await trio.to_thread.run_sync(lease.open_disk)
    await trio.to_thread.run_sync(disk.pwrite, data, offset)
    disk.close()
    lease.release()
    await lease.released()
    await inventory.vdi_changed(ref)


def content(inventory: Inventory, ref: str) -> bytes:
    """All bytes of a VDI, whose chain has no faults and says the same to libvhdi."""
    uuid = inventory.records.vdis.get(ref).uuid
    chain = open_chain_files(inventory.repository_of(ref).image_path(uuid), writable=False)
    paths = [Path(node.path) for node in chain.nodes]
    chain.close()
    for path in paths:
        assert not check_vhd(str(path)).problems
    size = inspect(paths[0]).size
    ours = read(str(paths[0]), size)
    # libvhdi refuses to read beyond the end of a parent.
    if len({inspect(path).size for path in paths}) == 1:
        assert libvhdi_reads(paths) == ours
    return ours


async def make(inventory: Inventory, tmp_path: Path, data: bytes = b"\x11" * 4096) -> tuple[str, str]:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB, name_label="disk", tags=["one"])
    await replace(inventory, ref, data)
    return sr, ref


def hidden(inventory: Inventory, sr: str) -> list[VDI]:
    return [vdi for vdi in inventory.records.vdis_of_sr(sr) if not vdi.managed]


async def test_a_snapshot_is_xenservers_hidden_base_copy_with_two_children(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    before = inventory.records.vdis.get(ref)
    made = await inventory.vdi_snapshot(ref)
    source, snapshot = inventory.records.vdis.get(ref), inventory.records.vdis.get(made)
    (base,) = hidden(inventory, sr)
    assert (base.name_label, base.managed, base.content_id) == ("base copy", False, before.content_id)
    assert "vhd-parent" not in base.sm_config
    for vdi in (source, snapshot):
        assert vdi.sm_config["vhd-parent"] == base.uuid
        assert (vdi.content_id, vdi.name_label, vdi.tags) == (before.content_id, "disk", ("one",))
        image = inspect(root_of(inventory, sr) / f"{vdi.uuid}.vhd")
        assert not image.footer.hidden
        assert image.header is not None
        assert image.header.parent_name.decode("utf-16-be").rstrip("\0") == f"{base.uuid}.vhd"
    assert inspect(root_of(inventory, sr) / f"{base.uuid}.vhd").footer.hidden
    assert (snapshot.is_a_snapshot, snapshot.snapshot_of) == (True, ref)
    assert (source.is_a_snapshot, source.uuid) == (False, before.uuid)
    assert snapshot.snapshot_time.year > 2000
    assert [vdi.ref for vdi in inventory.records.snapshots_of_vdi(ref)] == [made]
    assert sorted(os.listdir(root_of(inventory, sr) / ".vdi-gateway" / "staging")) == []
    records = inventory.records.vdis_of_sr(sr)
    await inventory.sr_scan(sr)
    assert inventory.records.vdis_of_sr(sr) == records


async def test_snapshots_and_clones_keep_their_bytes_while_the_vdi_is_written(
    inventory: Inventory, tmp_path: Path
) -> None:
    _, ref = await make(inventory, tmp_path)
    plain = {ref: bytearray(content(inventory, ref))}
    for number in range(1, 4):
        taken = await inventory.vdi_snapshot(ref)
        plain[taken] = plain[ref].copy()
        await write(inventory, ref, bytes([number]) * 700 + b"z" * 1000, number * 100_000 + 300)
        start = number * 100_000 + 300
        plain[ref][start : start + 1700] = bytes([number]) * 700 + b"z" * 1000
        clone = await inventory.vdi_clone(taken)
        plain[clone] = plain[taken].copy()
        await write(inventory, clone, b"clone" * 100, 3 * MIB)
        plain[clone][3 * MIB : 3 * MIB + 500] = b"clone" * 100
    for vdi, expected in plain.items():
        assert content(inventory, vdi) == expected
    ids = {inventory.records.vdis.get(vdi).content_id for vdi in plain}
    assert len(ids) == len(plain)


async def test_a_vdi_without_blocks_of_its_own_is_not_multiplied(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    files = set(os.listdir(root_of(inventory, sr)))
    again = await inventory.vdi_snapshot(ref)
    clone = await inventory.vdi_clone(taken)
    made = {f"{inventory.records.vdis.get(vdi).uuid}.vhd" for vdi in (again, clone)}
    assert set(os.listdir(root_of(inventory, sr))) - files == made
    assert len(hidden(inventory, sr)) == 1
    assert not inventory.records.vdis.get(clone).is_a_snapshot
    assert len({content(inventory, vdi) for vdi in (ref, taken, again, clone)}) == 1


async def test_readers_neither_hinder_a_snapshot_nor_notice_it(inventory: Inventory, tmp_path: Path) -> None:
    _, ref = await make(inventory, tmp_path)
    lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
    disk = await trio.to_thread.run_sync(lease.open_disk)
    await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"\x22" * 4096)
    assert read_all(disk) == b"\x11" * 4096 + bytes(4 * MIB - 4096)
    disk.close()
    lease.release()
    await lease.released()


async def test_a_writer_hinders_a_snapshot(inventory: Inventory, tmp_path: Path) -> None:
    _, ref = await make(inventory, tmp_path)
    lease = await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await inventory.vdi_snapshot(ref)
    lease.release()
    await lease.released()


async def test_a_chain_of_thirty_levels_grows_no_more(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path)
    for number in range(1, MAX_CHAIN_LENGTH):
        await inventory.vdi_snapshot(ref)
        await write(inventory, ref, bytes([number]) * 512, number * 512)
    before = listing(root_of(inventory, sr))
    for operation in (inventory.vdi_snapshot, inventory.vdi_clone):
        with pytest.raises(XenAPIError, match="chain is too long") as raised:
            await operation(ref)
        assert raised.value.error_info == ["SR_BACKEND_FAILURE_109", "", "The snapshot chain is too long", ""]
    after = listing(root_of(inventory, sr))
    assert {name: kept for name, kept in after.items() if name.endswith(".vhd")} == {
        name: kept for name, kept in before.items() if name.endswith(".vhd")
    }
    assert content(inventory, ref)[512 : 3 * 512] == b"\1" * 512 + b"\2" * 512


async def test_what_has_no_snapshots_is_refused(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path)
    raw = await inventory.vdi_create(sr=sr, virtual_size=MIB, sm_config={"type": "raw"})
    await inventory.vdi_snapshot(ref)
    for refused in (raw, hidden(inventory, sr)[0].ref):
        with pytest.raises(XenAPIError, match="OPERATION_NOT_ALLOWED"):
            await inventory.vdi_snapshot(refused)


async def test_destroying_a_snapshot_leaves_the_vdi_and_the_base_copy(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    before = content(inventory, ref)
    await inventory.vdi_destroy(taken)
    assert content(inventory, ref) == before
    assert len(hidden(inventory, sr)) == 1


async def test_a_file_changed_from_outside_lends_no_content_id(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path)
    before = inventory.records.vdis.get(ref)
    os.utime(root_of(inventory, sr) / f"{before.uuid}.vhd")
    taken = await inventory.vdi_snapshot(ref)
    assert inventory.records.vdis.get(taken).content_id != before.content_id
    assert inventory.records.vdis.get(taken).content_id == inventory.records.vdis.get(ref).content_id


@pytest.mark.parametrize("with_blocks", [False, True])
async def test_a_revert_brings_back_the_bytes_and_the_size_and_keeps_the_snapshot(
    inventory: Inventory, tmp_path: Path, with_blocks: bool
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    if with_blocks:
        # As leaf coalescing leaves it.
        root, snapshot = root_of(inventory, sr), inventory.records.vdis.get(taken)
        (base,) = hidden(inventory, sr)
        await replace(inventory, ref, b"")
        set_hidden(str(root / f"{base.uuid}.vhd"), False)
        os.rename(root / f"{base.uuid}.vhd", root / f"{snapshot.uuid}.vhd")
        await inventory.vdi_forget(base.ref)
        await inventory.sr_scan(sr)
    expected = content(inventory, taken)
    await write(inventory, ref, b"\x22" * 8192)
    await inventory.vdi_resize(ref, 8 * MIB)
    written = content(inventory, ref)
    lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
    disk = await trio.to_thread.run_sync(lease.open_disk)
    await inventory.vdi_revert(taken)
    assert read_all(disk) == written
    disk.close()
    lease.release()
    await lease.released()
    assert content(inventory, ref) == content(inventory, taken) == expected
    reverted = inventory.records.vdis.get(ref)
    assert (reverted.virtual_size, reverted.is_a_snapshot) == (4 * MIB, False)
    assert reverted.content_id == inventory.records.vdis.get(taken).content_id
    await write(inventory, ref, b"\x33" * 8192)
    assert content(inventory, taken) == expected
    records = inventory.records.vdis_of_sr(sr)
    await inventory.sr_scan(sr)
    assert inventory.records.vdis_of_sr(sr) == records


async def test_only_a_snapshot_of_a_vdi_that_exists_is_reverted_to(
    inventory: Inventory, tmp_path: Path
) -> None:
    _, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    with pytest.raises(XenAPIError, match="not the snapshot"):
        await inventory.vdi_revert(ref)
    await inventory.vdi_destroy(ref)
    with pytest.raises(XenAPIError, match="not the snapshot"):
        await inventory.vdi_revert(taken)


class Failing(FileCalls):
    """Fails at the n-th of the calls that change something, once."""

    left = -1

    def _count(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def link(self, source: str, target: str) -> None:
        self._count()
        super().link(source, target)

    def rename(self, source: str, target: str) -> None:
        self._count()
        super().rename(source, target)

    def sync_directory(self, path: str) -> None:
        self._count()
        super().sync_directory(path)

    def datasync(self, fd: int) -> None:
        self._count()
        super().datasync(fd)


async def test_a_snapshot_that_fails_at_any_call_leaves_every_byte_and_no_second_vdi(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = Failing()
    async with open_inventory(files=files) as inventory:
        sr, ref = await make(inventory, tmp_path)
        expected = content(inventory, ref)
        for number in range(40):
            # The copy of the records must not take the failure.
            await inventory._copies.write(sr)
            files.left = number
            try:
                taken = await inventory.vdi_snapshot(ref)
            except XenAPIError as error:
                assert error.code == "SR_FULL"
                files.left = -2
            else:
                files.left = -2
                await inventory.vdi_destroy(taken)
                break
            await inventory.sr_scan(sr)
            assert unfinished_forks(SRDirectory(str(root_of(inventory, sr)))) == []
            assert [vdi.ref for vdi in inventory.records.vdis_of_sr(sr) if vdi.managed] == [ref]
            assert content(inventory, ref) == expected
            if hidden(inventory, sr):
                break
        assert number > 5


async def after_the_crash(state: CrashState, leases: Leases) -> Repository:
    where = str(state.directory)
    with suppress(FileNotFoundError):
        os.unlink(SRDirectory(where).owner)
    repository = await Repository.attach(where, leases, writable=True, who="after", uuid=SR_UUID)
    result = await repository.scan()
    assert not [*result.errors(), *result.strange, *result.journals], state
    assert unfinished_forks(repository.directory) == [], state
    assert os.listdir(repository.directory.staging) == [], state
    return repository


@pytest.mark.parametrize("source", [PARENT, CHILD])
async def test_after_a_crash_at_any_point_a_snapshot_is_undone_or_finished(
    tmp_path: Path, leases: Leases, source: str
) -> None:
    root = str(tmp_path / "sr")
    initial = await prepare(root, leases)
    if source == PARENT:
        os.unlink(os.path.join(root, f"{CHILD}.vhd"))
    expected = initial[source]
    files = RecordingFileCalls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    lease = await repository.lease(source, LeaseMode.REPLACE, HOLDER)
    fork = Fork(repository.directory, lease, base=BASE, child=NEW, files=files)
    await trio.to_thread.run_sync(fork.prepare)
    assert fork.has_base is (source == PARENT)
    await repository.restructure(fork.publish, (source, BASE, NEW))
    files.mark("done")
    await trio.to_thread.run_sync(fork.discard)
    lease.release()
    await lease.released()
    await repository.detach()
    count = 0
    async for state in states(files, tmp_path, 3):
        count += 1
        again = await after_the_crash(state, leases)
        images = again.images
        for image in images.values():
            wanted = initial[RAW] if image.uuid == RAW else expected
            assert read(image.path, SAMPLE) == wanted, f"{image.name}: {state}"
            if image.format == "vhd":
                assert not check_vhd(image.path).problems, f"{image.name}: {state}"
        assert source in images, state
        if BASE in images:
            assert images[BASE].hidden, state
            assert images[source].parent == BASE, state
        if "done" in state.marks:
            assert NEW in images, state
        await again.detach()
    assert count > 20


async def test_after_a_crash_at_any_point_a_revert_is_undone_or_finished(
    tmp_path: Path, leases: Leases
) -> None:
    root = str(tmp_path / "sr")
    initial = await prepare(root, leases)
    before = await Repository.attach(root, leases, writable=True, who="before", uuid=SR_UUID)
    await before.scan()
    lease = await before.lease(CHILD, LeaseMode.REPLACE, HOLDER)
    fork = Fork(before.directory, lease, base=BASE, child=NEW, files=before.files)
    await trio.to_thread.run_sync(fork.prepare)
    await before.restructure(fork.publish, (CHILD, NEW))
    lease.release()
    await lease.released()
    await replace_image(before, CHILD, b"\x44" * SAMPLE)
    await before.detach()
    files = RecordingFileCalls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    target = await repository.lease(CHILD, LeaseMode.REPLACE, HOLDER)
    source = await repository.lease(NEW, LeaseMode.READ, HOLDER)
    revert = Revert(repository.directory, target, source, files)
    target.move_to(await trio.to_thread.run_sync(revert.prepare))
    await repository.restructure(revert.publish, (CHILD,))
    files.mark("done")
    for held in (target, source):
        held.release()
        await held.released()
    await repository.detach()
    async for state in states(files, tmp_path, 3):
        again = await after_the_crash(state, leases)
        found = read(again.images[CHILD].path, SAMPLE)
        assert found in (initial[CHILD], *(() if "done" in state.marks else (b"\x44" * SAMPLE,))), state
        for uuid in (PARENT, NEW):
            assert read(again.images[uuid].path, SAMPLE) == initial[PARENT], state
        assert not check_vhd(again.images[CHILD].path).problems, state
        await again.detach()


async def test_a_recovery_that_is_interrupted_is_done_again(tmp_path: Path, leases: Leases) -> None:
    root = str(tmp_path / "sr")
    initial = await prepare(root, leases)
    os.unlink(os.path.join(root, f"{CHILD}.vhd"))
    files = RecordingFileCalls(Path(root))
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    lease = await repository.lease(PARENT, LeaseMode.REPLACE, HOLDER)
    fork = Fork(repository.directory, lease, base=BASE, child=NEW, files=files)
    await trio.to_thread.run_sync(fork.prepare)
    await repository.restructure(fork.publish, (PARENT, BASE, NEW))
    lease.release()
    await lease.released()
    await repository.detach()
    interrupted = 0
    for number, state in enumerate(files.kill_states(tmp_path / "first")):
        if not unfinished_forks(SRDirectory(str(state.directory))):
            continue
        interrupted += 1
        recovering = RecordingFileCalls(state.directory)
        os.unlink(SRDirectory(str(state.directory)).owner)
        again = await Repository.attach(
            str(state.directory), leases, writable=True, who="second", uuid=SR_UUID, files=recovering
        )
        await again.detach()
        async for second in states(recovering, tmp_path / f"second {number}", 1):
            last = await after_the_crash(second, leases)
            assert read(last.images[PARENT].path, SAMPLE) == initial[PARENT], f"{state} {second}"
            await last.detach()
    assert interrupted > 5
