"""What is left of a snapshot whose data is destroyed: an empty hidden image on the same parent.

It takes a few kilobytes. What it stands on says where the VDI was when the snapshot was taken, so that what
has changed since can still be told from the blocks of the nodes in between. It goes once that is in a log.
All calls here block.

The trap: to other programs a hidden image that nothing stands on is waste. Here the records of its VDI, which
has the type cbt_metadata by then, say that it is needed.
"""

import os
from contextlib import suppress

from gateway.core.errors import XenAPIError
from gateway.core.leases import Lease
from gateway.images.chain import NodeKind
from gateway.images.files import FileCalls, FileIdentity
from gateway.images.vhd.create import create_dynamic, set_hidden
from gateway.images.vhd.image import open_vhd
from gateway.repository.directory import SRDirectory
from gateway.repository.fork import create_sibling, require_same_leaf
from gateway.repository.staging import staging_path


class Emptied:
    """The image of the leaf of `lease` without its own blocks, for the name of `uuid`, whatever has it."""

    def __init__(self, directory: SRDirectory, lease: Lease, uuid: str, files: FileCalls) -> None:
        self._lease = lease
        self._files = files
        self._target = directory.image(uuid, "vhd")
        self._staged = staging_path(directory, uuid)

    def prepare(self) -> FileIdentity:
        """Make the image, and return which file it is. Raises OPERATION_NOT_ALLOWED, ImageError, OSError."""
        nodes = self._lease.chain.nodes
        if nodes[0].kind is NodeKind.RAW:
            raise XenAPIError("OPERATION_NOT_ALLOWED", "a raw image has no snapshots")
        if len(nodes) > 1:
            create_sibling(self._staged, self._lease, self._files)
        else:
            create_dynamic(self._staged, open_vhd(nodes[0].fd, nodes[0].path).size, files=self._files)
        set_hidden(self._staged, True, files=self._files)
        status = os.stat(self._staged)
        return FileIdentity(status.st_dev, status.st_ino)

    def publish(self) -> None:
        """Give it its name, durably. Raises OSError, VDI_IN_USE."""
        require_same_leaf(self._lease)
        self._files.rename(self._staged, self._target)
        self._files.sync_directory(os.path.dirname(self._target))

    def discard(self) -> None:
        """Remove what was made and got no name."""
        with suppress(FileNotFoundError):
            self._files.unlink(self._staged)
