"""What is in the directory of an attached SR, as far as is known: the last scan and what was done here since.

All file calls run in worker threads of this SR's own, so that a file server that hangs stops its SR alone.
What names files runs under `structure_lock`. A scan may take long and holds nobody up; one that saw files
while they were being rearranged looks again. What a crash left half done is recovered before a scan.

The trap: an unmounted share leaves an empty directory under the same path, into which everything could be
written, and from which it would seem that every image had been deleted. So every step that changes the
directory first looks whether it is still the one that was attached.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import structlog
import trio

from gateway.core.errors import XenAPIError
from gateway.core.threads import in_thread
from gateway.images.errors import ImageError
from gateway.images.files import FileCalls, FileIdentity
from gateway.repository.directory import (
    DirectoryUnavailable,
    SRDirectory,
    is_there,
    read_marker,
    require_directory,
)
from gateway.repository.fork import fork_journal_name, recover_forks, unfinished_forks
from gateway.repository.journal_recovery import Recovery, recover_journals
from gateway.repository.journals import child_of, names_at_work, unfinished_journals
from gateway.repository.relink_steps import kept_headers
from gateway.repository.scan import ScannedImage, Scanner, ScanResult

T = TypeVar("T")

log = structlog.get_logger("gateway.repository")


class Survey:
    """The images of an SR and the lock under which they get and lose their names.

    `uuid` is the SR's; None without a marker. `coalescing` holds the uuids of the children that a coalesce of
    ours has under way: their journals are nobody's leftovers.
    """

    def __init__(self, directory: SRDirectory, *, uuid: str | None, writable: bool, files: FileCalls) -> None:
        self.directory = directory
        self.uuid = uuid
        self.writable = writable
        self.structure_lock = trio.Lock()
        self.coalescing: set[str] = set()
        self._files = files
        self._scanner = Scanner(directory)
        self._root = identity_at(directory.root)
        self._images: dict[str, ScannedImage] = {}
        self._scanning = trio.Lock()
        # What was done here since a running scan began, which it may have seen or not; None: destroyed.
        self._since: dict[str, ScannedImage | None] = {}
        self._restructuring = False
        self._names_taken = 0
        self._unresolved: dict[str, str] = {}
        self._unresolved_forks: tuple[str, ...] = ()
        self._threads = trio.CapacityLimiter(8)

    @property
    def images(self) -> Mapping[str, ScannedImage]:
        """What the last scan saw and what was done here since, by uuid."""
        return self._images

    @property
    def files(self) -> FileCalls:
        """How files are changed here."""
        return self._files

    async def available(self) -> bool:
        """Whether the directory is still the one that was attached."""
        with suppress(DirectoryUnavailable):
            await self.require_available()
            return True
        return False

    async def require_available(self) -> None:
        """Before something is concluded from a file that isn't there. Raises DirectoryUnavailable."""
        await self._in_thread(self._require_available)

    async def space(self) -> tuple[int, int]:
        """The size of the file system and how much of it is used, in bytes. Raises OSError."""
        status = await self._in_thread(os.statvfs, self.directory.root)
        return status.f_blocks * status.f_frsize, (status.f_blocks - status.f_bfree) * status.f_frsize

    async def scan(self) -> ScanResult:
        """Look at every file. Raises DirectoryUnavailable, OSError; then nothing is concluded.

        The journals in the answer are those that could not be recovered from and are no coalesce of ours.
        """
        async with self._scanning:
            if self.writable:
                await self._recover()
            while True:
                names_taken = self._names_taken
                self._since = {}
                result = await self._in_thread(self._scan)
                # What it saw in the middle of a relink is not to be concluded from.
                if self._restructuring:
                    async with self.structure_lock:
                        pass
                if names_taken == self._names_taken:
                    break
            images = dict(result.images)
            for uuid, image in self._since.items():
                if image is None:
                    images.pop(uuid, None)
                else:
                    images[uuid] = image
            # What was seen stays as it is: a thread may be reading it while something new is noted here.
            self._images = dict(images)
            owned = set(self.coalescing)
            journals = await self._in_thread(self._still_there, result.journals)
            # What was there at that look, and owned neither before it nor after, isn't a coalesce of ours.
            owned |= self.coalescing
            journals = tuple(name for name in journals if child_of(name) not in owned)
            journals += self._unresolved_forks
            return replace(result, images=images, journals=journals, unresolved=self._unresolved)

    async def require_sound(self) -> ScanResult:
        """A scan after which something may be destroyed: it is known what stands on what.

        Raises OPERATION_NOT_ALLOWED if any file can't be read or lacks its parent, or if an operation was
        interrupted, DirectoryUnavailable, OSError.
        """
        result = await self.scan()
        for problem in (*result.errors(), *result.unfinished()):
            reason = f"nothing is destroyed in this SR until this is resolved: {problem}"
            raise XenAPIError("OPERATION_NOT_ALLOWED", reason)
        return result

    async def settle(self, uuid: str) -> None:
        """Finish or undo what an interrupted operation has left of an image, before another one replaces it.

        Raises OPERATION_NOT_ALLOWED if that can't be done, DirectoryUnavailable, OSError.
        """
        if not await self._in_thread(self._left_of, uuid):
            return
        await self.scan()
        for name in await self._in_thread(self._left_of, uuid):
            if name in self._unresolved:  # else somebody is at work there just now
                reason = f"an operation on the VDI was interrupted and can't be finished: {name}"
                raise XenAPIError("OPERATION_NOT_ALLOWED", f"{reason}: {self._unresolved[name]}")

    async def restructure(self, change: Callable[[], object], uuids: Sequence[str]) -> None:
        """Run `change`, which gives files names in the SR or takes them, and note what `uuids` are then.

        It runs in a worker thread, alone and never cancelled. Raises what it raises, DirectoryUnavailable;
        ImageError, OSError if one of `uuids` can't be looked at afterwards.
        """

        def run() -> None:
            self._require_writable()
            try:
                change()
            except BaseException:
                with suppress(ImageError, OSError):
                    self._look_at(uuids)
                raise
            self._look_at(uuids)

        async with self.structure_lock:
            self._restructuring = True
            known = self._images.keys() & set(uuids)
            try:
                with trio.CancelScope(shield=True):
                    await self._in_thread(run)
            finally:
                self._restructuring = False
                if not known <= self._images.keys():
                    self._names_taken += 1

    async def look_again(self, uuid: str) -> ScannedImage:
        """Read one image's sizes and stamp anew. Raises VDI_MISSING, ImageError, OSError."""
        return await self._in_thread(self._look_again, self.image_path(uuid))

    def image_path(self, uuid: str) -> str:
        """The file of a VDI. Raises VDI_MISSING if there is none."""
        image = self._images.get(uuid)
        if image is None:
            raise XenAPIError("VDI_MISSING")
        return image.path

    def _note(self, uuid: str, image: ScannedImage | None) -> None:
        self._since[uuid] = image
        if image is None:
            self._images.pop(uuid, None)
        else:
            self._images[uuid] = image

    def _look_again(self, path: str) -> ScannedImage:
        image = self._scanner.scan_one(path)
        trio.from_thread.run_sync(self._note, image.uuid, image)
        return image

    def _look_at(self, uuids: Sequence[str]) -> None:
        """Note what these VHDs are now, or that they are gone. Raises the failure of one only at the end."""
        failure: ImageError | OSError | None = None
        for uuid in uuids:
            path = self.directory.image(uuid, "vhd")
            try:
                image = self._scanner.scan_one(path) if is_there(path) else None
            except (ImageError, OSError) as error:
                failure = failure or error
            else:
                trio.from_thread.run_sync(self._note, uuid, image)
        if failure is not None:
            raise failure

    def _scan(self) -> ScanResult:
        self._require_available()
        try:
            return self._scanner.scan()
        except OSError as error:
            raise DirectoryUnavailable(self.directory.root, error.strerror or str(error)) from error

    def _still_there(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if is_there(os.path.join(self.directory.root, name)))

    # Recovery

    def _left_of(self, uuid: str) -> list[str]:
        """The names that say that somebody is, or was, at work on an image; none for a coalesce of ours."""
        if uuid in self.coalescing:
            return []
        names = (*names_at_work(uuid), fork_journal_name(uuid))
        places = (*[self.directory.root] * (len(names) - 1), self.directory.service)
        return [
            name for name, place in zip(names, places, strict=True) if is_there(os.path.join(place, name))
        ]

    async def _recover(self) -> None:
        """Recover from what is half done and nobody's here; one that is under way has the lock."""
        forks: dict[str, str] = {}
        if await self._in_thread(unfinished_forks, self.directory):
            await self.restructure(lambda: forks.update(recover_forks(self.directory, self._files)), ())
        found = [Recovery()]
        if await self._in_thread(self._has_leftovers):
            await self.restructure(lambda: found.append(self._recovered()), ())
        self._tell(replace(found[-1], unresolved={**found[-1].unresolved, **forks}))
        self._unresolved_forks = tuple(forks)

    def _has_leftovers(self) -> bool:
        self._require_available()
        names = unfinished_journals(self.directory)
        return any(child_of(name) not in self.coalescing for name in names) or bool(
            kept_headers(self.directory)
        )

    def _recovered(self) -> Recovery:
        return recover_journals(self.directory, self._files, self.coalescing)

    def _tell(self, recovery: Recovery) -> None:
        root = self.directory.root
        for sentence in recovery.done:
            log.info("recovered from an interrupted operation", directory=root, done=sentence)
        for name, reason in recovery.unresolved.items():
            if self._unresolved.get(name) != reason:
                log.warning("an interrupted operation stays as it is", directory=root, file=name, why=reason)
        self._unresolved = dict(recovery.unresolved)

    # Whether the directory is there

    def _require_writable(self) -> None:
        # Whoever asks for a change of what is attached read-only has been refused before.
        if not self.writable:
            raise XenAPIError("SR_NOT_ATTACHED", self.uuid or self.directory.root)
        self._require_available()

    def _require_available(self) -> None:
        require_directory(self.directory)
        if identity_at(self.directory.root) != self._root:
            raise DirectoryUnavailable(
                self.directory.root, "another directory than the one that was attached"
            )
        if self.writable and read_marker(self.directory) != self.uuid:
            raise DirectoryUnavailable(self.directory.root, "the marker of the SR is missing; is it mounted?")

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await in_thread(call, *arguments, limiter=self._threads)


def identity_at(path: str) -> FileIdentity:
    """What the file or directory at `path` is. Raises OSError."""
    status = os.stat(path)
    return FileIdentity(status.st_dev, status.st_ino)
