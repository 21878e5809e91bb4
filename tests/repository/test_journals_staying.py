"""What can't be recovered now, because a file is damaged, in use, or not ours: it stays, and says why."""

import os
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, Leases
from gateway.images.file_locks import FileUse, lock_file
from gateway.repository.repository import Repository
from tests.repository.chains import K1, K2, C, Chains, L, P, Q, assert_sound, image
from tests.repository.conftest import SR_UUID, listing
from tests.repository.journal_steps import (
    LEAF,
    LEAF_JOURNAL,
    MOVED_ASIDE,
    NEW,
    RELINK,
    SNAPSHOT,
    TOOK_ITS_NAME,
    Step,
    a_new_leaf_with_blocks,
    file,
    journal,
    linked,
    lost_its_end,
    new_leaf,
    on_the_base_copy,
    relinked,
    removed,
    renamed,
    unreadable,
    visible_stranger,
)

HOLDER = Holder("root", "test", "OpaqueRef:vdi")

STAYING = {
    "an unrelated file that may be a child": ((*RELINK, unreadable(L)), f"relink_{C}", f"{L}.vhd"),
    "an unreadable child": ((*RELINK, unreadable(K2)), f"relink_{C}", f"{K2}.vhd"),
    "an unreadable node": ((*RELINK, unreadable(C)), f"relink_{C}", f"{C}.vhd"),
    "a parent that is missing": ((*RELINK, removed(f"{P}.vhd")), f"relink_{C}", f"{P}.vhd is missing"),
    "a child of a node that is gone": ((*RELINK, relinked(K1), removed(f"{C}.vhd")), f"relink_{C}", K2),
    "a relink into a damaged parent": ((*RELINK, lost_its_end), f"relink_{C}", f"{P}.vhd"),
    "a relink of a VDI": ((journal("relink", L),), f"relink_{L}", f"{L}.vhd is a VDI"),
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
    "a base copy that another image stands on": (
        (linked, new_leaf, on_the_base_copy),
        f"{L}.vhd.new",
        f"{NEW}.vhd and {L}.vhd are one file",
    ),
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
