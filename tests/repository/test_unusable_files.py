"""A file of an SR that can't be read keeps nobody from the others, but all of them from being destroyed."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.images.cbtlog import CbtLog
from gateway.images.files import FILES
from gateway.repository.cbt_logs import CbtLogs
from gateway.repository.coalesce_plan import Switches, make_plan
from gateway.repository.directory import DirectoryUnavailable, SRDirectory
from gateway.repository.fork import Fork
from gateway.repository.inventory import Inventory
from gateway.repository.repository import Repository
from gateway.repository.scan import Scanner
from tests.images.disks import content
from tests.repository.chains import SIZE, Chains, H, L, Q, image
from tests.repository.conftest import SR_UUID, listing
from tests.repository.test_killed_and_power import BASE, CHILD, Killed, Mortal
from tests.repository.tracked import GRAIN, file_of, told, tracked, write

HOLDER = Holder("root", "test", "OpaqueRef:vdi")


class Looked:
    """An entry of a directory; looking at one of a damaged inode fails."""

    def __init__(self, entry: "os.DirEntry[str]", damaged: str) -> None:
        self.name, self.path = entry.name, entry.path
        self._entry, self._damaged = entry, damaged

    def stat(self, *, follow_symlinks: bool) -> os.stat_result:
        if self.name == self._damaged:
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN), self.path)
        return self._entry.stat(follow_symlinks=follow_symlinks)


class Listing:
    """A directory in which the inode of one name is damaged."""

    def __init__(self, entries: "Iterator[os.DirEntry[str]]", damaged: str) -> None:
        self._entries = [Looked(entry, damaged) for entry in entries]

    def __enter__(self) -> Iterator[Looked]:
        return iter(self._entries)

    def __exit__(self, *_: object) -> None:
        pass


def test_an_image_whose_inode_is_damaged_is_an_error_and_the_others_are_seen(
    tmp_path: Path, chains: Chains, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "sr"
    chains.place(root, H, Q, L)
    scandir = os.scandir

    def damaged(path: str) -> Listing:
        with scandir(path) as entries:
            return Listing(entries, f"{H}.vhd")

    monkeypatch.setattr(os, "scandir", damaged)
    found = Scanner(SRDirectory(str(root))).scan()
    assert [*found.errors()] == [f"{H}.vhd: Structure needs cleaning"]
    assert {uuid: node.parent for uuid, node in found.images.items()} == {H: None, Q: H, L: Q}


async def test_an_interrupted_snapshot_whose_image_cannot_be_read_keeps_no_sr_from_being_attached(
    tmp_path: Path, leases: Leases, chains: Chains, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root)
    files = Mortal(root, float("inf"))
    directory = SRDirectory(str(root))
    async with leases.hold(str(image(root, L)), LeaseMode.REPLACE, HOLDER, wait=0) as lease:
        fork = Fork(directory, lease, base=BASE, child=CHILD, files=files)
        fork.prepare()
        # Killed as soon as the leaf has its new file.
        files.left = 9
        with pytest.raises(Killed):
            fork.publish()
    assert (root / ".vdi-gateway" / f"fork-{L}.json").exists()
    (root / ".vdi-gateway" / "owner").unlink(missing_ok=True)
    opens = os.open

    def failing(path: str, flags: int, mode: int = 0o777, **rest: int) -> int:
        if path == str(image(root, BASE)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return opens(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", failing)
    repository = await Repository.attach(str(root), leases, writable=True, who="me", uuid=SR_UUID)
    found = await repository.scan()
    assert [*found.unfinished()] == [f"fork-{L}.json: {BASE}.vhd: Input/output error"]
    monkeypatch.undo()
    found = await repository.scan()
    assert not [*found.unfinished(), *found.errors()]
    assert found.images[BASE].hidden
    assert CHILD not in found.images
    assert content(image(root, L)) == expected[L]
    await repository.detach()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
async def test_what_is_no_log_and_no_staging_file_keeps_no_sr_from_being_attached(
    tmp_path: Path, leases: Leases, chains: Chains, make: Callable[[Path], None]
) -> None:
    root = tmp_path / "sr"
    chains.place(root, H, Q, L)
    logs = CbtLogs(SRDirectory(str(root)), FILES)
    # As XenServer leaves it; who may write here tells it not to believe that.
    logs.write(L, CbtLog.empty(SIZE).with_header(parent=None, child=None, consistent=True))
    make(root / f"{H}.cbtlog")
    make(root / ".vdi-gateway" / "staging" / "strange")
    with trio.fail_after(20):
        repository = await Repository.attach(str(root), leases, writable=True, who="me", uuid=SR_UUID)
    assert set(logs.headers()) == {L}
    assert not logs.headers()[L].consistent
    await repository.detach()


@pytest.mark.parametrize("name", ["sr.json", f"made-{L}.json", f"fork-{L}.json"])
@pytest.mark.parametrize("kind", ["fifo", "link"])
async def test_what_somebody_puts_in_the_place_of_our_own_files_is_not_waited_for(
    tmp_path: Path, leases: Leases, chains: Chains, name: str, kind: str
) -> None:
    root = tmp_path / "sr"
    chains.place(root, H, Q, L)
    place = root / ".vdi-gateway" / name
    place.unlink(missing_ok=True)
    fifo = place if kind == "fifo" else tmp_path / "fifo"
    os.mkfifo(fifo)
    if kind == "link":
        place.symlink_to(fifo)
    try:
        repository = await Repository.attach(str(root), leases, writable=True, who="me", uuid=SR_UUID)
        told = " ".join((await repository.scan()).unfinished())
        await repository.detach()
    except (DirectoryUnavailable, OSError) as error:
        told = str(error)
    assert ("not a regular file" if kind == "fifo" else "symbolic links") in told


async def test_the_data_of_no_snapshot_is_destroyed_while_a_file_may_stand_on_it(
    inventory: Inventory, tmp_path: Path
) -> None:
    _, ref = await tracked(inventory, tmp_path / "sr")
    await write(inventory, ref, (0, b"a" * GRAIN))
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (GRAIN, b"b" * GRAIN))
    await inventory.vdi_snapshot(ref)
    unreadable = image(tmp_path / "sr", BASE)
    unreadable.write_bytes(b"what was a child of somebody")
    before = listing(tmp_path / "sr")
    with pytest.raises(XenAPIError, match=f"nothing is destroyed in this SR .* {BASE}.vhd"):
        await inventory.vdi_data_destroy(first)
    assert listing(tmp_path / "sr") == before
    assert inventory.records.vdis.get(first).type == "user"
    unreadable.unlink()
    await inventory.vdi_data_destroy(first)
    assert await told(inventory, first, ref) == {1}
    assert inventory.records.vdis.get(first).type == "cbt_metadata"
    assert not file_of(inventory, first).exists()


async def test_a_copy_under_another_name_keeps_what_it_stands_on(
    inventory: Inventory, tmp_path: Path
) -> None:
    sr, ref = await tracked(inventory, tmp_path / "sr")
    await write(inventory, ref, (0, b"a" * GRAIN))
    snapshot = await inventory.vdi_snapshot(ref)
    copy = shutil.copy(file_of(inventory, ref), tmp_path / "sr" / "before the upgrade.vhd")
    before = listing(tmp_path / "sr")
    with pytest.raises(XenAPIError, match=r"before the upgrade\.vhd: it stands on"):
        await inventory.vdi_destroy(snapshot)
    plan = make_plan(await inventory.repository(sr).scan(), Switches(), 1 << 40)
    assert not plan.candidates
    assert any("before the upgrade.vhd" in problem for problem in plan.problems)
    assert listing(tmp_path / "sr") == before
    assert content(Path(copy)).startswith(b"a" * GRAIN)
    os.unlink(copy)
    await inventory.vdi_destroy(snapshot)


async def test_of_an_sr_that_is_not_mounted_no_log_is_taken_for_lost(
    inventory: Inventory, tmp_path: Path
) -> None:
    root = tmp_path / "sr"
    _, ref = await tracked(inventory, root)
    first = await inventory.vdi_snapshot(ref)
    await write(inventory, ref, (GRAIN, b"b" * GRAIN))
    root.rename(tmp_path / "elsewhere")
    root.mkdir()
    with pytest.raises(DirectoryUnavailable):
        await inventory.vdi_list_changed_blocks(first, ref)
    with pytest.raises(DirectoryUnavailable):
        await inventory.vdi_disable_cbt(ref)
    root.rmdir()
    (tmp_path / "elsewhere").rename(root)
    assert await told(inventory, first, ref) == {1}
