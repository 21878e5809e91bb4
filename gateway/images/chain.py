"""The files of a disk: a leaf and the parents it stands on, opened, and a disk made of them.

Opening the files and making a disk are two steps, so that a lease can lock the files in between. A parent
is only ever `<name>.vhd` or `<name>.raw` in the directory of its child, a regular file that is no symbolic
link, with the id that the child expects. The trap: names may be renamed over between the open and the
lock; `chain_is_current` tells, and the caller starts again.
"""

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from gateway.images.disk import FileDisk
from gateway.images.errors import CorruptImage, ImageError, MissingParent, UnsupportedImage
from gateway.images.files import FILES, FileCalls, FileIdentity, close_all, identity_of
from gateway.images.raw import RawDisk
from gateway.images.vhd.chain import VhdChain
from gateway.images.vhd.format import NO_ID, DiskType
from gateway.images.vhd.image import MAX_DEPTH, VhdFile, open_vhd, parent_names

NOT_REGULAR: Final = "this is not a regular file"


class NodeKind(Enum):
    """The formats of the files in a repository."""

    VHD = "vhd"
    RAW = "raw"


@dataclass
class OpenNode:
    """One file of a chain. `parent` is a name in the same directory, or None for the root."""

    path: str
    fd: int
    identity: FileIdentity
    kind: NodeKind
    parent: str | None


@dataclass
class ChainFiles:
    """The open files of one disk, leaf first. They close with it unless a disk took them over."""

    nodes: list[OpenNode]
    writable: bool = False
    taken_over: bool = field(default=False, init=False)

    @property
    def depth(self) -> int:
        """Return how many files there are."""
        return len(self.nodes)

    def close(self) -> None:
        """Close the files, and with them their locks; nothing if a disk owns them or they are closed.

        It never fails: nothing was written by these descriptors, so there is nothing to tell.
        """
        if self.taken_over:
            return
        self.taken_over = True
        with suppress(OSError):
            close_all(node.fd for node in self.nodes)


def open_chain_files(leaf_path: str, *, writable: bool, writable_parents: Sequence[bool] = ()) -> ChainFiles:
    """Open the leaf (for writing if `writable`) and all its parents (for reading).

    `writable_parents` says of the first parents which are opened for writing, to coalesce into them.
    Raises FileNotFoundError when there is no leaf, MissingParent, CorruptImage (loops, wrong ids, more than
    64 levels), UnsupportedImage, OSError.
    """
    directory = os.path.dirname(leaf_path)
    chain = ChainFiles([], writable)
    try:
        node, image = _open_node(leaf_path, writable)
        chain.nodes.append(node)
        while image is not None and image.footer.disk_type is DiskType.DIFFERENCING:
            level = len(chain.nodes) - 1
            for_writing = level < len(writable_parents) and writable_parents[level]
            node, image = _open_parent(directory, chain.nodes[-1], image, writable=for_writing)
            chain.nodes[-1].parent = os.path.basename(node.path)
            chain.nodes.append(node)
            _check_acyclic(chain.nodes)
    except BaseException:
        chain.close()
        raise
    return chain


def open_disk(
    chain: ChainFiles, *, read_only: bool = True, files: FileCalls = FILES, published: bool = True
) -> FileDisk:
    """Make a disk of the open files; it takes the descriptors over, and closing it closes them.

    `published` = False says that nobody needs the file if the machine crashes before the disk is closed
    (a file being staged): growing it then costs no sync. Raises ImageError, OSError.
    """
    if chain.taken_over:
        raise ValueError("the files of this chain are closed or belong to a disk already")
    if not read_only and not chain.writable:
        raise PermissionError(f"{chain.nodes[0].path} was opened for reading only")
    leaf = chain.nodes[0]
    disk: FileDisk
    if leaf.kind is NodeKind.RAW:
        size = os.fstat(leaf.fd).st_size
        disk = RawDisk(leaf.fd, size, read_only=read_only, path=leaf.path, files=files)
    else:
        images = [open_vhd(node.fd, node.path) for node in chain.nodes if node.kind is NodeKind.VHD]
        root = chain.nodes[-1]
        raw_root = (root.fd, root.path) if root.kind is NodeKind.RAW else None
        if images[0].footer.disk_type is DiskType.FIXED:
            size = images[0].size
            disk = RawDisk(leaf.fd, size, read_only=read_only, path=leaf.path, files=files)
        else:
            disk = VhdChain(images, raw_root, read_only=read_only, files=files, published=published)
    chain.taken_over = True
    return disk


def chain_is_current(chain: ChainFiles) -> bool:
    """Return whether every path still names the file that is open and every parent is still the same."""
    expected_id = NO_ID
    for level, node in enumerate(chain.nodes):
        try:
            status = os.stat(node.path, follow_symlinks=False)
            if node.identity != FileIdentity(status.st_dev, status.st_ino):
                return False
            if node.kind is NodeKind.RAW:
                continue
            image = open_vhd(node.fd, node.path)
            if level and image.unique_id != expected_id:
                return False
            if (image.footer.disk_type is DiskType.DIFFERENCING) != (node.parent is not None):
                return False
            if node.parent is not None:
                if node.parent not in parent_names(image):
                    return False
                assert image.header is not None
                expected_id = image.header.parent_id
        except (ImageError, FileNotFoundError):
            return False
    return True


def _kind_of(path: str) -> NodeKind:
    if path.endswith(".vhd"):
        return NodeKind.VHD
    if path.endswith(".raw"):
        return NodeKind.RAW
    raise UnsupportedImage(path, "an image's name ends in .vhd or .raw")


def _check_acyclic(nodes: list[OpenNode]) -> None:
    if len(nodes) > MAX_DEPTH:
        raise CorruptImage(nodes[0].path, f"the chain has more than {MAX_DEPTH} levels")
    last = nodes[-1]
    if any(last.identity == node.identity for node in nodes[:-1]):
        raise CorruptImage(nodes[0].path, f"the chain comes back to {os.path.basename(last.path)}")


def _check_regular(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise CorruptImage(path, NOT_REGULAR)


def _open_node(path: str, writable: bool) -> tuple[OpenNode, VhdFile | None]:
    kind = _kind_of(path)
    # O_NONBLOCK: a fifo of that name must not hold us.
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise CorruptImage(path, NOT_REGULAR) from error
        raise
    try:
        _check_regular(fd, path)
        image = open_vhd(fd, path) if kind is NodeKind.VHD else None
        return OpenNode(path, fd, identity_of(fd), kind, None), image
    except BaseException:
        os.close(fd)
        raise


def _open_parent(
    directory: str, child: OpenNode, image: VhdFile, *, writable: bool
) -> tuple[OpenNode, VhdFile | None]:
    """Open the first file among the names the child has for its parent that is the parent."""
    assert image.header is not None
    expected = image.header.parent_id
    names = parent_names(image)
    stranger: str | None = None
    for name in names:
        path = os.path.join(directory, name)
        try:
            node, parent = _open_node(path, writable)
        except FileNotFoundError:
            continue
        if parent is None or parent.unique_id == expected:
            return node, parent
        os.close(node.fd)
        stranger = stranger or name
    if stranger is not None:
        raise CorruptImage(
            child.path, f"its parent should have the id {expected}, but {stranger} is another disk"
        )
    raise MissingParent(child.path, f"its parent {names[0]} is not in the same directory")
