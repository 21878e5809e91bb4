"""One attached SR: the images in one directory, and everything that may be done to them.

What names files (create, destroy, commit) runs under the `structure_lock` of survey.py, and first looks
whether the directory is still the one that was attached.

The trap: a lease is taken before that lock, never inside it, since taking a lease waits for it.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, Lease, LeaseMode, Leases
from gateway.core.records import VDI, ImageFormat
from gateway.core.threads import in_thread
from gateway.images.errors import MissingParent
from gateway.images.files import FILES, FileCalls
from gateway.repository.cbt_logs import recover_logs
from gateway.repository.directory import (
    DirectoryUnavailable,
    OwnerLock,
    SRDirectory,
    check_marker,
    make_directory,
    make_service_directory,
    remove_service_files,
    require_directory,
    write_marker,
)
from gateway.repository.empty_image import create_empty_image
from gateway.repository.fork import recover_forks
from gateway.repository.intended import forget_all_intended, read_intended
from gateway.repository.journal_recovery import Recovery, recover_journals
from gateway.repository.records_file import RecordsCopy, read_records, write_records
from gateway.repository.scan import ScannedImage, Scanner
from gateway.repository.staging import (
    Filling,
    Staging,
    begin_filling,
    begin_new,
    sweep_staging,
)
from gateway.repository.survey import Survey, identity_at


class Repository(Survey):
    """An SR between `attach` (or `create`) and `detach`. `uuid` is the SR's; None without a marker.

    `intended` are records that a crash has kept from the database.
    """

    def __init__(  # made by `create` and `attach`
        self,
        directory: SRDirectory,
        leases: Leases,
        *,
        uuid: str | None,
        owner: OwnerLock | None,
        swept: tuple[str, ...] = (),
        intended: tuple[VDI, ...] = (),
        recovery: Recovery | None = None,
        files: FileCalls = FILES,
    ) -> None:
        super().__init__(directory, uuid=uuid, writable=owner is not None, files=files)
        self.swept = swept
        self.intended = intended
        self._owner = owner
        self._leases = leases
        if recovery is not None:
            self._tell(recovery)

    @classmethod
    async def create(
        cls, path: str, uuid: str, leases: Leases, *, who: str, files: FileCalls = FILES
    ) -> "Repository":
        """Make a new SR in an empty or absent directory and attach it writable.

        `who` is told to other gateways that want it. Raises OSError, DirectoryOwned.
        """
        directory = SRDirectory(path)

        def make() -> "Repository":
            make_directory(directory, files)
            make_service_directory(directory, files)
            owner = OwnerLock(directory, who, files)
            try:
                write_marker(directory, uuid, files)
                return cls(directory, leases, uuid=uuid, owner=owner, files=files)
            except BaseException:
                owner.release()
                raise

        return await in_thread(make)

    @classmethod
    async def attach(
        cls,
        path: str,
        leases: Leases,
        *,
        writable: bool,
        who: str,
        uuid: str | None = None,
        introduce: str | None = None,
        known_images: bool = False,
        files: FileCalls = FILES,
    ) -> "Repository":
        """Attach an SR that exists. Read-only changes nothing in the directory and asks nobody.

        `uuid` is the SR that has to be there. `introduce`: a directory without a marker is a foreign SR seen
        for the first time, and becomes the SR of this uuid. `known_images` says that images were seen in it
        before: then an empty directory without a marker is one that is not mounted.
        Raises DirectoryUnavailable, DirectoryOwned, OSError.
        """
        directory = SRDirectory(path)

        def attach() -> "Repository":
            require_directory(directory)
            found = check_marker(directory, uuid)
            if not writable:
                if found is None and known_images and not Scanner(directory).scan().images:
                    raise DirectoryUnavailable(path, "it held images and is empty now; is it mounted?")
                return cls(directory, leases, uuid=found, owner=None, files=files)
            if found is None and introduce is None:
                raise DirectoryUnavailable(path, "the marker of the SR is missing; is it mounted?")
            make_service_directory(directory, files)
            owner = OwnerLock(directory, who, files)
            try:
                found = check_marker(directory, uuid)
                if found is None:
                    assert introduce is not None
                    found = introduce
                    write_marker(directory, found, files)
                recover_forks(directory, files)
                intended = read_intended(directory, files)
                recovery = recover_journals(directory, files)
                recover_logs(directory, files)
                swept = tuple(sweep_staging(directory, files))
                return cls(
                    directory,
                    leases,
                    uuid=found,
                    owner=owner,
                    swept=swept,
                    intended=intended,
                    recovery=recovery,
                    files=files,
                )
            except BaseException:
                owner.release()
                raise

        return await in_thread(attach)

    async def detach(self) -> None:
        """Let another gateway have the SR. Who holds leases here keeps them, so end those first."""
        self.writable = False
        owner, self._owner = self._owner, None
        if owner is not None:
            with trio.CancelScope(shield=True):
                await self._in_thread(owner.release)

    async def read_records(self) -> RecordsCopy | None:
        """The copy of the records in the SR, see records_file.py. Raises RecordsUnreadable."""
        return await self._in_thread(read_records, self.directory, self._files if self.writable else None)

    async def forget_intended(self) -> None:
        """The database has the records `intended`. Raises OSError."""
        if self.intended:
            with trio.CancelScope(shield=True):
                await self._in_thread(forget_all_intended, self.directory, self._files)
            self.intended = ()

    async def write_records(self, content: bytes) -> None:
        """Replace that copy. Raises DirectoryUnavailable, OSError."""

        def write() -> None:
            self._require_available()
            write_records(self.directory, content, self._files)

        with trio.CancelScope(shield=True):
            await self._in_thread(write)

    async def lease(self, vdi_uuid: str, mode: LeaseMode, holder: Holder, wait: float | None = None) -> Lease:
        """Lease a VDI's chain; see Leases.acquire.

        Raises VDI_MISSING, VDI_IN_USE, VDI_READONLY in a read-only SR, OPERATION_NOT_ALLOWED for changing
        what other images stand on and for replacing what an interrupted operation has left half done,
        DirectoryUnavailable, ImageError, OSError.
        """
        self.image_path(vdi_uuid)
        if mode is not LeaseMode.READ:
            if not self.writable:
                raise XenAPIError("VDI_READONLY", holder.vdi)
            if mode is LeaseMode.REPLACE:
                await self.settle(vdi_uuid)
            self._require_no_children(self._images, vdi_uuid)
        return await self._acquire(vdi_uuid, mode, holder, wait=wait)

    async def _acquire(
        self,
        uuid: str,
        mode: LeaseMode,
        holder: Holder,
        *,
        parents: Sequence[LeaseMode] = (),
        wait: float | None = None,
        until: float | None = None,
    ) -> Lease:
        try:
            return await self._leases.acquire(
                self.image_path(uuid),
                mode,
                holder,
                parents=parents,
                wait=wait,
                until=until,
                resolving=self.structure_lock,
            )
        except FileNotFoundError:
            await self.require_available()
            raise XenAPIError("VDI_MISSING") from None

    async def lease_to_coalesce(
        self,
        uuid: str,
        mode: LeaseMode,
        holder: Holder,
        *,
        parents: Sequence[LeaseMode] = (),
        wait: float | None = None,
        until: float | None = None,
    ) -> Lease:
        """Lease the chain of any node, hidden or not, with others on it or without; see Leases.acquire.

        Raises VDI_MISSING, VDI_READONLY in a read-only SR, LeaseRefused, DirectoryUnavailable, ImageError,
        OSError.
        """
        if not self.writable:
            raise XenAPIError("VDI_READONLY", holder.vdi)
        return await self._acquire(uuid, mode, holder, parents=parents, wait=wait, until=until)

    async def create_image(self, uuid: str, virtual_size: int, image_format: ImageFormat) -> ScannedImage:
        """Make an empty image of `virtual_size` bytes: a dynamic VHD or a sparse raw file.

        It is there, whole and durable, or not at all. Raises OSError (ENOSPC, EEXIST), ImageTooLarge,
        DirectoryUnavailable.
        """

        def create() -> ScannedImage:
            self._require_writable()
            return self._scanner.scan_one(
                create_empty_image(self.directory, uuid, virtual_size, image_format, self._files)
            )

        async with self.structure_lock:
            with trio.CancelScope(shield=True):
                image = await self._in_thread(create)
                self._note(uuid, image)
        return image

    async def destroy_image(
        self,
        uuid: str,
        holder: Holder,
        *,
        wait: float | None = None,
        before: Callable[[Lease], Awaitable[None]] | None = None,
    ) -> None:
        """Remove an image, durably: that of a VDI, or a hidden one that nothing stands on.

        `before` is called with the lease as soon as nothing is in the way any more.
        Raises OPERATION_NOT_ALLOWED if other images stand on it, or if any file of the SR can't be read or
        lacks its parent: then it is not known what stands on what. Also what `lease` raises.
        """
        try:
            lease = await self.lease(uuid, LeaseMode.WRITE, holder, wait)
        except MissingParent as error:
            raise XenAPIError("OPERATION_NOT_ALLOWED", str(error)) from error
        try:
            # With the lease held, nobody here can make a child of the image.
            self._require_no_children((await self.require_sound()).images, uuid)
            if before is not None:
                await before(lease)
            await self.collect(lease, uuid)
        finally:
            lease.release()
            with trio.CancelScope(shield=True):
                await lease.released()

    async def collect(self, lease: Lease, uuid: str) -> None:
        """Remove the image of `lease` (WRITE), on which nothing stands, durably; the lease stays.

        The caller has called `require_sound` under the lease. Raises OPERATION_NOT_ALLOWED if something
        stands on it after all, VDI_IN_USE, DirectoryUnavailable, OSError.
        """
        self._require_no_children(self._images, uuid)

        def unlink() -> None:
            self._require_writable()
            # A symbolic link leads to the file too, but then it is the link that would go.
            same = identity_at(lease.leaf_path) == lease.chain.nodes[0].identity
            if not same or os.path.islink(lease.leaf_path):
                raise XenAPIError("VDI_IN_USE", lease.holder.vdi, "its file was replaced from outside")
            self._files.unlink(lease.leaf_path)
            trio.from_thread.run_sync(self._note, uuid, None)
            self._files.sync_directory(self.directory.root)

        async with self.structure_lock:
            with trio.CancelScope(shield=True):
                await self._in_thread(unlink)

    async def sync_names(self) -> None:
        """Make durable which images there are, and which not any more. Raises OSError."""
        with trio.CancelScope(shield=True):
            await self._in_thread(self._files.sync_directory, self.directory.root)

    @asynccontextmanager
    async def staging(self, lease: Lease, *, whole: bool, size: int | None = None) -> AsyncIterator[Staging]:
        """A staging file for the VDI of `lease` (REPLACE or WRITE); without a commit it is removed.

        `whole`: empty, of the same virtual size, without a parent. Else a copy of the leaf over the same
        parents, made larger to `size` bytes if that is given. Raises OSError (ENOSPC too), ImageError.
        """

        def begin() -> Filling:
            return begin_filling(
                self.directory,
                lease,
                whole=whole,
                size=size,
                cancelled=trio.from_thread.check_cancelled,
                files=self._files,
            )

        async with self._staged(lease, begin, lease.leaf_path) as staging:
            yield staging

    @asynccontextmanager
    async def staging_new(
        self, uuid: str, virtual_size: int, image_format: ImageFormat
    ) -> AsyncIterator[Staging]:
        """A staging file for an image under a new name; without a commit it is removed.

        It is empty and has no parent. Raises ImageTooLarge, OSError (ENOSPC too).
        """

        def begin() -> Filling:
            return begin_new(self.directory, uuid, virtual_size, image_format, self._files)

        async with self._staged(None, begin, self.directory.image(uuid, image_format)) as staging:
            yield staging

    @asynccontextmanager
    async def _staged(
        self, lease: Lease | None, begin: Callable[[], Filling], target: str
    ) -> AsyncIterator[Staging]:
        def make() -> Staging:
            self._require_writable()
            return Staging(
                lease,
                begin(),
                structure_lock=self.structure_lock,
                require_available=self._require_writable,
                limiter=self._threads,
                files=self._files,
            )

        staging = await self._in_thread(make)
        try:
            yield staging
        finally:
            with trio.CancelScope(shield=True):
                await self._in_thread(staging.discard)
                if staging.committed is not None:
                    await self._in_thread(self._look_again, target)

    async def remove_service_files(self) -> None:
        """Make the directory an ordinary empty one again: the last step of destroying an SR."""

        def remove() -> None:
            self._require_writable()
            remove_service_files(self.directory, self._files)

        with trio.CancelScope(shield=True):
            await self._in_thread(remove)

    @staticmethod
    def _require_no_children(images: Mapping[str, ScannedImage], uuid: str) -> None:
        for image in images.values():
            if image.parent == uuid:
                raise XenAPIError("OPERATION_NOT_ALLOWED", f"the image {image.name} stands on it")
