"""What the kernel asks of the mount, answered from the tree, the descriptions and the open disks.

Thin: each handler finds what is meant and hands on. The traps are pyfuse3's. An exception that is no
FUSEError leaves its request without an answer for ever and ends the mount, so `answered` turns every one into
an errno and a line in the log; and ENOSYS would tell the kernel never to ask again, so none goes out by
accident. A handler that is cancelled hangs its reader: whoever runs these shields them all.
"""

import errno
import functools
import os
import stat
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import pyfuse3
import structlog
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, Operations

from fuse_mount.attributes import Access, Attributes
from fuse_mount.disks import Part, Window
from fuse_mount.errnos import errno_of
from fuse_mount.handles import Document, Handle, Listing
from fuse_mount.tree import LARGEST_PARTITION, Found, Place, Tree, VdiNode
from gateway.images.errors import ImageError

if TYPE_CHECKING:
    from fuse_mount.descriptions import Descriptions
    from fuse_mount.disk_file import OpenFile
    from fuse_mount.disks import Disks
    from fuse_mount.partitions import Partition, Partitions

log = structlog.get_logger(__name__)

_LARGEST_ERRNO: Final = 511  # the kernel takes an answer with a larger one for none
_SILENT_SECONDS: Final = 10.0
_PARTS: Final = {Place.RAW: Part.RAW, Place.VHD: Part.VHD, Place.QCOW2: Part.QCOW2}
_SUFFIX: Final = b".raw"

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def answered(
    handler: Callable[Concatenate["VdiOperations", _Parameters], Coroutine[Any, Any, _Result]],
) -> Callable[Concatenate["VdiOperations", _Parameters], Coroutine[Any, Any, _Result]]:
    """A handler that answers whatever happens."""

    @functools.wraps(handler)
    async def answering(
        self: "VdiOperations", /, *arguments: _Parameters.args, **named: _Parameters.kwargs
    ) -> _Result:
        try:
            return await handler(self, *arguments, **named)
        except FUSEError:
            raise
        except Exception as error:  # noqa: BLE001  one that gets out ends the mount and hangs the reader
            raise FUSEError(self.complain(handler.__name__, arguments[:1], error)) from None

    return answering


def _have_the_kernel_ask_again(inode: int) -> None:
    with suppress(OSError):  # it has forgotten the inode, or is about to unmount
        pyfuse3.invalidate_inode(inode, attr_only=True)


async def _never(*_: Any) -> Any:
    raise FUSEError(errno.EPERM)


class VdiOperations(Operations):
    """The file system. `ready` is set once the kernel has begun to ask."""

    def __init__(
        self,
        tree: Tree,
        disks: "Disks",
        descriptions: "Descriptions",
        partitions: "Partitions",
        access: Access,
        *,
        ask_again: Callable[[int], None] = _have_the_kernel_ask_again,
    ) -> None:
        super().__init__()
        self._ask_again = ask_again
        self.ready: Final = trio.Event()
        self._tree = tree
        self._disks = disks
        self._descriptions = descriptions
        self._partitions = partitions
        self._writable = access.writable
        self._attributes = Attributes(tree, descriptions, access)
        self._files: dict[int, Handle] = {}
        self._reads: dict[int, Callable[[int, int], Awaitable[bytes | memoryview]]] = {}
        self._listings: dict[int, Listing] = {}
        self._last_handle = 0
        self._said: tuple[str, float] = ("", 0.0)

    def init(self) -> None:
        self.ready.set()

    def complain(self, what: str, where: tuple[Any, ...], error: Exception) -> int:
        """The errno of a failure, which the log tells: the same one not again and again."""
        code = errno_of(error)
        if not 0 < code <= _LARGEST_ERRNO or code == errno.ENOSYS:
            code = errno.EIO
        expected = isinstance(error, OSError | ImageError)
        text = f"{what} {where} {error!r}"
        now = time.monotonic()
        if expected and text == self._said[0] and now < self._said[1] + _SILENT_SECONDS:
            return code
        self._said = (text, now)
        told = {"request": what, "vdi": self._uuid_of(what, where), "errno": errno.errorcode.get(code, code)}
        if expected:
            why = error.strerror if isinstance(error, OSError) else None
            log.warning("a request failed", why=why or str(error), **told)
        else:
            log.error("a request failed", exc_info=error, **told)
        return code

    def _uuid_of(self, what: str, where: tuple[Any, ...]) -> str | None:
        """The VDI that a request was about: by its open file or its inode."""
        if what in {"read", "write", "flush", "fsync", "release"}:
            handle = self._files.get(where[0])
            return handle.node.vdi.uuid if handle is not None else None
        try:
            node = self._tree.find(where[0]).node
        except (KeyError, IndexError, TypeError):
            return None
        return node.vdi.uuid if isinstance(node, VdiNode) else None

    # Names and attributes

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        found = self._find(parent_inode)
        self._must_be_there(found)
        if found.place == Place.PARTITIONS:
            inode = await self._partition(found, name)
        else:
            try:
                inode = self._tree.child(parent_inode, name)
            except KeyError:
                raise FUSEError(errno.ENOENT) from None
        attributes = await self._described(inode)
        self._tree.looked_up(inode)
        return attributes

    async def forget(self, inode_list: Any) -> None:
        for inode, times in inode_list:
            self._tree.forget(inode, times)

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return await self._described(inode)

    @answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        """A disk keeps its size, as a block device does; times are nothing that it has. The rest stays."""
        now = await self._described(inode)
        is_disk = self._is_disk(self._find(inode).place)
        kept = (
            (not fields.update_mode or stat.S_IMODE(attr.st_mode) == stat.S_IMODE(now.st_mode))
            and (not fields.update_uid or attr.st_uid == now.st_uid)
            and (not fields.update_gid or attr.st_gid == now.st_gid)
        )
        if not (is_disk and self._writable and kept):
            raise FUSEError(errno.EPERM if self._writable else errno.EROFS)
        return now

    @answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        node, place = self._find(inode)
        if place != Place.LINK or not isinstance(node, VdiNode):
            raise FUSEError(errno.EINVAL)
        return self._tree.target(node)

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """No sizes: what is free is the SRs' matter, and nothing can be added here."""
        told = pyfuse3.StatvfsData()
        told.f_bsize = told.f_frsize = 4096
        told.f_namemax = 255
        return told

    def _find(self, inode: int) -> Found:
        try:
            return self._tree.find(inode)
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    @staticmethod
    def _must_be_there(found: Found) -> None:
        """Of what has gone nothing is found or opened any more.

        With ESTALE the kernel walks the path anew and asks for each name: what came in its place is found
        at once, and not when the kernel stops believing in the name.
        """
        if found.node is not None and found.node.gone:
            raise FUSEError(errno.ESTALE)

    @staticmethod
    def _is_disk(place: int) -> bool:
        return place == Place.RAW or place > Place.FIRST_PARTITION

    async def _described(self, inode: int) -> EntryAttributes:
        """Attributes for which the gateway may be asked how large an image in a format would be."""
        node, place = self._find(inode)
        if place in (Place.VHD, Place.QCOW2) and isinstance(node, VdiNode) and not node.gone:
            try:
                await self._descriptions.describe(node.vdi.uuid)
            except (OSError, ImageError) as error:
                # Looking at a directory must work; who opens the file is told.
                log.debug("the size of a file is not known", vdi=node.vdi.uuid, why=str(error))
        return self._attributes.of(inode)

    # Directories

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        self._last_handle += 1
        handle = self._last_handle
        self._listings[handle] = Listing(inode, await self._entries(inode))
        return handle

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0 and listing.begun:  # rewinddir()
            listing.entries = await self._entries(listing.inode)
        listing.begun = True
        entries = listing.entries
        for position in range(start_id, len(entries)):
            name, inode = entries[position]
            try:
                attributes = self._attributes.of(inode)
            except FUSEError:
                continue  # It has gone since.
            if not pyfuse3.readdir_reply(token, name, attributes, position + 1):
                return
            self._tree.looked_up(inode)

    @answered
    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    async def _entries(self, inode: int) -> list[tuple[bytes, int]]:
        found = self._find(inode)
        self._must_be_there(found)
        if found.place != Place.PARTITIONS:
            return self._tree.entries(inode)
        node, partitions = await self._partitions_of(found)
        return [
            (b"%d" % number + _SUFFIX, self._tree.inode(node, Place.FIRST_PARTITION + number))
            for number in partitions
        ]

    async def _partition(self, found: Found, name: bytes) -> int:
        """The inode of partitions/<n>.raw."""
        digits = name.removesuffix(_SUFFIX)
        if not digits.isdigit() or name != b"%d" % int(digits) + _SUFFIX:
            raise FUSEError(errno.ENOENT)
        node, partitions = await self._partitions_of(found)
        if int(digits) not in partitions:
            raise FUSEError(errno.ENOENT)
        return self._tree.inode(node, Place.FIRST_PARTITION + int(digits))

    async def _partitions_of(self, found: Found) -> "tuple[VdiNode, Mapping[int, Partition]]":
        """The partitions by their numbers. Takes a lease if the disk was not looked at since it changed."""
        node = found.node
        assert isinstance(node, VdiNode)
        known = {
            each.number: each
            for each in await self._partitions.of(node.vdi.uuid)
            if 0 < each.number <= LARGEST_PARTITION
        }
        self._attributes.remember(node, known)
        return node, known

    # Files

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        found = self._find(inode)
        node, place = found
        assert isinstance(node, VdiNode)
        write = flags & os.O_ACCMODE != os.O_RDONLY
        if write and not self._writable:
            raise FUSEError(errno.EROFS)
        if write and not self._is_disk(place):
            raise FUSEError(errno.EPERM)
        self._must_be_there(found)
        if place == Place.RECORD:
            file: OpenFile = Document(node.document)
        else:
            file = await self._disks.open(node.vdi.uuid, await self._part(found), write=write)
            if self._shows_another(node, place, inode, file.content):
                await file.close()
                raise FUSEError(errno.ESTALE)
        self._last_handle += 1
        handle = self._last_handle
        self._files[handle] = Handle(file, node, write, durable=write and bool(flags & os.O_DSYNC))
        self._reads[handle] = file.read
        await self._tell_size(inode, node, file.size)
        # Each read is a request: no byte is older than the gateway's, and none is kept twice.
        return FileInfo(fh=handle, direct_io=True, keep_cache=False)

    def _shows_another(self, node: VdiNode, place: int, inode: int, content: object) -> bool:
        """Whether files are open at this inode on another content, which the kernel may have in its memory.

        ESTALE has it walk the path anew, to an inode that nobody has open.
        """
        if node.content not in (None, content):
            others = (each.file.content for each in self._files.values() if each.node is node)
            if node.content in others:
                self._tree.renew(node)
        if self._tree.inode(node, place) != inode:
            return True
        node.content = content
        return False

    async def _tell_size(self, inode: int, node: VdiNode, size: int) -> None:
        """Programs believe what the kernel was told of an open file, which may be of before it changed."""
        with suppress(FUSEError, OSError, ImageError):
            if self._attributes.of(inode).st_size != size:
                self._descriptions.forget(node.vdi.uuid)
                await self._descriptions.describe(node.vdi.uuid)
        self._ask_again(inode)

    async def _part(self, found: Found) -> Part | Window:
        node, place = found
        assert isinstance(node, VdiNode)
        if place in _PARTS:
            return _PARTS[Place(place)]
        # What is remembered may be the table of before an upload that has just ended.
        self._descriptions.forget(node.vdi.uuid)
        _, partitions = await self._partitions_of(found)
        partition = partitions.get(place - Place.FIRST_PARTITION)
        if partition is None:
            raise FUSEError(errno.ENOENT)
        return Window(partition.offset, partition.length)

    async def read(self, fh: int, off: int, size: int) -> Any:
        # No await may come between this one and the answer: the bytes may lie in a buffer that is used again.
        # Without `answered`, since each look-up counts when 30,000 of these come in a second.
        try:
            return await self._reads[fh](off, size)
        except Exception as error:  # noqa: BLE001  as in answered
            raise FUSEError(self.complain("read", (fh,), error)) from None

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._files[fh]
        written = await handle.file.write(off, buf)
        if handle.durable:  # the kernel leaves this to the file system
            await handle.file.flush()
        return written

    @answered
    async def flush(self, fh: int) -> None:
        handle = self._files[fh]
        if handle.write:
            await handle.file.flush()

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        # As of any file: sync(1) opens it for reading, and means what others have written to it.
        await self._files[fh].file.flush()

    @answered
    async def release(self, fh: int) -> None:
        handle = self._files[fh]
        try:
            await handle.file.close()
        except Exception as error:  # noqa: BLE001  as in answered, but while it is known whose file it was
            raise FUSEError(self.complain("release", (fh,), error)) from None
        finally:
            del self._files[fh], self._reads[fh]

    # Also root, whom no mode keeps out, changes nothing of what is there.

    create: Any = _never
    mknod: Any = _never
    mkdir: Any = _never
    unlink: Any = _never
    rmdir: Any = _never
    symlink: Any = _never
    rename: Any = _never
    link: Any = _never
