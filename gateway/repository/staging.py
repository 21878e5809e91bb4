"""A file that is being filled and then takes the name of a VDI's image in one step, or vanishes.

Until the commit nobody sees it and the old image is untouched; readers keep the old one even after. The
order of the commit is what makes it safe: sync the file, rename it over the image, sync the directory.

The traps: once the rename has begun there is no way back, so nothing may be cancelled from there on, and the
lease has to hold the new file before anybody can find it under the VDI's name. And a rename over the network
may be said to have failed and be done all the same, so from there on the file isn't emptied any more.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Lease, LeaseMode
from gateway.core.records import ImageFormat
from gateway.core.threads import in_thread
from gateway.images.chain import ChainFiles, NodeKind, OpenNode, open_disk
from gateway.images.disk import Disk
from gateway.images.file_locks import FileUse, lock_file
from gateway.images.files import FILES, FileCalls, FileIdentity, identity_of
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.image import open_vhd
from gateway.images.vhd.resize import grow_vhd
from gateway.repository.directory import SRDirectory, is_there
from gateway.repository.scan import FileStamp

# A copy asks so often whether it has been cancelled.
_COPY_PIECE: Final = 64 << 20


def staging_path(directory: SRDirectory, uuid: str) -> str:
    """A new name for a file that will become the image of `uuid`: it says which process fills it."""
    return os.path.join(directory.staging, f"{uuid}.{os.getpid()}.{secrets.token_hex(4)}")


def sweep_staging(directory: SRDirectory, files: FileCalls = FILES) -> list[str]:
    """Remove the staging files that no process has locked; the names of those removed. Blocks.

    What can't be opened or removed stays: it is no part of any disk. Raises OSError if the directory can't be
    listed or synced.
    """
    removed: list[str] = []
    for name in sorted(os.listdir(directory.staging)):
        path = os.path.join(directory.staging, name)
        with contextlib.suppress(OSError):  # FileInUse is one of them
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                lock_file(fd, FileUse.WRITE, path)
                files.unlink(path)
                removed.append(name)
            finally:
                os.close(fd)
    if removed:
        files.sync_directory(directory.staging)
    return removed


@dataclass(frozen=True, slots=True)
class Filling:
    """A staging file that is open. `disk` owns one descriptor; `fd` holds the lock and syncs."""

    path: str
    target: str
    fd: int
    disk: Disk
    whole: bool


class Staging:
    """One image that is to come, made by `Repository.staging` and `Repository.staging_new`.

    `lease` is that of the VDI whose image it replaces, None for an image under a new name. `disk` has the
    image's virtual size: it is to be filled by a worker thread.
    """

    def __init__(
        self,
        lease: Lease | None,
        filling: Filling,
        *,
        structure_lock: trio.Lock,
        require_available: Callable[[], None],
        limiter: trio.CapacityLimiter,
        files: FileCalls = FILES,
    ) -> None:
        self.disk: Disk = filling.disk
        self.committed: FileStamp | None = None
        self._disk_closed = False
        self._may_have_its_name = False
        self._limiter = limiter
        self._filling = filling
        self._lease = lease
        self._structure_lock = structure_lock
        self._require_available = require_available
        self._files = files

    async def commit(self) -> None:
        """Make the staged disk the VDI's image, durably.

        Returns once a power failure cannot bring the old content back. Raises OSError (ENOSPC too) with the
        old content in place, or none if there was none, and VDI_IN_USE if somebody renamed files under the
        lease. Nothing else may use `disk` any more.
        """
        if self.committed is not None:
            raise ValueError("this staging file was committed already")
        await in_thread(self._finish, limiter=self._limiter)
        async with self._structure_lock:
            with trio.CancelScope(shield=True):
                if self._lease is not None:
                    self._lease.move_to(identity_of(self._filling.fd))
                await in_thread(self._publish, limiter=self._limiter)

    def discard(self) -> None:
        """Close everything and, unless it was committed, remove the file. Blocks."""
        try:
            if self.committed is None and not self._may_have_its_name:
                # Closing a disk flushes it, and what is thrown away need not be written out first.
                with contextlib.suppress(OSError):
                    self._files.truncate(self._filling.fd, 0)
            with contextlib.suppress(OSError):
                self._close_disk()
        finally:
            try:
                if self.committed is None:
                    with contextlib.suppress(FileNotFoundError):
                        self._files.unlink(self._filling.path)
            finally:
                # What was committed was synced; of the rest a network file system may say it has no room.
                with contextlib.suppress(OSError):
                    self._files.close(self._filling.fd)

    def _finish(self) -> None:
        self.disk.flush()
        self._close_disk()
        self._files.sync(self._filling.fd)

    def _close_disk(self) -> None:
        if not self._disk_closed:
            self._disk_closed = True
            self.disk.close()

    def _publish(self) -> None:
        self._require_available()
        target = self._filling.target
        stamp = FileStamp.of(os.fstat(self._filling.fd))
        if self._lease is None:
            require_no_image(target)
            self._may_have_its_name = True
            try:
                self._files.rename(self._filling.path, target)
                self._files.sync_directory(os.path.dirname(target))
            except BaseException:
                # Nobody has been told of it.
                with contextlib.suppress(OSError):
                    self._files.unlink(target)
                raise
            self.committed = stamp
            return
        self._require_same_files(self._lease)
        self._may_have_its_name = True
        try:
            self._files.rename(self._filling.path, target)
        except OSError:
            if self._has_its_name(target):
                self.committed = stamp
            raise
        # From here on the new content is what everybody reads, even if its directory cannot be synced.
        self.committed = stamp
        self._files.sync_directory(os.path.dirname(target))

    def _has_its_name(self, target: str) -> bool:
        with contextlib.suppress(OSError):
            status = os.stat(target, follow_symlinks=False)
            return FileIdentity(status.st_dev, status.st_ino) == identity_of(self._filling.fd)
        return False

    @staticmethod
    def _require_same_files(lease: Lease) -> None:
        """A program that knows no locks may have rearranged the chain; its work is not renamed over."""
        for node in lease.chain.nodes:
            try:
                status = os.stat(node.path, follow_symlinks=False)
            except FileNotFoundError:
                status = None
            if status is None or FileIdentity(status.st_dev, status.st_ino) != node.identity:
                name = os.path.basename(node.path)
                raise XenAPIError("VDI_IN_USE", lease.holder.vdi, f"{name} was replaced from outside")


def require_no_image(path: str) -> None:
    """Raise FileExistsError if an image of either format has the name that `path` would give to one."""
    name = path.rpartition(".")[0]
    for existing in (f"{name}.vhd", f"{name}.raw"):
        if is_there(existing):
            raise FileExistsError(errno.EEXIST, "there is an image with this uuid already", existing)


def begin_new(
    directory: SRDirectory, uuid: str, size: int, image_format: ImageFormat, files: FileCalls
) -> Filling:
    """Make the staging file of an image under a new name: empty, of `size` bytes, without a parent. Blocks.

    Raises ImageTooLarge, OSError (ENOSPC too).
    """
    path, target = staging_path(directory, uuid), directory.image(uuid, image_format)
    return _begin_empty(path, target, size, NodeKind(image_format), files)


def begin_filling(
    directory: SRDirectory,
    lease: Lease,
    *,
    whole: bool,
    size: int | None = None,
    cancelled: Callable[[], None],
    files: FileCalls,
) -> Filling:
    """Make the staging file of a leased VDI. Blocks; `cancelled` is asked during a copy and may raise.

    `whole`: an empty image of the same virtual size without a parent. Else a copy of the leaf, which shares
    the file's blocks where the file system can, over the same parents, and made larger if `size` (bytes) is
    given.
    """
    if lease.mode is LeaseMode.READ or lease.is_released or lease.chain.taken_over:
        raise ValueError("staging needs a lease to replace or write whose files are still its own")
    leaf = lease.chain.nodes[0]
    name = os.path.basename(leaf.path).rpartition(".")[0]
    path = staging_path(directory, name)
    if whole:
        is_vhd = leaf.kind is NodeKind.VHD
        present = open_vhd(leaf.fd, leaf.path).size if is_vhd else os.fstat(leaf.fd).st_size
        return _begin_empty(path, leaf.path, present, leaf.kind, files)
    opened: list[int] = []
    try:
        fd = _open_new(path, opened, os.O_CREAT | os.O_EXCL, files)
        _copy(leaf.fd, fd, cancelled, files)
        if size is not None and leaf.kind is NodeKind.VHD:
            grow_vhd(fd, path, size, files=files)
        elif size is not None:
            files.truncate(fd, size)
        disk_fd = files.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        opened.append(disk_fd)
        nodes = [OpenNode(path, disk_fd, identity_of(disk_fd), leaf.kind, leaf.parent)]
        for parent in lease.chain.nodes[1:]:
            # A duplicate shares the lease's lock on the parent, which so lasts as long as the disk.
            opened.append(os.dup(parent.fd))
            nodes.append(OpenNode(parent.path, opened[-1], parent.identity, parent.kind, parent.parent))
        disk = _open_staged(nodes, files)
    except BaseException:
        _abandon(path, opened, files)
        raise
    return Filling(path, leaf.path, fd, disk, whole)


def _begin_empty(path: str, target: str, size: int, kind: NodeKind, files: FileCalls) -> Filling:
    opened: list[int] = []
    try:
        if kind is NodeKind.VHD:
            create_dynamic(path, size, files=files)
        fd = _open_new(path, opened, 0 if kind is NodeKind.VHD else os.O_CREAT | os.O_EXCL, files)
        if kind is NodeKind.RAW:
            files.truncate(fd, size)
        opened.append(files.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC))
        disk = _open_staged([OpenNode(path, opened[-1], identity_of(opened[-1]), kind, None)], files)
    except BaseException:
        _abandon(path, opened, files)
        raise
    return Filling(path, target, fd, disk, whole=True)


def _open_new(path: str, opened: list[int], flags: int, files: FileCalls) -> int:
    """Open the descriptor whose lock says that somebody fills the file, and note it in `opened`."""
    opened.append(files.open(path, os.O_RDWR | flags | os.O_NOFOLLOW | os.O_CLOEXEC))
    lock_file(opened[-1], FileUse.READ, path)
    return opened[-1]


def _open_staged(nodes: list[OpenNode], files: FileCalls) -> Disk:
    # Nobody needs this file after a crash, so growing it needs no sync until the commit.
    return open_disk(ChainFiles(nodes, writable=True), read_only=False, files=files, published=False)


def _abandon(path: str, opened: list[int], files: FileCalls) -> None:
    for descriptor in opened:
        with contextlib.suppress(OSError):  # all are closed whatever one says: what stays open stays locked
            files.close(descriptor)
    with contextlib.suppress(FileNotFoundError):
        files.unlink(path)


def _copy(source: int, target: int, cancelled: Callable[[], None], files: FileCalls) -> None:
    if files.clone(source, target):
        return
    size = os.fstat(source).st_size
    files.truncate(target, size)
    for offset in range(0, size, _COPY_PIECE):
        cancelled()
        files.copy_range(source, offset, target, offset, min(_COPY_PIECE, size - offset))
