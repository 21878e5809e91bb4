"""After a crash: what SM or a gateway had begun in an SR and left a journal of is finished or undone.

A relink is finished, a leaf on its way into its parent is put back as SM does (unless the parent has the name
already, and the leaf was hidden or the parent written to since), a copy is forgotten, for it can begin anew,
a snapshot of FileSR is undone. Each step may crash in its turn: the journal goes last, and the next recovery
begins with what the files say then. All calls here block; nobody else names files in the SR meanwhile.

The trap: a journal tells what was meant, not what is there. Every step first looks whether the files are
those that it means, and touches nothing that anybody has open; in doubt all stays as it is, with the reason.
"""

import os
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from gateway.images.errors import ImageError
from gateway.images.file_locks import FileInUse, FileUse, lock_file
from gateway.images.files import FileCalls
from gateway.images.vhd.check import ProblemKind, check_vhd, repair_vhd
from gateway.images.vhd.relink import restore_header
from gateway.repository.directory import SRDirectory, is_there
from gateway.repository.journals import (
    JournalKind,
    child_of,
    journal_name,
    journal_path,
    old_leaf_path,
    parse_journal,
    read_leaf_journal,
    remove_journal,
    unfinished_journals,
)
from gateway.repository.relink_steps import (
    children_to_relink,
    ensure_hidden,
    finish_inline_relink,
    finish_leaf_relink,
    kept_header,
    kept_headers,
    opened,
    parents_of,
    undo_leaf_relink,
)
from gateway.repository.scan import ScannedImage, Scanner, ScanResult

_ORDER: Final = (JournalKind.LEAF, JournalKind.RELINK, JournalKind.COALESCE)
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was done, a sentence each, and why which journal (by its name) is there still."""

    done: tuple[str, ...] = ()
    unresolved: dict[str, str] = field(default_factory=dict)


def recover_journals(directory: SRDirectory, files: FileCalls, owned: Container[str] = ()) -> Recovery:
    """Finish or undo everything that was interrupted; what is damaged or in use stays as it is.

    `owned` are the uuids of children that are being coalesced now: their journals are left alone. Doing so
    again after a crash, or for nothing, is safe. Raises OSError only if the directory can't be listed or
    synced.
    """
    return _Recovery(directory, files, owned).run()


class _StaysError(Exception):
    """Nothing is done about a journal now; the text says why."""


class _Recovery:
    def __init__(self, directory: SRDirectory, files: FileCalls, owned: Container[str]) -> None:
        self._directory = directory
        self._files = files
        self._owned = owned
        self._scanner = Scanner(directory)
        self._done: list[str] = []
        self._unresolved: dict[str, str] = {}

    def run(self) -> Recovery:
        if self._unowned():
            # A killed predecessor's journal, and what it renamed, may be in memory only: else a power failure
            # could take that back and leave what is done from here on.
            self._files.sync_directory(self._directory.root)
        for uuid in kept_headers(self._directory):
            self._attempt(os.path.basename(kept_header(self._directory, uuid)), self._header, uuid)
        recoveries = {
            JournalKind.LEAF: self._leaf,
            JournalKind.RELINK: self._relink,
            JournalKind.COALESCE: self._coalesce,
        }
        for kind in _ORDER:
            for name in self._unowned():
                journal = parse_journal(name)
                if journal is not None and journal[0] is kind:
                    self._attempt(name, recoveries[kind], journal[1])
        for name in self._unowned():
            if name.endswith(".vhd.new"):
                self._attempt(name, self._snapshot, name.removesuffix(".vhd.new"))
            elif name.startswith("OLD_"):
                self._attempt(name, self._old_leaf, name.removeprefix("OLD_").removesuffix(".vhd"))
            elif parse_journal(name) is None:
                self._unresolved[name] = "an operation of SM that only SM can finish"
        return Recovery(tuple(self._done), self._unresolved)

    def _unowned(self) -> list[str]:
        return [name for name in unfinished_journals(self._directory) if child_of(name) not in self._owned]

    def _attempt(self, name: str, recover: Callable[[str], str], uuid: str) -> None:
        try:
            self._done.append(f"{name}: {recover(uuid)}")
        except _StaysError as stays:
            self._unresolved[name] = str(stays)
        except FileInUse as busy:
            self._unresolved[name] = f"{os.path.basename(busy.path)} is in use: {busy.why}"
        except ImageError as error:
            self._unresolved[name] = f"{os.path.basename(error.path)}: {error.problem}"
        except OSError as error:
            file = os.path.basename(error.filename) + ": " if isinstance(error.filename, str) else ""
            self._unresolved[name] = f"{file}{error.strerror or error}"

    # Relinking

    def _header(self, uuid: str) -> str:
        path, kept = self._directory.image(uuid, "vhd"), kept_header(self._directory, uuid)
        if not is_there(path):
            self._files.unlink(kept)
            return "removed, since its image is gone"
        with self._alone(path):
            restore_header(path, kept, self._files)
        return f"the header of {uuid}.vhd is whole"

    def _relink(self, uuid: str) -> str:
        found = self._scanner.scan()
        child = found.images.get(uuid)
        if child is None:
            for problem in found.errors():
                raise _StaysError(f"its image is gone, but a file can't be used: {problem}")
            remove_journal(self._directory, JournalKind.RELINK, uuid, files=self._files)
            self._files.sync_directory(self._directory.root)
            return "was finished already"
        if child.error is not None:
            raise _StaysError(f"{child.name}: {child.error}")
        if not child.hidden:
            raise _StaysError(f"{child.name} is a VDI, and no node that may go")
        parent = found.images.get(child.parent or "")
        if parent is None or parent.format != "vhd":
            raise _StaysError(f"{child.name} has no VHD as its parent")
        children = children_to_relink(found, uuid, parent.uuid, self._files)
        with self._alone(child.path, *(found.images[standing].path for standing in children)):
            self._require_sound(parent)
            finish_inline_relink(
                self._directory, child=uuid, parent=parent.uuid, children=children, files=self._files
            )
            self._files.sync_directory(self._directory.root)
        return f"finished: {len(children)} children of {child.name} stand on {parent.name} now"

    def _coalesce(self, uuid: str) -> str:
        found = self._scanner.scan()
        outcome = "the merge can begin anew"
        child = found.images.get(uuid)
        relinking = is_there(journal_path(self._directory, JournalKind.RELINK, uuid))
        if child is not None and not relinking:
            if child.error is not None:
                raise _StaysError(f"{child.name}: {child.error}")
            parent = found.images.get(child.parent or "")
            if parent is None:
                raise _StaysError(f"{child.name} has no parent")
            # A raw parent has no structures that could be damaged.
            if parent.format == "vhd" and self._repaired(parent):
                outcome = f"{parent.name} was repaired, and {outcome}"
        remove_journal(self._directory, JournalKind.COALESCE, uuid, files=self._files)
        self._files.sync_directory(self._directory.root)
        return outcome

    def _repaired(self, parent: ScannedImage) -> bool:
        """Repair the parent if it is damaged; whether it was."""
        report = check_vhd(parent.path)
        if any(problem.kind is ProblemKind.IN_USE for problem in report.problems):
            raise _StaysError(f"{report.problems[0]}")
        if not report.problems:
            return False
        if report.repairable:
            try:
                report = repair_vhd(parent.path, self._files)
            except FileInUse:
                # All data is there as long as these are only warnings.
                if report.errors:
                    raise
        for problem in report.errors:
            raise _StaysError(f"{parent.name}: {problem.detail}")
        return bool(report.repaired)

    # A leaf on its way into its parent

    def _leaf(self, leaf: str) -> str:
        directory = self._directory
        parent = read_leaf_journal(directory, leaf)
        if parent is None:
            raise _StaysError("there is no uuid in it")
        leaf_path, parent_path = directory.image(leaf, "vhd"), directory.image(parent, "vhd")
        old_path = old_leaf_path(directory, leaf)
        there = [path for path in (leaf_path, parent_path, old_path) if is_there(path)]
        with self._alone(*there):
            if there == [leaf_path]:
                if f"{parent}.vhd" in parents_of(leaf_path):
                    raise _StaysError(f"{leaf}.vhd has lost its parent {parent}.vhd")
                ensure_hidden(leaf_path, False, self._files)
                remove_journal(directory, JournalKind.LEAF, leaf, files=self._files)
                self._files.sync_directory(directory.root)
                return "was finished already"
            if len(there) != 2:
                names = ", ".join(os.path.basename(path) for path in there) or "nothing"
                wanted = f"two of {leaf}.vhd, {parent}.vhd and OLD_{leaf}.vhd"
                raise _StaysError(f"{wanted} should be there, but there is {names}")
            # Of the two the leaf is the one that lies at the old path, if anything does.
            at_old = old_path in there
            child_path = old_path if at_old else leaf_path
            below_path = next(path for path in there if path != child_path)
            self._require_child(child_path, below_path)
            if below_path == leaf_path and (_is_hidden(old_path) or _written_since(leaf_path, old_path)):
                # The parent has all that the leaf had, and perhaps more by now.
                ensure_hidden(leaf_path, False, self._files)
                finish_leaf_relink(directory, leaf=leaf, files=self._files)
                return f"finished: {parent}.vhd has the name {leaf}.vhd"
            undo_leaf_relink(directory, leaf=leaf, parent=parent, files=self._files)
        return f"undone: {leaf}.vhd stands on {parent}.vhd again"

    def _old_leaf(self, leaf: str) -> str:
        if is_there(journal_path(self._directory, JournalKind.LEAF, leaf)):
            raise _StaysError(f"it stays as long as {journal_name(JournalKind.LEAF, leaf)} does")
        path = self._directory.image(leaf, "vhd")
        image = self._scanner.scan().images.get(leaf)
        if image is None or image.path != path or image.error is not None:
            problem = image.error if image is not None and image.error else "is missing"
            raise _StaysError(f"it stays, since {leaf}.vhd can't be used: {problem}")
        self._files.unlink(old_leaf_path(self._directory, leaf))
        self._files.sync_directory(self._directory.root)
        return f"removed, since {leaf}.vhd took its place"

    # A snapshot by FileSR

    def _snapshot(self, leaf: str) -> str:
        """The leaf's file gets its only name back.

        FileSR links or renames <leaf>.vhd to <base>.vhd, makes an empty child of that as <leaf>.vhd.new, and
        renames it over <leaf>.vhd.
        """
        directory, files = self._directory, self._files
        leaf_path, new_path = directory.image(leaf, "vhd"), os.path.join(directory.root, f"{leaf}.vhd.new")
        found = self._scanner.scan()
        bases = self._bases_of_new(found, new_path)
        if not is_there(leaf_path):
            if len(bases) != 1 or found.children(bases[0].uuid):
                raise _StaysError(f"{leaf}.vhd is missing, and which file it was is not known")
            with self._alone(bases[0].path):
                files.rename(bases[0].path, leaf_path)
        else:
            for image in found.images.values():
                if image.uuid != leaf and os.path.samefile(image.path, leaf_path):
                    if (bases and image not in bases) or found.children(image.uuid):
                        raise _StaysError(f"{image.name} and {leaf}.vhd are one file")
                    files.unlink(image.path)
        files.sync_directory(directory.root)
        files.unlink(new_path)
        files.sync_directory(directory.root)
        return f"the snapshot of {leaf}.vhd was undone"

    def _bases_of_new(self, found: ScanResult, new_path: str) -> list[ScannedImage]:
        """The images that a new leaf names as its parent; none if it was still being made."""
        with suppress(ImageError):
            with opened(new_path) as new:
                if new.header is None or new.has_blocks():
                    raise _StaysError("it has blocks of its own")
            names = parents_of(new_path)
            return [image for image in found.images.values() if image.name in names]
        return []

    # What several of them need

    def _require_sound(self, parent: ScannedImage) -> None:
        report = check_vhd(parent.path)
        for problem in report.problems:
            if problem.kind is ProblemKind.IN_USE or problem in report.errors:
                raise _StaysError(f"{parent.name}: {problem.detail}")

    def _require_child(self, child_path: str, parent_path: str) -> None:
        with opened(child_path) as child, opened(parent_path) as parent:
            if child.header is None or child.header.parent_id != parent.unique_id:
                names = os.path.basename(child_path), os.path.basename(parent_path)
                raise _StaysError(f"{names[0]} doesn't stand on {names[1]}")

    @contextmanager
    def _alone(self, *paths: str) -> Iterator[None]:
        """Lock files as a writer does. Raises FileInUse, OSError."""
        opened: list[int] = []
        try:
            for path in paths:
                opened.append(os.open(path, _OPEN))
                lock_file(opened[-1], FileUse.WRITE, path)
            yield
        finally:
            for fd in opened:
                os.close(fd)


def _is_hidden(path: str) -> bool:
    with opened(path) as image:
        return image.footer.hidden


def _written_since(leaf_path: str, old_path: str) -> bool:
    """Whether the file that took a leaf's name was written to after the leaf had been moved aside.

    A coalesce doesn't: its last write to the parent comes before both renames, and a rename counts as a
    change of the file that is renamed. A clock that was put back hides it; but who has moved a leaf aside
    hides that before anybody can write, and so only what was written between the two depends on the clock.
    """
    return os.lstat(leaf_path).st_mtime_ns > os.lstat(old_path).st_ctime_ns
