"""A lease that a client announces: the chain it says it has, held against what its descriptors are.

Nothing that the client says is believed. Blocking: it asks the file system.
"""

import fcntl
import os
import stat

from gateway.access.protocol import Announce
from gateway.core.errors import XenAPIError
from gateway.images.chain import ChainFiles, NodeKind, OpenNode
from gateway.images.files import FileIdentity, identity_of


def verified_chain(fds: list[int], told: Announce, leaf_path: str) -> ChainFiles:
    """The announced chain, by what the descriptors are. Raises OPERATION_NOT_ALLOWED, OSError.

    A reader may have files that have been replaced under their names since; a writer can't.
    """
    if not fds or len(fds) != len(told.files):
        raise _not_as_told(f"{len(told.files)} files were announced and {len(fds)} descriptors came")
    leaf = os.stat(leaf_path, follow_symlinks=False)
    nodes = []
    for index, (fd, claimed) in enumerate(zip(fds, told.files, strict=True)):
        status = os.fstat(fd)
        if identity_of(fd) != claimed:
            raise _not_as_told("a descriptor is of another file than was announced")
        if not stat.S_ISREG(status.st_mode) or status.st_dev != leaf.st_dev:
            raise _not_as_told("a descriptor is not of a file in the SR")
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        wanted = os.O_RDWR if told.write and index == 0 else os.O_RDONLY
        if flags & os.O_PATH or flags & os.O_ACCMODE != wanted:
            raise _not_as_told("a descriptor is open in another way than was announced")
        path = os.readlink(f"/proc/self/fd/{fd}")
        kind = NodeKind.RAW if ".raw" in os.path.basename(path) else NodeKind.VHD
        nodes.append(OpenNode(path, fd, claimed, kind, None))
    if told.write and nodes[0].identity != FileIdentity(leaf.st_dev, leaf.st_ino):
        raise _not_as_told("the VDI has another file by now")
    return ChainFiles(nodes, told.write)


def _not_as_told(why: str) -> XenAPIError:
    return XenAPIError("OPERATION_NOT_ALLOWED", why)
