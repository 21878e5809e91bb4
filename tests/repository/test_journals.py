"""SRs as a crashed SM leaves them, at each of its steps: they are finished or undone."""

import errno
import os
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode, Leases
from gateway.images.errors import CorruptImage
from gateway.images.file_locks import FileUse, lock_file
from gateway.images.files import FILES, FileCalls
from gateway.repository.directory import SRDirectory
from gateway.repository.journal_recovery import recover_journals
from gateway.repository.journals import JournalKind, create_journal, unfinished_journals
from gateway.repository.relink_steps import inline_relink, leaf_relink
from gateway.repository.repository import Repository
from tests.images.disks import inspect, noise, put
from tests.images.merges import merge
from tests.repository.chains import (
    BLOCK,
    GRAIN,
    K1,
    K2,
    C,
    Chains,
    G,
    H,
    L,
    P,
    Q,
    assert_sound,
    attach_and_scan,
    image,
    names,
)
from tests.repository.conftest import SR_UUID, listing
from tests.repository.journal_steps import (
    LEAF,
    LEAF_JOURNAL,
    MOVED_ASIDE,
    NEW,
    RELINK,
    TOOK_ITS_NAME,
    Step,
    copied,
    copied_in_part,
    hidden,
    journal,
    linked,
    lost_its_end,
    new_leaf,
    relinked,
    relinked_but_for_its_locators,
    removed,
    renamed,
    torn,
    unhidden,
    unreadable,
    visible_stranger,
)

HOLDER = Holder("root", "test", "OpaqueRef:vdi")

INLINE_STEPS = {
    "the copy has not begun": ((journal("coalesce", C),), {C}),
    "the copy was interrupted": ((journal("coalesce", C), copied_in_part), {C}),
    "the copy was killed while the parent grew": ((journal("coalesce", C), lost_its_end), {C}),
    "the copy is finished": ((journal("coalesce", C), copied(C, P)), {C}),
    "nothing is relinked": (RELINK, set()),
    "the journal of the copy is there too": ((*RELINK, journal("coalesce", C)), set()),
    "one is relinked": ((*RELINK, relinked(K1)), set()),
    "one is relinked in part": ((*RELINK, relinked_but_for_its_locators), set()),
    "all are relinked": ((*RELINK, relinked(K1), relinked(K2)), set()),
    "the node is removed": ((*RELINK, relinked(K1), relinked(K2), removed(f"{C}.vhd")), set()),
}

LEAF_STEPS = {
    "nothing is done": ((LEAF_JOURNAL,), {Q}),
    "the parent is visible": ((LEAF_JOURNAL, unhidden(Q)), {Q}),
    "the copy is finished": (LEAF, {Q}),
    "the leaf is hidden": ((*LEAF, hidden(L)), {Q}),
    "the leaf is moved aside": ((*LEAF, MOVED_ASIDE), {Q}),
    "the parent has its name": ((*LEAF, MOVED_ASIDE, TOOK_ITS_NAME), {Q}),
    "the old leaf is removed first": (
        (*LEAF, MOVED_ASIDE, TOOK_ITS_NAME, removed(f"OLD_{L}.vhd")),
        set(),
    ),
    "the flag was lost": (
        (*LEAF, MOVED_ASIDE, TOOK_ITS_NAME, removed(f"OLD_{L}.vhd"), hidden(L)),
        set(),
    ),
    "the journal is removed": ((*LEAF, MOVED_ASIDE, TOOK_ITS_NAME, removed(f"leaf_{L}")), set()),
    "all is done": (
        (*LEAF, MOVED_ASIDE, TOOK_ITS_NAME, removed(f"leaf_{L}"), removed(f"OLD_{L}.vhd")),
        set(),
    ),
}


@pytest.mark.parametrize(("steps", "kept"), INLINE_STEPS.values(), ids=INLINE_STEPS.keys())
async def test_an_inline_coalesce_of_sm_is_finished_or_can_begin_anew(
    tmp_path: Path, leases: Leases, chains: Chains, steps: tuple[Step, ...], kept: set[str]
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root, G, P, C, K1, K2)
    for step in steps:
        step(root)
    found = await attach_and_scan(root, leases)
    assert_sound(root, found, expected, steps, libvhdi=True)
    assert set(found.images) == {G, P, K1, K2} | kept
    assert {found.images[uuid].parent for uuid in (K1, K2)} == (kept or {P})


@pytest.mark.parametrize(("steps", "kept"), LEAF_STEPS.values(), ids=LEAF_STEPS.keys())
async def test_a_leaf_coalesce_of_sm_is_undone_or_finished(
    tmp_path: Path, leases: Leases, chains: Chains, steps: tuple[Step, ...], kept: set[str]
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root, H, Q, L)
    for step in steps:
        step(root)
    found = await attach_and_scan(root, leases)
    assert_sound(root, found, expected, steps, libvhdi=True)
    assert set(found.images) == {H, L} | kept
    assert found.images[L].parent == (Q if kept else H)


@pytest.mark.parametrize(("steps", "kept"), LEAF_STEPS.values(), ids=LEAF_STEPS.keys())
async def test_what_is_half_done_is_finished_or_undone_before_the_image_is_replaced(
    tmp_path: Path, leases: Leases, chains: Chains, steps: tuple[Step, ...], kept: set[str]
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root, H, Q, L)
    (root / ".vdi-gateway" / "owner").unlink(missing_ok=True)
    repository = await Repository.attach(str(root), leases, writable=True, who="now", uuid=SR_UUID)
    await repository.scan()
    for step in steps:
        step(root)
    lease = await repository.lease(L, LeaseMode.REPLACE, HOLDER)
    assert not unfinished_journals(repository.directory)
    lease.release()
    await lease.released()
    await repository.detach()
    found = await attach_and_scan(root, leases)
    assert_sound(root, found, expected, steps, libvhdi=True)
    assert set(found.images) == {H, L} | kept


async def test_what_cannot_be_finished_is_not_replaced(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    root = tmp_path / "sr"
    chains.place(root, H, Q, L)
    repository = await Repository.attach(str(root), leases, writable=True, who="now", uuid=SR_UUID)
    await repository.scan()
    journal("clone", L, f"{Q}_{H}")(root)
    with pytest.raises(XenAPIError, match=f"clone_{L}: .* only SM") as refused:
        await repository.lease(L, LeaseMode.REPLACE, HOLDER)
    assert refused.value.code == "OPERATION_NOT_ALLOWED"
    lease = await repository.lease(L, LeaseMode.READ, HOLDER)
    lease.release()
    await lease.released()
    await repository.detach()


def written_to(root: Path) -> None:
    """By hand, by somebody who takes the VDI for whole; the old leaf has a block there."""
    put(image(root, L), (7 * BLOCK, b"n" * GRAIN))


@pytest.mark.parametrize("flag_was_lost", [False, True])
async def test_a_leaf_whose_parent_took_its_name_and_was_written_to_keeps_what_was_written(
    tmp_path: Path, leases: Leases, chains: Chains, flag_was_lost: bool
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root, H, Q, L)
    expected[L] = expected[L][: 7 * BLOCK] + b"n" * GRAIN + expected[L][7 * BLOCK + GRAIN :]
    lost = (hidden(L),) if flag_was_lost else ()
    for step in (*LEAF, MOVED_ASIDE, TOOK_ITS_NAME, *lost, written_to):
        step(root)
    found = await attach_and_scan(root, leases)
    assert_sound(root, found, expected, "", libvhdi=True)
    assert set(found.images) == {H, L}
    assert found.images[L].parent == H


class KeepsJournals(FileCalls):
    """No name can be removed, or nothing makes that durable and the power fails."""

    def unlink(self, path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)


async def test_what_was_written_to_a_merged_leaf_stays_whatever_the_clock_says(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root, H, Q, L)
    expected[L] = expected[L][: 7 * BLOCK] + b"n" * GRAIN + expected[L][7 * BLOCK + GRAIN :]
    merge(image(root, L), image(root, Q))
    leaf_relink(SRDirectory(str(root)), leaf=L, parent=Q, files=KeepsJournals())
    assert names(root) == {f"{H}.vhd", f"{L}.vhd", f"OLD_{L}.vhd", f"leaf_{L}"}
    written_to(root)
    # The clock was put back, or the new time stamp was not on the disk yet.
    os.utime(image(root, L), (0, 0))
    found = await attach_and_scan(root, leases)
    assert_sound(root, found, expected, "", libvhdi=True)
    assert found.images[L].parent == H


SNAPSHOTS = {
    "linked and being made": (new_leaf, linked),
    "linked and half made": (new_leaf, linked, torn),
    "renamed and being made": (new_leaf, renamed(f"{L}.vhd", f"{NEW}.vhd")),
    "made of something that is gone": (new_leaf,),
    "half made of something that is gone": (new_leaf, torn),
}


@pytest.mark.parametrize("steps", SNAPSHOTS.values(), ids=SNAPSHOTS.keys())
async def test_a_snapshot_that_filesr_had_begun_is_undone(
    tmp_path: Path, leases: Leases, chains: Chains, steps: tuple[Step, ...]
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root, H, Q, L)
    for step in steps:
        step(root)
    found = await attach_and_scan(root, leases)
    assert_sound(root, found, expected, steps, libvhdi=False)
    assert set(found.images) == {H, Q, L}


async def test_a_copy_that_readers_are_beside_needs_no_repair(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root)
    journal("coalesce", C)(root)
    copied_in_part(root)
    fd = os.open(image(root, P), os.O_RDONLY)
    lock_file(fd, FileUse.READ, P)
    found = await attach_and_scan(root, leases)
    os.close(fd)
    assert_sound(root, found, expected, "", libvhdi=False)


@pytest.mark.parametrize("relinks", [(), (relinked_but_for_its_locators,), (relinked(K1), relinked(K2))])
async def test_a_coalesce_finishes_a_relink_that_a_recovery_had_to_leave(
    tmp_path: Path, leases: Leases, chains: Chains, relinks: tuple[Step, ...]
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root)
    for step in (*RELINK, *relinks):
        step(root)
    directory = SRDirectory(str(root))
    content = image(root, L).read_bytes()
    unreadable(L)(root)
    before = listing(root)
    with pytest.raises(CorruptImage):
        inline_relink(directory, child=C, parent=P, children=(), files=FILES)
    assert listing(root) == before
    image(root, L).write_bytes(content)
    inline_relink(directory, child=C, parent=P, children=(), files=FILES)
    assert unfinished_journals(directory) == ()
    found = await attach_and_scan(root, leases)
    assert_sound(root, found, expected, "", libvhdi=True)
    assert {found.images[uuid].parent for uuid in (K1, K2)} == {P}


async def test_attaching_read_only_recovers_nothing(tmp_path: Path, leases: Leases, chains: Chains) -> None:
    root = tmp_path / "sr"
    chains.place(root)
    for step in (*RELINK, *LEAF, MOVED_ASIDE):
        step(root)
    before = listing(root)
    repository = await Repository.attach(str(root), leases, writable=False, who="me", uuid=SR_UUID)
    assert set((await repository.scan()).journals) == {f"relink_{C}", f"leaf_{L}", f"OLD_{L}.vhd"}
    await repository.detach()
    assert listing(root) == before


async def test_journals_of_a_coalesce_under_way_are_left_alone_and_keep_nothing_from_being_destroyed(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    root = tmp_path / "sr"
    chains.place(root)
    visible_stranger(root)
    repository = await Repository.attach(str(root), leases, writable=True, who="me", uuid=SR_UUID)
    await repository.scan()
    repository.coalescing.add(C)
    create_journal(repository.directory, JournalKind.COALESCE, C, files=FILES)
    found = await repository.scan()
    assert not found.journals
    await repository.destroy_image(NEW, HOLDER)
    assert unfinished_journals(repository.directory) == (f"coalesce_{C}",)
    repository.coalescing.discard(C)
    await repository.scan()
    assert unfinished_journals(repository.directory) == ()
    await repository.detach()


async def test_several_operations_are_recovered_at_once_and_doing_so_again_changes_nothing(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root)
    for step in (*RELINK, relinked(K1), *LEAF, MOVED_ASIDE):
        step(root)
    recovery = recover_journals(SRDirectory(str(root)), FILES)
    assert len(recovery.done) == 2
    assert recovery.unresolved == {}
    before = listing(root)
    assert recover_journals(SRDirectory(str(root)), FILES).done == ()
    assert listing(root) == before
    assert_sound(root, await attach_and_scan(root, leases), expected, "", libvhdi=True)
    assert names(root) == {f"{uuid}.vhd" for uuid in (G, P, K1, K2, H, Q, L)}


async def test_a_header_that_was_torn_while_it_changed_is_put_back_first(
    tmp_path: Path, leases: Leases, chains: Chains
) -> None:
    root = tmp_path / "sr"
    expected = chains.place(root)
    for step in RELINK:
        step(root)
    path = image(root, K1)
    offset = inspect(path).footer.data_offset
    with path.open("r+b") as file:
        file.seek(offset)
        kept = file.read(1024)
        file.seek(offset)
        file.write(noise(512))
    (root / ".vdi-gateway" / f"header-{K1}").write_bytes(kept)
    (root / ".vdi-gateway" / f"header-{NEW}").write_bytes(kept)
    assert_sound(root, await attach_and_scan(root, leases), expected, "", libvhdi=True)
