"""Two VHDs from one: a leaf becomes the hidden base copy of two empty children, one with its own name.

The result is that of XenServer's FileSR: the base copy has a new uuid, the children name it relative to
their directory. Both are made in the staging directory; then the base copy's name is linked to the leaf's
file, the children are renamed into place, the leaf's name last, and the base copy is marked as hidden.
Whoever reads the leaf keeps his descriptors and reads on. A leaf that is itself an empty child isn't
multiplied: the new child stands beside it. Where the file system has no hard links (SMB, FAT), the leaf is
renamed to the base copy and has no name for a moment, as in FileSR. All calls here block.

The trap: after a crash, the base copy and the leaf may be one file under two names, or without links the base
copy may be all there is. So a journal lies beside the marker (SM fails the scan of an SR over names that it
doesn't know) from before the first step until after the last. The rename to the leaf's name decides: before
it all is undone, after it the base copy is hidden. The second child goes in both cases, for nobody has been
told of it.

When all files are there, the journal becomes what intended.py keeps until the records are durable.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import msgspec

from gateway.core.errors import XenAPIError
from gateway.core.leases import Lease
from gateway.core.records import VDI
from gateway.core.refs import is_uuid
from gateway.images.chain import NodeKind
from gateway.images.errors import ImageError
from gateway.images.files import FileCalls, FileIdentity
from gateway.images.vhd.create import create_differencing, set_hidden
from gateway.images.vhd.format import DiskType
from gateway.images.vhd.image import VhdFile, open_vhd, parent_names
from gateway.repository.directory import (
    DirectoryUnavailable,
    SRDirectory,
    is_there,
    read_regular,
    replace_file,
)
from gateway.repository.intended import INTENDED_FORMAT, forget_intended, intended_path, write_intended
from gateway.repository.staging import staging_path

MAX_CHAIN_LENGTH: Final = 30
"""The most levels of a chain that XenServer makes (vhdutil.MAX_CHAIN_SIZE)."""

_JOURNAL_FORMAT: Final = INTENDED_FORMAT  # as which it is read once all files are there
_JOURNAL: Final = re.compile(r"fork-[0-9a-f-]{36}\.json")
_LONGEST_JOURNAL: Final = 16 << 20
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})  # link(2); which one, differs


@dataclass(frozen=True, slots=True)
class _Journal:
    """The three uuids of one fork; no `child` is an empty text. `records` are those of what is new."""

    leaf: str
    base: str
    child: str
    records: tuple[VDI, ...] = ()
    format: int = _JOURNAL_FORMAT

    def path(self, directory: SRDirectory) -> str:
        return os.path.join(directory.service, fork_journal_name(self.leaf))


class Fork:
    """One fork of the leaf of `lease`, which keeps writers out. `base` and `child` are new uuids.

    Without a `child` the leaf alone becomes an empty child of a base copy, if it isn't one already. With
    `records` for the child and the base copy their names survive a crash before these are durable; `settle`
    has to be called then.

    After `prepare`, `has_base` says whether there will be a base copy, and `new_leaf` which file the leaf's
    name will then lead to.
    """

    def __init__(
        self,
        directory: SRDirectory,
        lease: Lease,
        *,
        base: str,
        child: str | None,
        records: Sequence[VDI] = (),
        files: FileCalls,
    ) -> None:
        leaf = os.path.basename(lease.leaf_path).rpartition(".")[0]
        self.has_base = True
        self.new_leaf: FileIdentity | None = None
        self._directory = directory
        self._lease = lease
        self._journal = _Journal(leaf, base, child or "", tuple(records))
        self._files = files
        self._staged_leaf = staging_path(directory, leaf)
        self._staged_child = staging_path(directory, child) if child else None

    def prepare(self) -> None:
        """Make the children. Raises SR_BACKEND_FAILURE_109, OPERATION_NOT_ALLOWED, ImageError, OSError."""
        chain = self._lease.chain
        leaf = chain.nodes[0]
        if leaf.kind is not NodeKind.VHD:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "a raw image has no snapshots; copy it instead")
        if chain.depth >= MAX_CHAIN_LENGTH:
            raise XenAPIError("SR_BACKEND_FAILURE_109", "", "The snapshot chain is too long", "")
        image = open_vhd(leaf.fd, leaf.path)
        self.has_base = image.footer.disk_type is not DiskType.DIFFERENCING or image.has_blocks()
        if self.has_base:
            name = f"{self._journal.base}.vhd"
            for path in (self._staged_leaf, self._staged_child):
                if path is not None:
                    create_differencing(path, leaf.path, image, parent_name=name, files=self._files)
            status = os.stat(self._staged_leaf)
            self.new_leaf = FileIdentity(status.st_dev, status.st_ino)
        elif self._staged_child is not None:
            create_sibling(self._staged_child, self._lease, self._files)

    def publish(self) -> None:
        """Give the files their names, durably. It is done or, if it raises, undone at once or by a recovery.

        Raises OSError, and VDI_IN_USE if somebody renamed the leaf under the lease.
        """
        require_same_leaf(self._lease)
        child = self._directory.image(self._journal.child, "vhd")
        if self.has_base:
            try:
                self._publish_with_base(child)
            except BaseException:
                # What can't be recovered now, will be at the next scan.
                with suppress(OSError, DirectoryUnavailable):
                    recover_forks(self._directory, self._files)
                    if is_there(intended_path(self._directory, self._journal.child)):
                        self._take_back(child)
                raise
            return
        if self._staged_child is None:
            return
        try:
            if self._journal.records:
                write_intended(self._directory, self._journal.child, self._journal.records, self._files)
            self._files.rename(self._staged_child, child)
            self._files.sync_directory(self._directory.root)
        except BaseException:
            with suppress(OSError):
                self._take_back(child)
            raise

    def settle(self) -> None:
        """The records are durable, or there is no child: the journal may go."""
        forget_intended(self._directory, self._journal.child, self._files)

    def withdraw(self) -> None:
        """Take the child's name back, since there will be no record of it. Raises OSError."""
        if self._journal.child:
            self._take_back(self._directory.image(self._journal.child, "vhd"))

    def _take_back(self, child: str) -> None:
        with suppress(FileNotFoundError):
            self._files.unlink(child)
        self._files.sync_directory(self._directory.root)
        self.settle()

    def discard(self) -> None:
        """Remove what was made and got no name."""
        for path in (self._staged_leaf, self._staged_child or self._staged_leaf):
            with suppress(FileNotFoundError):
                self._files.unlink(path)

    def _publish_with_base(self, child: str) -> None:
        directory, files = self._directory, self._files
        journal = self._journal.path(directory)
        base = directory.image(self._journal.base, "vhd")
        replace_file(journal, msgspec.json.encode(self._journal) + b"\n", files)
        self._name_base(base)
        files.sync_directory(directory.root)
        if self._staged_child is not None:
            files.rename(self._staged_child, child)
        files.rename(self._staged_leaf, self._lease.leaf_path)
        files.sync_directory(directory.root)
        set_hidden(base, True, files=files)
        if not self._journal.records:
            files.unlink(journal)
        else:
            files.rename(journal, intended_path(directory, self._journal.child))
        files.sync_directory(directory.service)

    def _name_base(self, base: str) -> None:
        leaf = self._lease.leaf_path
        try:
            self._files.link(leaf, base)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Links to a file of somebody else's may be forbidden, too; one that can't be hidden stays.
            os.close(os.open(leaf, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
            self._files.rename(leaf, base)


class Revert:
    """The image of `lease` becomes an empty image over the parent of the empty leaf of `snapshot`."""

    def __init__(self, directory: SRDirectory, lease: Lease, snapshot: Lease, files: FileCalls) -> None:
        self._lease = lease
        self._snapshot = snapshot
        self._directory = directory
        self._files = files
        leaf = os.path.basename(lease.leaf_path).rpartition(".")[0]
        self._staged = staging_path(directory, leaf)
        self.published = False

    def prepare(self) -> FileIdentity:
        """Make the new image, and return which file it is.

        Raises OPERATION_NOT_ALLOWED, VDI_IN_USE, ImageError, OSError.
        """
        leaf = self._snapshot.chain.nodes[0]
        if NodeKind.RAW in (leaf.kind, self._lease.chain.nodes[0].kind):
            raise XenAPIError("OPERATION_NOT_ALLOWED", "a raw image has no snapshots")
        image = open_vhd(leaf.fd, leaf.path)
        if image.footer.disk_type is not DiskType.DIFFERENCING or image.has_blocks():
            raise XenAPIError("VDI_IN_USE", self._lease.holder.vdi, "its snapshot has been changed meanwhile")
        create_sibling(self._staged, self._snapshot, self._files)
        status = os.stat(self._staged)
        return FileIdentity(status.st_dev, status.st_ino)

    def publish(self) -> None:
        """Rename it over the old image, durably. Raises OSError, VDI_IN_USE."""
        require_same_leaf(self._lease)
        self._files.rename(self._staged, self._lease.leaf_path)
        # From here on the snapshot's bytes are what everybody reads, even if the directory can't be synced.
        self.published = True
        self._files.sync_directory(self._directory.root)

    def discard(self) -> None:
        """Remove what was made and got no name."""
        with suppress(FileNotFoundError):
            self._files.unlink(self._staged)


def create_sibling(path: str, lease: Lease, files: FileCalls) -> None:
    """Make an empty image of the size of the leaf of `lease` that stands on the leaf's parent."""
    leaf, node = lease.chain.nodes[:2]
    parent = open_vhd(node.fd, node.path) if node.kind is NodeKind.VHD else None
    size = open_vhd(leaf.fd, leaf.path).size
    create_differencing(path, node.path, parent, virtual_size=size, files=files)


def require_same_leaf(lease: Lease) -> None:
    """Raise VDI_IN_USE if a program that knows no locks replaced the leaf; its work is not renamed over."""
    leaf = lease.chain.nodes[0]
    status = os.stat(leaf.path, follow_symlinks=False)
    if FileIdentity(status.st_dev, status.st_ino) != leaf.identity:
        raise XenAPIError("VDI_IN_USE", lease.holder.vdi, "its file was replaced from outside")


def fork_journal_name(leaf: str) -> str:
    """The name of the journal of a fork of `leaf`, in the directory `service`."""
    return f"fork-{leaf}.json"


def unfinished_forks(directory: SRDirectory) -> list[str]:
    """The names of the journals of forks whose files aren't all there yet."""
    with suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(directory.service) if _JOURNAL.fullmatch(name))
    return []


def recover_forks(directory: SRDirectory, files: FileCalls) -> dict[str, str]:
    """Undo or finish every fork that was interrupted. Doing so again after a crash is safe.

    Where an image or a journal can't be used, all stays as it is: which journals are there still, by name,
    and why. Raises DirectoryUnavailable for a journal that cannot be understood.
    """
    unresolved: dict[str, str] = {}
    for name in unfinished_forks(directory):
        path = os.path.join(directory.service, name)
        try:
            _recover(directory, _read_journal(path), files)
            files.sync_directory(directory.root)  # a killed predecessor may have removed names without
            files.unlink(path)
            files.sync_directory(directory.service)
        except ImageError as error:
            unresolved[name] = f"{os.path.basename(error.path)}: {error.problem}"
        except OSError as error:
            file = os.path.basename(error.filename) + ": " if isinstance(error.filename, str) else ""
            unresolved[name] = f"{file}{error.strerror or error}"
    return unresolved


def _recover(directory: SRDirectory, journal: _Journal, files: FileCalls) -> None:
    leaf, base, child = (directory.image(uuid, "vhd") for uuid in (journal.leaf, journal.base, journal.child))
    if not is_there(leaf) and is_there(base):
        # First of all, and whatever the child is: a scan that finds no leaf forgets the VDI.
        files.rename(base, leaf)
        files.sync_directory(directory.root)
    if journal.child and _is_empty_child(child, base):
        files.unlink(child)
        files.sync_directory(directory.root)
    if not is_there(base):
        return
    if is_there(leaf) and os.path.samefile(leaf, base):
        files.unlink(base)
        files.sync_directory(directory.root)
    elif _stands_on(leaf, base):
        set_hidden(base, True, files=files)


def _read_journal(path: str) -> _Journal:
    try:
        journal = msgspec.json.decode(read_regular(path, _LONGEST_JOURNAL), type=_Journal)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DirectoryUnavailable(path, "not a journal of an interrupted snapshot") from error
    if journal.format != _JOURNAL_FORMAT:
        raise DirectoryUnavailable(path, "the journal was made by another version of the gateway")
    if not all(is_uuid(uuid) for uuid in (journal.leaf, journal.base, journal.child or journal.leaf)):
        raise DirectoryUnavailable(path, "not a journal of an interrupted snapshot")
    return journal


@contextmanager
def _opened(path: str) -> Iterator[VhdFile | None]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield open_vhd(fd, path)
    finally:
        os.close(fd)


def _stands_on(path: str, parent: str) -> bool:
    with _opened(path) as image:
        return _names(image, parent)


def _is_empty_child(path: str, parent: str) -> bool:
    with _opened(path) as image:
        return image is not None and _names(image, parent) and not image.has_blocks()


def _names(image: VhdFile | None, parent: str) -> bool:
    if image is None or image.footer.disk_type is not DiskType.DIFFERENCING:
        return False
    return os.path.basename(parent) in parent_names(image)
