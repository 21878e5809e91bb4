"""What the files and directories look like: owner, mode, size, times.

All of it is known already: nobody is asked here. The trap: the size of a disk in a format is known only once
the gateway was asked about the VDI; until then it is 0, and the kernel must not believe that for a moment.
"""

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from pyfuse3 import EntryAttributes, FUSEError

from fuse_mount.tree import DIRECTORIES, Place, Tree, VdiNode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fuse_mount.descriptions import Descriptions
    from fuse_mount.partitions import Partition

TIMEOUT_SECONDS: Final = 1.0
"""How long the kernel believes a name and what it was told of a file."""

READ_SIZE: Final = 256 << 10
"""Bytes that programs are advised to read at once (st_blksize): each read of a disk is a request."""

_SECTOR: Final = 512  # what st_blocks counts


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what: whether disks may be written to, and whether all users may look or only the owner."""

    writable: bool = False
    others: bool = False
    user: int = field(default_factory=os.geteuid)
    group: int = field(default_factory=os.getegid)

    @property
    def directory_mode(self) -> int:
        """Type and permissions of directories."""
        return stat.S_IFDIR | (0o555 if self.others else 0o500)

    @property
    def file_mode(self) -> int:
        """Type and permissions of files that nobody may write to."""
        return stat.S_IFREG | (0o444 if self.others else 0o400)

    @property
    def disk_mode(self) -> int:
        """Type and permissions of disk.raw and partitions."""
        return self.file_mode | (0o200 if self.writable else 0)


class Attributes:
    """The attributes of every inode."""

    def __init__(self, tree: Tree, descriptions: "Descriptions", access: Access) -> None:
        self._tree = tree
        self._descriptions = descriptions
        self._access = access
        self._modes = (access.directory_mode, access.file_mode, access.disk_mode)
        self._partitions: WeakKeyDictionary[VdiNode, Mapping[int, Partition]] = WeakKeyDictionary()

    def remember(self, node: VdiNode, partitions: "Mapping[int, Partition]") -> None:
        """The VDI has these partitions, by their numbers."""
        self._partitions[node] = partitions

    def of(self, inode: int) -> EntryAttributes:
        """FUSEError ESTALE or ENOENT if there is nothing any more."""
        try:
            node, place = self._tree.find(inode)
        except KeyError:
            raise FUSEError(errno.ESTALE) from None
        told = EntryAttributes()
        told.st_ino = inode
        told.st_uid = self._access.user
        told.st_gid = self._access.group
        told.entry_timeout = told.attr_timeout = TIMEOUT_SECONDS
        changed = self._tree.changed_ns if node is None else node.changed_ns
        told.st_atime_ns = told.st_mtime_ns = told.st_ctime_ns = changed
        if place in DIRECTORIES:
            told.st_mode = self._modes[0]
            told.st_nlink = 2 + self._tree.directories_in(inode)
        else:
            assert isinstance(node, VdiNode)
            self._fill(told, node, place)
        if node is not None and node.gone:
            told.st_nlink = 0
        return told

    def _fill(self, told: EntryAttributes, node: VdiNode, place: int) -> None:
        """Mode and size of a file or a link."""
        _, told.st_mode, disk_mode = self._modes
        uuid = node.vdi.uuid
        known = self._descriptions.known(uuid)
        description = known or self._descriptions.last_known(uuid)
        stored: int | None = None
        match place:
            case Place.LINK:
                told.st_mode = stat.S_IFLNK | 0o777
                told.st_size = len(self._tree.target(node))
            case Place.RECORD:
                told.st_size = len(node.document)
            case Place.RAW:
                told.st_mode = disk_mode
                told.st_size = node.vdi.size if known is None else known.size
                stored = node.vdi.stored if description is None else description.stored_bytes
                # Never none: `tar --sparse` reads no file that has no blocks, and somebody may be writing.
                stored = max(stored, 1)
            case Place.VHD:
                told.st_size = 0 if description is None else description.vhd_size
            case Place.QCOW2:
                told.st_size = 0 if description is None else description.qcow2_size
            case _:
                partition = self._partitions.get(node, {}).get(place - Place.FIRST_PARTITION)
                if partition is None:
                    raise FUSEError(errno.ENOENT)
                told.st_mode = disk_mode
                told.st_size = partition.length
        if place in (Place.VHD, Place.QCOW2) and known is None:
            # Whoever wants to know asks for this one, and then the gateway is asked.
            told.entry_timeout = told.attr_timeout = 0
        if place not in (Place.LINK, Place.RECORD):
            told.st_blksize = READ_SIZE
        told.st_blocks = -(-(told.st_size if stored is None else min(stored, told.st_size)) // _SECTOR)
