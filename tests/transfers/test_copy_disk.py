"""A disk copied into another one: what foreign programs read from it, and what is left when it fails."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI
from gateway.core.refs import NULL_REF
from gateway.core.task import Operation
from gateway.images.chain import open_chain_files
from gateway.images.disk import Extent, ExtentKind
from gateway.images.files import Buffer, FileCalls, FileIdentity
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.format import UNUSED
from gateway.repository.inventory import Inventory
from gateway.transfers.copy_disk import Copied, copy_disk, data_ranges, fill, shape_of_copy
from gateway.transfers.import_raw import PIECE_BYTES
from gateway.transfers.publications import Publications
from tests.images.disks import entries, inspect, libvhdi_reads, qemu_compare, read_all
from tests.repository.conftest import OpenInventory, listing
from tests.repository.test_inventory import replace as import_into
from tests.repository.test_inventory import root_of
from tests.repository.test_repository import read
from tests.repository.test_snapshots import make, write
from tests.system.conftest import small_file_system
from tests.transfers.test_import_raw import Memory

__all__ = ["small_file_system"]

MIB = 1 << 20
GIB = 1 << 30


async def copy(
    inventory: Inventory,
    vdi: str,
    sr: str = NULL_REF,
    into: str = NULL_REF,
    *,
    operation: Operation | None = None,
    publications: Publications | None = None,
) -> VDI:
    made = await copy_disk(
        inventory,
        publications or Publications(),
        operation or Operation("OpaqueRef:task", None),
        vdi=vdi,
        sr=sr,
        into=into,
        who="the test",
        turns=trio.CapacityLimiter(1),
    )
    return inventory.records.vdis.get(made)


def path_of(inventory: Inventory, vdi: VDI | str) -> Path:
    record = inventory.records.vdis.get(vdi) if isinstance(vdi, str) else vdi
    return Path(inventory.repository_of(record).image_path(record.uuid))


def foreign_reads(inventory: Inventory, vdi: VDI | str) -> bytes:
    """What a program that isn't ours reads from a VDI."""
    path = path_of(inventory, vdi)
    if path.suffix == ".raw":
        return path.read_bytes()
    chain = open_chain_files(str(path), writable=False)
    paths = [Path(node.path) for node in chain.nodes]
    chain.close()
    return libvhdi_reads(paths)


async def other_sr(inventory: Inventory, tmp_path: Path) -> str:
    return await inventory.sr_create("other", str(tmp_path / "other"))


def names(directory: Path) -> set[str]:
    """What lies in an SR, in our directory there, and in its staging directory."""
    service = directory / ".vdi-gateway"
    found = {name for place in (directory, service, service / "staging") for name in os.listdir(place)}
    return found - {".vdi-gateway", "staging", "sr.json", "owner", "records.json", "records.json.new"}


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
async def test_a_copy_of_a_chain_stands_alone_and_has_its_bytes(
    inventory: Inventory, tmp_path: Path, depth: int
) -> None:
    chance = random.Random(depth)
    data = chance.randbytes(300 << 10)
    sr, ref = await make(inventory, tmp_path, data)
    expected = bytearray(data.ljust(4 * MIB, b"\0"))
    target = await other_sr(inventory, tmp_path)
    for _ in range(depth - 1):
        await inventory.vdi_snapshot(ref)
        for _ in range(20):
            # Whole sectors and parts of them, so that the bitmaps of all levels are mixed.
            data = chance.choice([chance.randbytes(512), chance.randbytes(700), bytes(3000), b"x" * 4096])
            offset = chance.choice([chance.randrange(1 * MIB), chance.randrange(4 * MIB - 4096)])
            await write(inventory, ref, data, offset)
            expected[offset : offset + len(data)] = data
    for place in (sr, target):
        made = await copy(inventory, ref, place)
        assert made.sr == place
        assert "vhd-parent" not in made.sm_config
        path = path_of(inventory, made)
        assert inspect(path).header is not None
        assert not check_vhd(str(path)).problems
        assert foreign_reads(inventory, made) == expected
        (tmp_path / "expected").write_bytes(expected)
        qemu_compare(path, "vpc", tmp_path / "expected", "raw")
        await write(inventory, made.ref, b"the copy's own")
        assert read(str(path_of(inventory, ref)), 4 * MIB) == expected
        records = inventory.records.vdis_of_sr(place)
        await inventory.sr_scan(place)
        assert inventory.records.vdis_of_sr(place) == records


async def test_a_copy_of_a_snapshot_is_an_ordinary_vdi_that_is_called_like_it(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(
        sr=sr,
        virtual_size=4 * MIB,
        name_label="disk",
        name_description="of somebody",
        type="system",
        sharable=True,
        read_only=True,
        other_config={"owner": "me"},
        xenstore_data={"a": "b"},
        sm_config={"c": "d"},
        tags=["one"],
    )
    taken = await inventory.vdi_snapshot(ref)
    made = await copy(inventory, taken, sr)
    assert (made.is_a_snapshot, made.snapshot_of, made.read_only, made.managed) == (
        False,
        NULL_REF,
        False,
        True,
    )
    assert (made.name_label, made.name_description, made.type) == ("disk", "of somebody", "system")
    assert (made.other_config, made.xenstore_data, made.sharable) == ({"owner": "me"}, {"a": "b"}, True)
    # XenServer leaves these behind.
    assert (made.tags, made.sm_config.get("c")) == ((), None)
    assert inventory.records.srs.get(sr).virtual_allocation >= 12 * MIB


async def test_a_raw_disk_becomes_a_vhd_and_its_zeroes_are_not_stored(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=9 * MIB + 512, sm_config={"type": "raw"})
    data = os.urandom(700) + bytes(4 * MIB) + os.urandom(3 * MIB) + bytes(MIB) + b"end"
    with path_of(inventory, ref).open("r+b") as file:
        file.write(data)
        file.seek(9 * MIB + 512 - 1)
        file.write(b"!")
    await inventory.sr_scan(sr)
    made = await copy(inventory, ref, sr)
    assert (made.image_format, made.virtual_size) == ("vhd", 10 * MIB)
    expected = (data.ljust(9 * MIB + 511, b"\0") + b"!").ljust(10 * MIB, b"\0")
    assert foreign_reads(inventory, made) == expected
    # Of the five blocks the second is all zeroes; the others are stored without theirs.
    assert [entry != UNUSED for entry in entries(path_of(inventory, made))] == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert made.physical_utilisation < 5 * MIB


async def test_a_copy_into_a_vdi_replaces_all_of_it(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path, b"\x11" * 5000)
    expected = foreign_reads(inventory, ref)
    for sm_config in ({}, {"type": "raw"}):
        into = await inventory.vdi_create(
            sr=sr, virtual_size=8 * MIB, name_label="target", sm_config=sm_config
        )
        await import_into(inventory, into, b"\xee" * 8 * MIB)
        before = inventory.records.vdis.get(into)
        lease = await inventory.lease(into, LeaseMode.READ, Holder("root", "export", into))
        disk = await trio.to_thread.run_sync(lease.open_disk)
        made = await copy(inventory, ref, NULL_REF, into)
        # Who was reading reads on.
        assert read_all(disk) == b"\xee" * 8 * MIB
        disk.close()
        lease.release()
        await lease.released()
        assert (made.ref, made.uuid, made.name_label) == (into, before.uuid, "target")
        assert made.content_id not in (before.content_id, inventory.records.vdis.get(ref).content_id)
        assert foreign_reads(inventory, made) == expected.ljust(8 * MIB, b"\0")
        await inventory.sr_scan(sr)
        assert inventory.records.vdis.get(into) == made


async def test_a_snapshot_copied_into_its_vdi_makes_that_stand_alone(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    taken = await inventory.vdi_snapshot(ref)
    expected = foreign_reads(inventory, taken)
    await write(inventory, ref, b"changed" * 1000)
    made = await copy(inventory, taken, sr, ref)
    assert "vhd-parent" not in made.sm_config
    assert foreign_reads(inventory, ref) == foreign_reads(inventory, taken) == expected


async def test_who_opens_a_copied_disk_waits_for_its_content_id(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sr, ref = await make(inventory, tmp_path)
    into = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB)
    publications = Publications()
    changed = inventory.vdi_changed
    waited: list[bool] = []

    async def changed_late(vdi: str, content_id: str | None = None) -> None:
        opened = await trio.to_thread.run_sync(os.stat, path_of(inventory, into))
        with trio.move_on_after(0):
            await publications.settled(into, FileIdentity(opened.st_dev, opened.st_ino))
            waited.append(False)
        await changed(vdi, content_id)

    monkeypatch.setattr(inventory, "vdi_changed", changed_late)
    await copy(inventory, ref, NULL_REF, into, publications=publications)
    assert waited == []
    with trio.fail_after(5):
        await publications.settled(into, FileIdentity(0, 0))


async def test_a_disk_of_a_read_only_sr_can_be_copied(inventory: Inventory, tmp_path: Path) -> None:
    sr, ref = await make(inventory, tmp_path)
    target = await other_sr(inventory, tmp_path)
    (pbd,) = inventory.records.pbds_of_sr(sr)
    await inventory.pbd_unplug(pbd.ref)
    await inventory.records.pbds.change(pbd.ref, device_config={**pbd.device_config, "writable": "false"})
    await inventory.pbd_plug(pbd.ref)
    assert inventory.records.vdis.get(ref).read_only
    before = listing(root_of(inventory, sr))
    made = await copy(inventory, ref, target)
    assert listing(root_of(inventory, sr)) == before
    assert not made.read_only
    assert foreign_reads(inventory, made) == foreign_reads(inventory, ref)


@pytest.mark.parametrize("place", ["new", "into"])
async def test_the_content_id_is_the_sources_if_bytes_and_blocks_are_the_same(
    inventory: Inventory, tmp_path: Path, place: str
) -> None:
    sr, ref = await make(inventory, tmp_path)
    into = NULL_REF
    if place == "into":
        into = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB)
    await inventory.vdi_snapshot(ref)
    await write(inventory, ref, b"x" * 4096, 4096)
    source = inventory.records.vdis.get(ref)
    assert (await copy(inventory, ref, sr, into)).content_id == source.content_id
    # A block of zeroes is exported in a format with blocks, but the copy doesn't have it.
    await write(inventory, ref, bytes(4096), 3 * MIB)
    source = inventory.records.vdis.get(ref)
    made = await copy(inventory, ref, sr, into)
    assert made.content_id not in ("", source.content_id)
    assert foreign_reads(inventory, made) == foreign_reads(inventory, ref)


async def test_a_source_that_was_changed_from_outside_lends_no_content_id(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    os.utime(path_of(inventory, ref))
    assert (await copy(inventory, ref, sr)).content_id != inventory.records.vdis.get(ref).content_id


async def test_what_cannot_be_copied_is_refused_and_nothing_changes(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    other = await other_sr(inventory, tmp_path)
    small = await inventory.vdi_create(sr=sr, virtual_size=2 * MIB)
    taken = await inventory.vdi_snapshot(ref)
    (base,) = [vdi.ref for vdi in inventory.records.vdis_of_sr(sr) if not vdi.managed]
    read_only = await inventory.sr_create("read-only", str(tmp_path / "read-only"))
    (pbd,) = inventory.records.pbds_of_sr(read_only)
    await inventory.pbd_unplug(pbd.ref)
    with pytest.raises(XenAPIError, match="SR_NOT_ATTACHED"):
        await copy(inventory, ref, read_only)
    await inventory.records.pbds.change(pbd.ref, device_config={**pbd.device_config, "writable": "false"})
    await inventory.pbd_plug(pbd.ref)
    for place in (sr, other):
        await inventory._copies.write(place)

    def files() -> dict[str, dict[str, tuple[int, int, bytes]]]:
        found = {place: listing(root_of(inventory, place)) for place in (sr, other, read_only)}
        for each in found.values():
            each.pop(os.path.join(".vdi-gateway", "staging"), None)  # something came there, and went
        return found

    before = files()
    for arguments, expected in (
        ((ref, NULL_REF, NULL_REF), "VALUE_NOT_SUPPORTED"),
        ((ref, sr, ref), "VALUE_NOT_SUPPORTED"),
        ((ref, other, small), "VALUE_NOT_SUPPORTED"),
        ((ref, NULL_REF, small), "VDI_TOO_SMALL"),
        ((ref, NULL_REF, taken), "VDI_READONLY"),
        ((ref, NULL_REF, base), "VDI_READONLY"),
        ((base, sr, NULL_REF), "OPERATION_NOT_ALLOWED"),
        ((ref, read_only, NULL_REF), "OPERATION_NOT_ALLOWED"),
        ((ref, "OpaqueRef:none", NULL_REF), "HANDLE_INVALID"),
        ((ref, NULL_REF, "OpaqueRef:none"), "HANDLE_INVALID"),
    ):
        with pytest.raises(XenAPIError, match=expected):
            await copy(inventory, *arguments)
    assert files() == before
    assert inventory.leases.holders_for(ref) == ()


async def test_a_disk_larger_than_a_vhd_can_be_becomes_a_raw_one(
    inventory: Inventory, tmp_path: Path
) -> None:
    assert shape_of_copy(2040 * GIB) == (2040 * GIB, "vhd")
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=2040 * GIB + 512, sm_config={"type": "raw"})
    with path_of(inventory, ref).open("r+b") as file:
        file.seek(2040 * GIB)
        file.write(b"last")
    await inventory.sr_scan(sr)
    made = await copy(inventory, ref, sr)
    assert (made.image_format, made.virtual_size) == ("raw", 2040 * GIB + 512)
    with path_of(inventory, made).open("rb") as file:
        file.seek(2040 * GIB)
        assert file.read() == b"last".ljust(512, b"\0")
    assert made.physical_utilisation < MIB


class Held(FileCalls):
    """Holds the copy's thread at its n-th write until it is let go; `at_write` is called there."""

    def __init__(self, number: int, at_write: Callable[[], None] | None = None) -> None:
        self.number = number
        self.writes = 0
        self.at_write = at_write or self._hold
        self.held = trio.Event()
        self.go_on = threading.Event()

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        # The bytes of a disk, not its metadata.
        if len(data) >= PIECE_BYTES:
            self.writes += 1
            if self.writes == self.number:
                self.at_write()
        super().pwrite(fd, data, offset)

    def _hold(self) -> None:
        trio.from_thread.run_sync(self.held.set)
        self.go_on.wait()


async def filled(inventory: Inventory, tmp_path: Path) -> tuple[str, str]:
    """A disk of 16 MiB without a zero."""
    sr = await inventory.sr_create("sr", str(tmp_path / "sr"))
    ref = await inventory.vdi_create(sr=sr, virtual_size=16 * MIB, name_label="source")
    await import_into(inventory, ref, b"\x5a" * 16 * MIB)
    return sr, ref


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


async def test_readers_of_the_source_read_on_and_writers_are_refused_during_a_copy(
    open_inventory: OpenInventory, tmp_path: Path
) -> None:
    files = Held(1000)
    async with open_inventory(files=files) as inventory:
        sr, ref = await filled(inventory, tmp_path)
        (pbd,) = inventory.records.pbds_of_sr(sr)
        files.number, files.writes = 3, 0
        made: list[VDI] = []

        async def make_copy() -> None:
            made.append(await copy(inventory, ref, sr))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_copy)
            try:
                await files.held.wait()
                assert inventory.leases.operations_for(ref) == {"OpaqueRef:task": "copy"}
                lease = await inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
                disk = await trio.to_thread.run_sync(lease.open_disk)
                assert read_all(disk) == b"\x5a" * 16 * MIB
                disk.close()
                lease.release()
                await lease.released()
                with pytest.raises(XenAPIError, match=r"VDI_IN_USE.*copy by the test"):
                    await inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
                with pytest.raises(XenAPIError, match=r"VDI_IN_USE.*copy by the test"):
                    await inventory.pbd_unplug(pbd.ref)
                # Nobody sees it yet, not even by scanning.
                await inventory.sr_scan(sr)
                assert len(inventory.records.vdis_of_sr(sr)) == 1
                # A new image under the source's name is no matter of the copy's.
                await import_into(inventory, ref, b"new")
            finally:
                files.go_on.set()
        assert foreign_reads(inventory, made[0]) == b"\x5a" * 16 * MIB
        assert made[0].content_id != inventory.records.vdis.get(ref).content_id


async def test_a_copy_is_refused_while_somebody_writes_to_the_source_or_uses_the_target(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await make(inventory, tmp_path)
    into = await inventory.vdi_create(sr=sr, virtual_size=4 * MIB)
    for held in (ref, into):
        lease = await inventory.lease(held, LeaseMode.WRITE, Holder("root", "write", held))
        with pytest.raises(XenAPIError, match=r"VDI_IN_USE.*write by root") as refused:
            await copy(inventory, ref, sr, into)
        assert refused.value.params[0] == held
        lease.release()
        await lease.released()


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


@given(
    st.lists(
        st.tuples(st.sampled_from(ExtentKind), st.integers(1, 5 * PIECE_BYTES // 2)), min_size=1, max_size=12
    )
)
def test_what_is_read_covers_all_data_and_no_long_hole(parts: list[tuple[ExtentKind, int]]) -> None:
    class Parts(Memory):
        def extents(self, offset: int, length: int) -> Iterator[Extent]:
            position = 0
            for kind, size in parts:
                first, last = max(position, offset), min(position + size, offset + length)
                if first < last:
                    yield Extent(first, last - first, kind)
                position += size

    size = sum(length for _, length in parts)
    disk = Parts(size)
    begin = size // 3
    ranges = list(data_ranges(disk, begin, size))
    assert all(begin <= start < stop <= size for start, stop in ranges)
    assert all(one[1] < other[0] for one, other in pairwise(ranges))
    covered = {byte // 512 for start, stop in ranges for byte in range(start, stop, 512)}
    for extent in disk.extents(begin, size - begin):
        first, last = extent.offset // 512, (extent.offset + extent.length - 1) // 512
        if extent.kind is ExtentKind.DATA:
            assert {first + 1, last - 1} & set(range(first + 1, last)) <= covered
    looked_at = sum(stop - start for start, stop in ranges)
    data = sum(
        e.length + 2 * PIECE_BYTES for e in disk.extents(begin, size - begin) if e.kind is ExtentKind.DATA
    )
    assert looked_at <= data


def test_every_piece_is_asked_for_and_noted() -> None:
    class Whole(Memory):
        def extents(self, offset: int, length: int) -> Iterator[Extent]:
            yield Extent(offset, length, ExtentKind.DATA)

    source, target = Whole(5 * MIB + 700), Memory(6 * MIB)
    source.data[4 * MIB + 5] = 1
    source.data[-1] = 2
    asked: list[int] = []
    copied = Copied(source.size)
    fill(source, target, copied, check=lambda: asked.append(copied.count))
    assert target.data == source.data.ljust(6 * MIB, b"\0")
    assert target.writes == [(4 * MIB, PIECE_BYTES), (5 * MIB, 700)]
    assert copied.blocks == bytes([0, 0, 1])
    assert asked == [0, *(number * MIB for number in range(6))]
    assert copied.fraction() == 1.0
    assert Copied(0).fraction() == 1.0
