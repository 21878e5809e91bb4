"""What a crash leaves of recorded calls: which of them survive, and the directory that they make.

`tests/crash.py` says what the model assumes of kills and power failures. The trap: files are built in place,
from what the state before had; one that a test has changed since is known by its size or time stamp.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.crash_model import PAGE, Content, ContentCall, Inode, Tree, UnsafeCall

if TYPE_CHECKING:
    from random import Random


# A fixed time in the past; a test that changes a built state gives the file another one.
_BUILT_NS: Final = 1_000_000_000_000_000_000


def make_safe(safe: Tree, pending: list[UnsafeCall], inode: Inode) -> list[UnsafeCall]:
    """Apply to `safe` what a sync of `inode` has made durable; the calls that remain unsafe."""
    remaining: list[UnsafeCall] = []
    for call in pending:
        if (call.inode if isinstance(call, ContentCall) else call.safe_with) == inode:
            call.apply(safe)
        else:
            remaining.append(call)
    return remaining


def choose(pending: list[UnsafeCall], rng: "Random") -> list[UnsafeCall]:
    """The unsafe calls that a power failure leaves, in order, some of them torn."""
    if not pending:
        return []
    match rng.randrange(8):
        case 0:
            chosen: list[UnsafeCall] = []
        case 1:
            chosen = pending[-1:]
        case 2 | 3:
            lost = rng.randrange(len(pending))
            chosen = pending[:lost] + pending[lost + 1 :]
        case 4:
            chosen = list(pending)
        case _:
            chance = rng.choice((0.2, 0.5, 0.8))
            chosen = [call for call in pending if rng.random() < chance]
    return [
        call.torn(rng) if isinstance(call, ContentCall) and rng.random() < 0.3 else call for call in chosen
    ]


class Builder:
    """Turns one directory into one state after another, writing only what differs.

    Each file also lies in a store beside the directory, so a state's files have one more link than names.
    """

    def __init__(self, into: Path) -> None:
        self.directory = into / "state"
        self._store = into / "store"
        self.directory.mkdir(parents=True)
        self._store.mkdir()
        self._built: dict[Inode, Content] = {}

    def build(self, tree: Tree) -> None:
        names = tree.names()
        for inode in {inode for inode in names.values() if inode in tree.files}:
            self._build_file(inode, tree.files[inode])
        self._build_names(tree, names)

    def _build_file(self, inode: Inode, content: Content) -> None:
        path = self._store / str(inode)
        built = self._built.get(inode)
        if built is not None:
            status = path.stat()
            if (status.st_mtime_ns, status.st_size) != (_BUILT_NS, built.size):
                path.unlink()  # the test changed it
                del self._built[inode]
                built = None
        if built is None:
            built = Content()
        if built.pages == content.pages and built.size == content.size and inode in self._built:
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, content.size)
            empty = bytes(PAGE)
            run: list[bytes] = []
            run_start = 0
            for number in sorted(built.pages.keys() | content.pages.keys()):
                page = content.pages.get(number)
                if page is built.pages.get(number) or number * PAGE >= content.size:
                    continue
                if page is None:
                    page = empty
                if run and run_start + len(run) != number:
                    os.pwrite(fd, b"".join(run), run_start * PAGE)
                    run = []
                if not run:
                    run_start = number
                run.append(page)
            if run:
                os.pwrite(fd, b"".join(run), run_start * PAGE)
            os.ftruncate(fd, content.size)
        finally:
            os.close(fd)
        os.utime(path, ns=(_BUILT_NS, _BUILT_NS))
        self._built[inode] = content.copy()

    def _build_names(self, tree: Tree, names: dict[str, Inode]) -> None:
        for path in sorted(self.directory.rglob("*"), reverse=True):
            inode = names.get(str(path.relative_to(self.directory)))
            if path.is_dir() and not path.is_symlink():
                if inode not in tree.directories:
                    shutil.rmtree(path)
            elif inode not in tree.files or not path.samefile(self._store / str(inode)):
                path.unlink()
        for name, inode in names.items():
            path = self.directory / name
            if inode in tree.directories:
                path.mkdir(exist_ok=True)
            elif not path.exists():
                os.link(self._store / str(inode), path)
