"""SRs as a crashed SM leaves them, at each of its steps: they are finished or undone, or stay and say why."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, Leases
from gateway.images.errors import CorruptImage
from gateway.images.file_locks import FileUse, lock_file
from gateway.images.files import FILES
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_differencing, create_dynamic, set_hidden
from gateway.images.vhd.image import open_vhd
from gateway.images.vhd.merge import Merge
from gateway.images.vhd.relink import set_parent
from gateway.repository.directory import SRDirectory
from gateway.repository.journal_recovery import recover_journals
from gateway.repository.journals import JournalKind, create_journal, unfinished_journals
from gateway.repository.relink_steps import inline_relink
from gateway.repository.repository import Repository
from tests.images.disks import inspect
from tests.images.test_vhd_merge import merge, noise, opened, stop_after
from tests.repository.chains import (
    BLOCK,
    K1,
    K2,
    SIZE,
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

HOLDER = Holder("root", "test", "OpaqueRef:vdi")
NEW = "00000109-0000-4000-8000-000000000000"
SNAPSHOT = "00000110-0000-4000-8000-000000000000"

Step = Callable[[Path], None]


def file(name: str, content: str | bytes = "1") -> Step:
    data = content.encode() if isinstance(content, str) else content

    def write(root: Path) -> None:
        (root / name).write_bytes(data)

    return write


def journal(kind: str, uuid: str, content: str = "1") -> Step:
    return file(f"{kind}_{uuid}", content)


def copied(child: str, parent: str) -> Step:
    return lambda root: merge(image(root, child), image(root, parent))


def copied_in_part(root: Path) -> None:
    with opened(image(root, C), image(root, P)) as (child, parent):
        work = Merge(child, parent, files=FILES)
        assert not work.copy_some(stop_after(1))
        work.flush()


def lost_its_end(root: Path) -> None:
    """vhd-util was killed between growing the parent and writing the footer behind the new block."""
    path = image(root, P)
    with path.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes(512 + 4096))
    assert check_vhd(str(path)).errors


def relinked(uuid: str) -> Step:
    return lambda root: set_parent(str(image(root, uuid)), str(image(root, P)))


def relinked_but_for_its_locators(root: Path) -> None:
    """Killed after the header's first sector: locators still lead to the old parent."""
    path = image(root, K1)
    header = inspect(path).footer.data_offset
    before = path.read_bytes()
    relinked(K1)(root)
    after = path.read_bytes()
    assert after[header : header + 512] != before[header : header + 512]
    path.write_bytes(before[:header] + after[header : header + 512] + before[header + 512 :])


def unhidden(uuid: str) -> Step:
    return lambda root: set_hidden(str(image(root, uuid)), False)


def hidden(uuid: str) -> Step:
    return lambda root: set_hidden(str(image(root, uuid)), True)


def renamed(old: str, new: str) -> Step:
    return lambda root: os.rename(root / old, root / new)


def removed(name: str) -> Step:
    return lambda root: (root / name).unlink()


LEAF_JOURNAL = journal("leaf", L, Q)
MOVED_ASIDE = renamed(f"{L}.vhd", f"OLD_{L}.vhd")
TOOK_ITS_NAME = renamed(f"{Q}.vhd", f"{L}.vhd")
RELINK = (copied(C, P), journal("relink", C))
LEAF = (LEAF_JOURNAL, unhidden(Q), copied(L, Q))

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


def new_leaf(root: Path) -> None:
    """FileSR makes an empty child of the base copy that has the leaf's blocks, beside the leaf."""
    path = image(root, L)
    with path.open("rb") as file:
        create_differencing(
            str(root / f"{L}.vhd.new"),
            str(path),
            open_vhd(file.fileno(), str(path)),
            parent_name=f"{NEW}.vhd",
        )


def linked(root: Path) -> None:
    os.link(image(root, L), image(root, NEW))


def torn(root: Path) -> None:
    os.truncate(root / f"{L}.vhd.new", 700)


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


def visible_stranger(root: Path) -> None:
    create_dynamic(str(image(root, NEW)), SIZE, block_size=BLOCK)


def unreadable(uuid: str) -> Step:
    return file(f"{uuid}.vhd", b"broken" * 1000)


def a_new_leaf_with_blocks(root: Path) -> None:
    new_leaf(root)
    visible_stranger(root)
    path = root / f"{L}.vhd.new"
    shutil.copy(image(root, L), path)


STAYING = {
    "an unrelated file that may be a child": ((*RELINK, unreadable(L)), f"relink_{C}", f"{L}.vhd"),
    "an unreadable child": ((*RELINK, unreadable(K2)), f"relink_{C}", f"{K2}.vhd"),
    "an unreadable node": ((*RELINK, unreadable(C)), f"relink_{C}", f"{C}.vhd"),
    "a parent that is missing": ((*RELINK, removed(f"{P}.vhd")), f"relink_{C}", f"{P}.vhd is missing"),
    "a child of a node that is gone": ((*RELINK, relinked(K1), removed(f"{C}.vhd")), f"relink_{C}", K2),
    "a relink into a damaged parent": ((*RELINK, lost_its_end), f"relink_{C}", f"{P}.vhd"),
    "a copy into a lost parent": ((journal("coalesce", C), unreadable(P)), f"coalesce_{C}", f"{P}.vhd"),
    "a copy of a damaged node": ((journal("coalesce", C), unreadable(C)), f"coalesce_{C}", f"{C}.vhd"),
    "a journal without its content": ((journal("leaf", L, ""),), f"leaf_{L}", "no uuid"),
    "a leaf that has lost its parent": ((LEAF_JOURNAL, removed(f"{Q}.vhd")), f"leaf_{L}", f"{Q}.vhd"),
    "a leaf that was moved aside from nothing": (
        (LEAF_JOURNAL, MOVED_ASIDE, removed(f"{Q}.vhd")),
        f"leaf_{L}",
        f"there is OLD_{L}.vhd",
    ),
    "a stranger under the name of the leaf": (
        (LEAF_JOURNAL, MOVED_ASIDE, visible_stranger, renamed(f"{NEW}.vhd", f"{L}.vhd")),
        f"leaf_{L}",
        f"there is {L}.vhd, {Q}.vhd, OLD_{L}.vhd",
    ),
    "a stranger in place of the parent": (
        (*LEAF, MOVED_ASIDE, removed(f"{Q}.vhd"), visible_stranger, renamed(f"{NEW}.vhd", f"{L}.vhd")),
        f"leaf_{L}",
        f"OLD_{L}.vhd doesn't stand on {L}.vhd",
    ),
    "a leaf that has no other name": ((MOVED_ASIDE,), f"OLD_{L}.vhd", f"{L}.vhd can't be used"),
    "an old leaf under an unreadable one": (
        (*LEAF, MOVED_ASIDE, TOOK_ITS_NAME, removed(f"leaf_{L}"), unreadable(L)),
        f"OLD_{L}.vhd",
        f"{L}.vhd can't be used",
    ),
    "a new leaf with blocks": ((a_new_leaf_with_blocks,), f"{L}.vhd.new", "blocks of its own"),
    "a new leaf alone": ((new_leaf, removed(f"{L}.vhd")), f"{L}.vhd.new", f"{L}.vhd is missing"),
    "what SM's other storage does": ((journal("clone", L, f"{NEW}_{SNAPSHOT}"),), f"clone_{L}", "only SM"),
    "a resize": ((file(f".journal-{L}"),), f".journal-{L}", "only SM"),
}


@pytest.mark.parametrize("case", STAYING.values(), ids=STAYING.keys())
async def test_what_is_damaged_or_not_ours_stays_says_why_and_nothing_is_destroyed(
    tmp_path: Path, leases: Leases, chains: Chains, case: tuple[tuple[Step, ...], str, str]
) -> None:
    root = tmp_path / "sr"
    steps, name, reason = case
    chains.place(root)
    visible_stranger(root)
    os.rename(image(root, NEW), image(root, SNAPSHOT))
    for step in steps:
        step(root)
    before = {path: entry[1:] for path, entry in listing(root).items() if not path.startswith(".vdi-")}
    repository = await Repository.attach(str(root), leases, writable=True, who="after", uuid=SR_UUID)
    found = await repository.scan()
    # A leaf that was moved aside stays with its journal.
    assert [journal for journal in found.journals if not journal.startswith("OLD_") or journal == name] == [
        name
    ]
    assert reason in found.unresolved[name]
    with pytest.raises(XenAPIError) as refused:
        await repository.destroy_image(SNAPSHOT, HOLDER)
    assert refused.value.code == "OPERATION_NOT_ALLOWED"
    assert any(sentence in str(refused.value) for sentence in (*found.errors(), *found.unfinished()))
    await repository.detach()
    after = {path: entry[1:] for path, entry in listing(root).items() if not path.startswith(".vdi-")}
    assert after == before


@pytest.mark.parametrize(
    "case",
    [
        (RELINK, f"{C}.vhd", FileUse.READ),
        (RELINK, f"{K2}.vhd", FileUse.READ),
        ((journal("coalesce", C), lost_its_end), f"{P}.vhd", FileUse.READ),
        ((journal("coalesce", C),), f"{P}.vhd", FileUse.WRITE),
        (LEAF, f"{L}.vhd", FileUse.READ),
        ((*LEAF, MOVED_ASIDE), f"OLD_{L}.vhd", FileUse.READ),
        ((*LEAF, MOVED_ASIDE), f"{Q}.vhd", FileUse.READ),
    ],
)
async def test_nothing_is_recovered_under_somebody_who_has_a_file_open_but_at_the_next_scan(
    tmp_path: Path, leases: Leases, chains: Chains, case: tuple[tuple[Step, ...], str, FileUse]
) -> None:
    root = tmp_path / "sr"
    steps, held, use = case
    expected = chains.place(root)
    for step in steps:
        step(root)
    fd = os.open(root / held, os.O_RDONLY)
    lock_file(fd, use, held)
    repository = await Repository.attach(str(root), leases, writable=True, who="after", uuid=SR_UUID)
    found = await repository.scan()
    reasons = [found.unresolved[name] for name in found.journals if not name.startswith("OLD_")]
    assert [reason for reason in reasons if held in reason and "another program" in reason] == reasons != []
    os.close(fd)
    found = await repository.scan()
    await repository.detach()
    (root / ".vdi-gateway" / "owner").unlink()
    assert_sound(root, found, expected, held, libvhdi=False)


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
