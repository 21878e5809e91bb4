"""The last phase of a coalesce: files of one SR change names and parents, and no data moves.

Everything here stands between a journal that is durable before the first step and that goes after the last,
so that a crash at any point is finished or undone by recover_journals. The parent has all sectors of the
child, durably, before any of this begins, so both ways lead to the same bytes.
All calls here block; the caller holds leases that keep everybody off child and parent.

The trap: between two syncs of a directory, a power failure leaves any of the renames and not others. Only
where each subset can be told from the files that are there may two renames share a sync.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from gateway.images.errors import CorruptImage, ImageError
from gateway.images.files import FileCalls
from gateway.images.vhd.create import set_hidden
from gateway.images.vhd.format import FOOTER_SIZE, DiskType
from gateway.images.vhd.image import VhdFile, open_vhd, parent_names
from gateway.images.vhd.relink import set_parent
from gateway.repository.directory import SRDirectory, is_there
from gateway.repository.journals import (
    JournalKind,
    create_journal,
    journal_path,
    old_leaf_path,
    remove_journal,
)
from gateway.repository.scan import Scanner, ScanResult

_KEPT_HEADER: Final = re.compile(r"header-([0-9a-f-]{36})")


def inline_relink(
    directory: SRDirectory, *, child: str, parent: str, children: Sequence[str], files: FileCalls
) -> None:
    """Make `children`, which are all that stand on `child`, children of `parent`, and remove `child`.

    Removes the journal of the copy too. One that was interrupted is finished, whatever `children` are now.
    Raises ImageError, OSError; then the journal stays, and what is left to do is done by a recovery.
    """
    if is_there(journal_path(directory, JournalKind.RELINK, child)):
        children = children_to_relink(Scanner(directory).scan(), child, parent, files)
    else:
        create_journal(directory, JournalKind.RELINK, child, files=files)
    remove_journal(directory, JournalKind.COALESCE, child, files=files)
    finish_inline_relink(directory, child=child, parent=parent, children=children, files=files)


def children_to_relink(found: ScanResult, child: str, parent: str, files: FileCalls) -> list[str]:
    """The children of `child`, and those of `parent` that were being relinked when a crash came.

    Those have their new parent, and locators that may lead to the old one still, by which other programs go.
    The locators of all others are durable on return. Raises CorruptImage if a file can't be read, for it may
    be one of them, ImageError, OSError.
    """
    for image in found.images.values():
        if image.error is not None:
            raise CorruptImage(image.path, image.error)
    interrupted: list[str] = []
    for uuid in found.children(parent):
        path = found.images[uuid].path
        if uuid != child and f"{child}.vhd" in parents_of(path):
            interrupted.append(uuid)
        elif uuid != child:
            _make_durable(path, files)
    return [*found.children(child), *interrupted]


def finish_inline_relink(
    directory: SRDirectory, *, child: str, parent: str, children: Sequence[str], files: FileCalls
) -> None:
    """The steps behind the journal, from any of them on. Raises as inline_relink does."""
    parent_path = directory.image(parent, "vhd")
    for standing in children:
        path = directory.image(standing, "vhd")
        set_parent(path, parent_path, keep=kept_header(directory, standing), files=files)
    files.sync_directory(directory.root)
    files.unlink(directory.image(child, "vhd"))
    files.sync_directory(directory.root)
    remove_journal(directory, JournalKind.RELINK, child, files=files)


def leaf_relink(directory: SRDirectory, *, leaf: str, parent: str, files: FileCalls) -> None:
    """Give `parent` the name of `leaf`, whose file goes.

    Raises ImageError, OSError; then all is as before, or a recovery makes it so. Once both have their new
    names durably, nothing is raised any more.
    """
    leaf_path, parent_path = directory.image(leaf, "vhd"), directory.image(parent, "vhd")
    old_path = old_leaf_path(directory, leaf)
    try:
        create_journal(directory, JournalKind.LEAF, leaf, parent=parent, files=files)
        ensure_hidden(parent_path, False, files)
        # The second rename alone loses the leaf's old file: it is not needed any more. Neither loses the
        # parent's.
        files.rename(leaf_path, old_path)
        files.rename(parent_path, leaf_path)
        files.sync_directory(directory.root)
        # People may write to the leaf before the journal has gone for good, if what is below fails or is
        # lost. As SM does it, this says that there is no way back: no time stamp is needed to know.
        set_hidden(old_path, True, files=files)
    except BaseException:
        with suppress(OSError, ImageError):
            undo_leaf_relink(directory, leaf=leaf, parent=parent, files=files)
        raise
    with suppress(OSError):
        finish_leaf_relink(directory, leaf=leaf, files=files)


def finish_leaf_relink(directory: SRDirectory, *, leaf: str, files: FileCalls) -> None:
    """Remove the journal and the leaf's old file. Raises OSError; then a recovery does it."""
    remove_journal(directory, JournalKind.LEAF, leaf, files=files)
    with suppress(FileNotFoundError):
        files.unlink(old_leaf_path(directory, leaf))
    files.sync_directory(directory.root)


def undo_leaf_relink(directory: SRDirectory, *, leaf: str, parent: str, files: FileCalls) -> None:
    """Make the leaf stand on its hidden parent again, whatever has been renamed, and remove the journal.

    The caller knows that the leaf's old file is there under one of its two names, and the parent's under one
    of its own. Raises ImageError, OSError.
    """
    leaf_path, parent_path = directory.image(leaf, "vhd"), directory.image(parent, "vhd")
    old_path = old_leaf_path(directory, leaf)
    if not is_there(parent_path):
        files.rename(leaf_path, parent_path)
        # With the second rename alone the parent's file would have no name left.
        files.sync_directory(directory.root)
    if is_there(old_path):
        files.rename(old_path, leaf_path)
        files.sync_directory(directory.root)
    ensure_hidden(parent_path, True, files)
    ensure_hidden(leaf_path, False, files)
    remove_journal(directory, JournalKind.LEAF, leaf, files=files)
    files.sync_directory(directory.root)


def ensure_hidden(path: str, hidden: bool, files: FileCalls) -> None:
    """Set or clear the flag, in both footers, unless they say so already. Raises ImageError, OSError."""
    with opened(path) as image:
        copy = os.pread(image.fd, FOOTER_SIZE, 0) if image.header is not None else None
    # A crash while the flag was changed leaves two footers that differ; the one at the end counts.
    if image.footer.hidden is not hidden or copy not in (None, image.footer.pack()):
        set_hidden(path, hidden, files=files)
    else:
        _make_durable(path, files)


def _make_durable(path: str, files: FileCalls) -> None:
    """What a killed predecessor wrote can be read, but it may not have come to syncing it."""
    with opened(path) as image:
        files.datasync(image.fd)


def parents_of(path: str) -> list[str]:
    """The names that an image has for its parent; none if it has no parent. Raises ImageError, OSError."""
    with opened(path) as image:
        return parent_names(image) if image.footer.disk_type is DiskType.DIFFERENCING else []


@contextmanager
def opened(path: str) -> Iterator[VhdFile]:
    """The structures of an image, while its file is open to be read. Raises ImageError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield open_vhd(fd, path)
    finally:
        os.close(fd)


def kept_header(directory: SRDirectory, uuid: str) -> str:
    """Where the old header of an image lies while its new one is written, if that can be torn."""
    return os.path.join(directory.service, f"header-{uuid}")


def kept_headers(directory: SRDirectory) -> tuple[str, ...]:
    """The uuids of the images of which a crash left such a header."""
    with suppress(FileNotFoundError):
        names = (_KEPT_HEADER.fullmatch(name) for name in os.listdir(directory.service))
        return tuple(sorted(match[1] for match in names if match is not None))
    return ()
