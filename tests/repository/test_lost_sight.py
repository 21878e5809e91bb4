"""A storage that fails may fail to say what is there, too: what can't be seen isn't taken for gone."""

import errno
import itertools
import os
from pathlib import Path

import pytest

from gateway.core.leases import Leases
from gateway.images.files import FILES
from gateway.repository.directory import SRDirectory
from gateway.repository.fork import unfinished_forks
from gateway.repository.journal_recovery import recover_journals
from gateway.repository.relink_steps import leaf_relink
from tests.images.merges import merge
from tests.repository.chains import Chains, H, L, Q, assert_sound, attach_and_scan, image
from tests.repository.failing_once import FailingOnce
from tests.repository.journal_steps import LEAF, MOVED_ASIDE, TOOK_ITS_NAME, Step
from tests.repository.test_killed_and_power import BASE, Killed, Mortal, forks, recover, unmerged


class Blind:
    """Looking at some names fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        look = os.lstat

        def failing(path: str, *, dir_fd: int | None = None) -> os.stat_result:
            if os.path.basename(path) in self.names:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return look(path, dir_fd=dir_fd)

        monkeypatch.setattr(os, "lstat", failing)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Blind:
    return Blind(monkeypatch)


class Blinding(FailingOnce):
    """With the call that fails goes the sight of the names."""

    def __init__(self, failing: int, blind: Blind, names: set[str]) -> None:
        super().__init__(failing, errno.EIO)
        self._blind = blind
        self._names = names

    def fail(self) -> None:
        self._blind.names = self._names
        super().fail()


@pytest.mark.parametrize("unseen", [f"{Q}.vhd", f"OLD_{L}.vhd"])
async def test_a_merge_that_fails_is_not_undone_over_a_parent_that_cannot_be_seen(
    tmp_path: Path, leases: Leases, chains: Chains, blind: Blind, unseen: str
) -> None:
    for number in itertools.count():
        root = tmp_path / str(number)
        expected = chains.place(root, H, Q, L)
        merge(image(root, L), image(root, Q))
        files = Blinding(number, blind, {unseen})
        try:
            leaf_relink(SRDirectory(str(root)), leaf=L, parent=Q, files=files)
        except OSError as error:
            assert error.errno == errno.EIO
        blind.names = set()
        assert_sound(root, await attach_and_scan(root, leases), expected, number, libvhdi=False)
        if files.left >= 0:
            assert number > 10
            return


@pytest.mark.parametrize(
    "steps",
    [LEAF, (*LEAF, MOVED_ASIDE), (*LEAF, MOVED_ASIDE, TOOK_ITS_NAME)],
    ids=["merged", "moved aside", "renamed"],
)
async def test_a_recovery_waits_until_it_can_see(
    tmp_path: Path, leases: Leases, chains: Chains, blind: Blind, steps: tuple[Step, ...]
) -> None:
    for unseen in (f"{Q}.vhd", f"{L}.vhd", f"OLD_{L}.vhd", f"leaf_{L}"):
        root = tmp_path / unseen
        expected = chains.place(root, H, Q, L)
        for step in steps:
            step(root)
        blind.names = {unseen}
        recover_journals(SRDirectory(str(root)), FILES)
        blind.names = set()
        assert_sound(root, await attach_and_scan(root, leases), expected, unseen, libvhdi=False)


@pytest.mark.parametrize("killed_before", (12, 14, 15))
async def test_a_base_copy_that_cannot_be_seen_keeps_the_journal_of_its_snapshot(
    tmp_path: Path, leases: Leases, chains: Chains, blind: Blind, killed_before: int
) -> None:
    root = tmp_path / "sr"
    expected = unmerged(chains, root)
    files = Mortal(root, killed_before)
    directory = SRDirectory(str(root))
    with pytest.raises(Killed):
        await forks(directory, files, leases)
    files.left = float("inf")
    blind.names = {f"{BASE}.vhd"}
    recover(directory, FILES)
    assert unfinished_forks(directory) == [f"fork-{L}.json"]
    blind.names = set()
    assert_sound(root, await attach_and_scan(root, leases), expected, killed_before, libvhdi=False)
