"""One candidate of coalescing on its way into its parent: copy, flush, relink.

The copy has the child and the parent to itself (WRITE leases) and stops at the next block when somebody waits
for them; what is copied becomes durable while people are in again, for the child still hides it. Then the
relink, which moves no data, has both once more. Between turns only this object knows how far the copy came.

The traps: a lease's locks end when its descriptors close, so the merge has descriptors of its own, which must
be of the same files; and a leaf may be written to between two turns, so what was copied counts only while
both files are as they were left. Between a file's change and its record's nothing may be cancelled.
"""

import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, Lease, LeaseMode
from gateway.core.threads import in_thread
from gateway.images.errors import ImageError
from gateway.images.files import FileIdentity, identity_of
from gateway.images.vhd.image import open_vhd
from gateway.images.vhd.merge import Merge
from gateway.repository.coalesce_plan import Candidate, CoalesceKind
from gateway.repository.coalesce_records import CoalesceRecords
from gateway.repository.journals import JournalKind, create_journal, remove_journal
from gateway.repository.relink_steps import inline_relink, leaf_relink
from gateway.repository.repository import Repository
from gateway.repository.scan import FileStamp

T = TypeVar("T")

_FileState: TypeAlias = tuple[FileIdentity, int, int, int]
# So often is looked whether somebody wants what is being made durable.
_WANTED_SECONDS: Final = 0.01
_OPEN: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class CandidateGone(Exception):  # noqa: N818 - people changed the chain, which they may
    """The chain has become another meanwhile, and there is nothing left of this to do."""


@dataclass(frozen=True, slots=True)
class _Left:
    """How a turn left the two files: a later one goes on at `position` (a block) if they are still so."""

    position: int
    complete: bool
    child: _FileState
    parent: _FileState
    content_id: str


class CoalesceRun:
    """One candidate. `take` a lease, `copy` under it until that says True, `take` one again and `relink`."""

    def __init__(
        self,
        repository: Repository,
        records: CoalesceRecords,
        candidate: Candidate,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self.candidate: Final = candidate
        self.total = 0
        self.copy_seconds = 0.0
        self.flush_seconds = 0.0
        self.relink_seconds = 0.0
        self.finished = False
        self._done = 0
        self._repository = repository
        self._records = records
        self._limiter = limiter
        self._merge: Merge | None = None
        self._opened: list[int] = []
        self._kept: int | None = None
        self._left: _Left | None = None

    @property
    def done(self) -> int:
        """How many of the `total` bytes of the child's blocks are in the parent."""
        return self._merge.done if self._merge is not None else self._done

    @property
    def copied(self) -> bool:
        """Whether all is in the parent, durably, as far as is known without looking at the files."""
        return self.candidate.relink_only or (self._left is not None and self._left.complete)

    async def take(self, holder: Holder, *, wait: float = 0.0, until: float | None = None) -> Lease:
        """Lease the child and the parent to write into them; `wait` as for any lease.

        With `until` (trio's clock) it is waited for up to then, and goes before those who come later. Raises
        LeaseRefused, CandidateGone, ImageError, OSError.
        """
        self._require_candidate()
        if until is not None:
            wait = max(wait, until - trio.current_time())
        lease = await self._repository.lease_to_coalesce(
            self.candidate.child, LeaseMode.WRITE, holder, parents=(LeaseMode.WRITE,), wait=wait, until=until
        )
        try:
            self._require_candidate(lease)
        except BaseException:
            lease.release()
            raise
        return lease

    @property
    def must_grow(self) -> bool:
        """Whether the parent is smaller than the child, and has to be made as large first."""
        images = self._repository.images
        child, parent = images.get(self.candidate.child), images.get(self.candidate.parent)
        return child is not None and parent is not None and parent.virtual_size < child.virtual_size

    async def grow_parent(self, holder: Holder) -> None:
        """Make the parent as large as the child. Raises what `take` raises."""
        self._require_candidate()
        size = self._repository.images[self.candidate.child].virtual_size
        parent = self.candidate.parent
        lease = await self._repository.lease_to_coalesce(parent, LeaseMode.REPLACE, holder, wait=0)
        try:
            async with self._repository.staging(lease, whole=False, size=size) as staging:
                with trio.CancelScope(shield=True):
                    await staging.commit()
        finally:
            lease.release()
            with trio.CancelScope(shield=True):
                await lease.released()
                await self._records.renew_content(parent)
                await self._records.look_again(parent)

    async def copy(self, lease: Lease, holder: Holder) -> bool:
        """Copy under `lease` until somebody wants the chain; whether all is copied.

        What was copied is durable on return. The lease has ended, unless all is copied and nobody has wanted
        it. Cancelled, the copy stops at the next block. Raises ImageError, OSError; then parent and child
        together have the bytes that they had.
        """
        began = time.monotonic()
        self._repository.coalescing.add(self.candidate.child)
        complete = durable = False
        try:
            with trio.CancelScope(shield=True):
                content_id = self._records.content_id(self.candidate.child)
                await self._records.renew_content(self.candidate.parent)
                merge = await self._in_thread(self._begin, lease, content_id)
                self.total, self._merge = merge.total, merge
            try:
                complete = await self._in_thread(merge.copy_some, _until_wanted(lease))
            finally:
                self.copy_seconds += time.monotonic() - began
                with trio.CancelScope(shield=True):
                    await self._flush(merge, lease, complete, holder)
                    # Who was let in and read the parent itself must not go on later with what it is now.
                    await self._records.renew_content(self.candidate.parent)
                    await self._records.look_again(self.candidate.parent)
            durable = complete
        finally:
            if not durable:
                lease.release()
            # A journal that could not be removed is the next scan's business.
            self._repository.coalescing.discard(self.candidate.child)
        return complete

    async def relink(self, lease: Lease) -> bool:
        """Take the child out of the chain under `lease`, which ends here; False if it has to be copied anew.

        The caller has scanned under the lease. Never cancelled. Raises CandidateGone, ImageError, OSError;
        what it leaves half done then, the journal tells the next scan.
        """
        self._require_candidate(lease)
        with trio.CancelScope(shield=True):
            # The last close of a deleted file frees its blocks, which may take long: not while people wait.
            path = self._repository.image_path(self.candidate.child)
            self._kept = await self._in_thread(self._repository.files.open, path, os.O_RDONLY | _OPEN)
            try:
                content_id = self._records.content_id(self.candidate.child)
                as_left = await self._in_thread(self._is_as_left, lease, content_id)
                if as_left or self.candidate.relink_only:
                    self._repository.coalescing.add(self.candidate.child)
                    await self._relink()
                    self.finished = True
                else:
                    self._left, self._done = None, 0
            finally:
                self._repository.coalescing.discard(self.candidate.child)
                lease.release()
                await lease.released()
                if not self.finished:
                    await self.free_blocks()
        return self.finished

    async def free_blocks(self) -> None:
        """Give back the space of the image that went. To be called once it is `finished`."""
        kept, self._kept = self._kept, None
        if kept is not None:
            await self._in_thread(self._repository.files.close, kept)
            await self._records.refresh_sizes()

    def _require_candidate(self, lease: Lease | None = None) -> None:
        """Raise CandidateGone unless the two images are to each other as they were when this was planned.

        Their files have to be those of `lease`, if it is given.
        """
        images = self._repository.images
        child, parent = images.get(self.candidate.child), images.get(self.candidate.parent)
        inline = self.candidate.kind is CoalesceKind.INLINE
        if child is None or parent is None:
            raise CandidateGone("the image was destroyed")
        if child.parent != parent.uuid or not parent.hidden or child.hidden is not inline:
            raise CandidateGone("the image stands on another one by now")
        children = self._children(child.uuid)
        if bool(children) is not inline and not self.candidate.relink_only:
            raise CandidateGone("the images that stand on it have become others")
        if not self.candidate.relink_only and self._children(parent.uuid) != [child.uuid]:
            raise CandidateGone("another image stands on its parent too")
        if any(images[uuid].error is not None for uuid in (child.uuid, parent.uuid, *children)):
            raise CandidateGone("one of the images cannot be read")
        if lease is not None and [node.path for node in lease.chain.nodes[:2]] != [child.path, parent.path]:
            raise CandidateGone("the image stands on another one by now")

    def _children(self, uuid: str) -> list[str]:
        return [image.uuid for image in self._repository.images.values() if image.parent == uuid]

    # In a worker thread

    def _begin(self, lease: Lease, content_id: str) -> Merge:
        """Open the two files once more and go on where the last turn stopped; the journal says that we do."""
        opened: list[int] = []
        try:
            for node, mode in zip(lease.chain.nodes[:2], (os.O_RDONLY, os.O_RDWR), strict=True):
                opened.append(self._repository.files.open(node.path, mode | _OPEN))
                _require_same(opened[-1], node.identity)
            position = self._left.position if self._left and self._is_as_left(lease, content_id) else 0
            child, parent = (
                open_vhd(fd, node.path) for fd, node in zip(opened, lease.chain.nodes, strict=False)
            )
            merge = Merge(child, parent, first_block=position, files=self._repository.files)
            self._begin_journal()
        except BaseException:
            for fd in opened:
                self._repository.files.close(fd)
            raise
        self._opened = opened
        return merge

    def _begin_journal(self) -> None:
        if self.candidate.kind is CoalesceKind.INLINE:
            create_journal(
                self._repository.directory,
                JournalKind.COALESCE,
                self.candidate.child,
                files=self._repository.files,
            )

    def _is_as_left(self, lease: Lease, content_id: str) -> bool:
        left = self._left
        return (
            left is not None
            # By their names: who replaces a file without a lock, as rsync does, must not lose it to a rename.
            and [_state(os.lstat(node.path)) for node in lease.chain.nodes[:2]] == [left.child, left.parent]
            and content_id == left.content_id
        )

    async def _flush(self, merge: Merge, lease: Lease, complete: bool, holder: Holder) -> None:
        """Make the copy durable; people are let in if they want to, or if it isn't complete."""
        began = time.monotonic()
        # The child's, before anybody can write to it.
        child, content_id = _state(os.fstat(self._opened[0])), self._records.content_id(self.candidate.child)
        finished: _FileState | OSError
        try:
            async with trio.open_nursery() as beside:
                await beside.start(self._let_in, lease, complete, holder)
                try:
                    finished = await self._in_thread(self._finish, merge)
                except OSError as error:
                    # Raised in here it would become a group.
                    finished = error
                beside.cancel_scope.cancel()
            if isinstance(finished, OSError):
                raise finished
            self._left = _Left(merge.position, complete, child, finished, content_id)
        finally:
            self.flush_seconds += time.monotonic() - began
            self._done = merge.done
            self._merge = None
            for fd in self._opened:
                self._repository.files.close(fd)

    async def _let_in(
        self,
        lease: Lease,
        complete: bool,
        holder: Holder,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """End `lease` as soon as it is wanted, or at once; then other programs are kept from the parent."""
        if complete:
            task_status.started()
            while not lease.wanted:  # noqa: ASYNC110 - the table tells nobody of it
                await trio.sleep(_WANTED_SECONDS)
        lease.release()
        kept: Lease | None = None
        with suppress(XenAPIError, ImageError, OSError):
            kept = await self._repository.lease_to_coalesce(
                self.candidate.parent, LeaseMode.READ, holder, wait=0
            )
        if not complete:
            task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            if kept is not None:
                kept.release()

    def _finish(self, merge: Merge) -> _FileState:
        merge.finish()
        if self.candidate.kind is CoalesceKind.INLINE:
            remove_journal(
                self._repository.directory,
                JournalKind.COALESCE,
                self.candidate.child,
                files=self._repository.files,
            )
        return _state(os.fstat(self._opened[1]))

    # The relink

    async def _relink(self) -> None:
        child, parent = self.candidate.child, self.candidate.parent
        directory, files = self._repository.directory, self._repository.files
        if self.candidate.kind is CoalesceKind.LEAF:
            kept, gone = [child], parent

            def change() -> None:
                leaf_relink(directory, leaf=child, parent=parent, files=files)
        else:
            children = self._children(child)
            kept, gone = [*children, parent], child

            def change() -> None:
                inline_relink(directory, child=child, parent=parent, children=children, files=files)

        content_ids = self._records.content_ids(await self._in_thread(self._stamps, kept))
        # The parent has the child's bytes by now; if that is a leaf, with its name.
        content_ids[parent] = self._records.content_id(child)
        try:
            await self._repository.restructure(self._measured(change), (gone, *kept))
        finally:
            await self._records.chain_changed(gone, content_ids)

    def _stamps(self, uuids: list[str]) -> dict[str, FileStamp]:
        return {uuid: FileStamp.of(os.lstat(self._repository.image_path(uuid))) for uuid in uuids}

    def _measured(self, change: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            began = time.monotonic()
            try:
                change()
            finally:
                self.relink_seconds = time.monotonic() - began

        return run

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await in_thread(call, *arguments, limiter=self._limiter)


def _require_same(fd: int, identity: FileIdentity) -> None:
    if identity_of(fd) != identity:
        raise CandidateGone("its file was replaced from outside")


def _state(status: os.stat_result) -> _FileState:
    """By what a change of a file is noticed."""
    identity = FileIdentity(status.st_dev, status.st_ino)
    return identity, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _until_wanted(lease: Lease) -> Callable[[], bool]:
    """Whether a copy has to stop, asked before each block by its thread.

    The first block is copied in any case: whoever comes often must not keep it from getting anywhere.
    """
    blocks = itertools.count()

    def stop() -> bool:
        try:
            trio.from_thread.check_cancelled()
        except trio.Cancelled:
            # It is raised again in the task, once what was copied is safe.
            return True
        return next(blocks) > 0 and lease.wanted

    return stop
