"""Leases: the right to use the files of a VDI's chain, against everybody in this gateway and outside it.

A lease has two layers. The table (lease_table.py) orders those who come through this gateway; locks on the
files (images/file_locks.py) keep out, and respect, programs that know nothing of it. Both belong to files,
not to names, while callers name a VDI. So taking a lease is one loop: open the chain, be granted its files,
lock them, look again whether the names still lead there, and start over if they do not.

The trap: from the first step on descriptors are open, and a task may be cancelled at every await. Every file
call runs in a worker thread that is never abandoned, and what it opened is closed whatever happens.
"""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import trio

from gateway.core.errors import XenAPIError
from gateway.core.lease_table import Grant, Holder, LeaseMode, LeaseTable, TableBusy
from gateway.core.limits import Limits
from gateway.images.chain import ChainFiles, chain_is_current, open_chain_files, open_disk
from gateway.images.disk import Disk
from gateway.images.file_locks import FileInUse, FileUse, lock_file
from gateway.images.files import FILES, FileCalls, FileIdentity

__all__ = ["Holder", "Lease", "LeaseMode", "Leases", "Step"]

Step = Literal["resolved", "granted", "locked", "checked"]
T = TypeVar("T")

# A foreign holder's end is not announced: it has to be asked for, soon at first since most closes are near.
_FIRST_RETRY_SECONDS = 0.01
_SLOWEST_RETRY_SECONDS = 0.25

# Even without any wait, a chain that changed while it was locked is resolved again a few times.
_FEWEST_ATTEMPTS = 4


class Lease:
    """The right to use one chain, from `Leases.acquire` until `release`."""

    def __init__(self, leases: "Leases", chain: ChainFiles, mode: LeaseMode, grant: Grant) -> None:
        self.chain = chain
        self.mode = mode
        self._leases = leases
        self._grant = grant
        self._guard = threading.Lock()
        self._descriptors_taken = False
        self._released = False
        self._settled = trio.Event()

    @property
    def holder(self) -> Holder:
        """Who holds it, and what for."""
        return self._grant.holder

    def work_under(self, task: str) -> None:
        """Name the task (its reference) under which the holder works, if it was not known before."""
        self._leases.work_under(self._grant, task)

    @property
    def since(self) -> float:
        """When it was granted, by trio's clock."""
        return self._grant.since

    @property
    def leaf_path(self) -> str:
        """The file that the VDI's name led to when the lease was taken."""
        return self.chain.nodes[0].path

    @property
    def is_released(self) -> bool:
        """Whether `release` was called."""
        return self._released

    def open_disk(self, *, files: FileCalls = FILES) -> Disk:
        """The leased chain as a disk, writable if this is a WRITE lease. It blocks: for a worker thread.

        The disk takes the descriptors over, and the locks on the files live as long as it is open. Once only.
        Raises ImageError, OSError; ValueError when the lease has ended or gave its descriptors away already.
        """
        with self._guard:
            if self._released or self._descriptors_taken:
                raise ValueError(f"{self.leaf_path}: this lease has no descriptors to open a disk with")
            self._descriptors_taken = True
        try:
            return open_disk(self.chain, read_only=self.mode is not LeaseMode.WRITE, files=files)
        except BaseException:
            self.chain.close()
            raise

    async def give_away(self) -> None:
        """Close the descriptors here, because another process has them now, and with them the locks.

        The lease stays in the table until `release`. Raises ValueError when there are none any more.
        """
        with self._guard:
            if self._released or self._descriptors_taken:
                raise ValueError(f"{self.leaf_path}: this lease has no descriptors to give away")
            self._descriptors_taken = True
        await self._leases.close_chain(self.chain)

    def move_to(self, file: FileIdentity) -> None:
        """Hold `file` with this lease's mode too, because it is about to be renamed over the leaf.

        To be called before the rename, while nobody else can know the file. Whoever then finds the new file
        under the name meets this lease there as it would have at the old one.
        """
        self._leases.extend(self._grant, file, self.mode)

    def release(self) -> None:
        """End the lease; doing so again changes nothing.

        The descriptors are closed in a worker thread, since the last close of a deleted file frees all its
        blocks; only then are those who wait let in. `released` waits for that. With a disk open, the table
        lets others in at once and the locks on the files end when the disk is closed.
        """
        with self._guard:
            if self._released:
                return
            self._released = True
            close = not self._descriptors_taken
        if close:
            trio.lowlevel.spawn_system_task(self._close, name="close the files of a lease")
        else:
            self._end()

    async def released(self) -> None:
        """Wait until a release has let others in."""
        await self._settled.wait()

    async def _close(self) -> None:
        try:
            await self._leases.close_chain(self.chain)
        finally:
            self._end()

    def _end(self) -> None:
        self._leases.end(self._grant)
        self._settled.set()


@dataclass
class _Attempt:
    """What one caller of `acquire` has in hand so far."""

    chain: ChainFiles | None = None
    grant: Grant | None = None


class Leases:
    """All leases of this gateway.

    `step` is awaited after each step of the loop in `acquire`, so that a test can hold it there. `changed` is
    called with a VDI's reference whenever its operations have become others.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        step: Callable[[Step], Awaitable[None]] | None = None,
        changed: Callable[[str], None] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._step = step or _go_on
        self._table = LeaseTable(changed)
        # Its own threads: a file server that hangs here must not stop transfers or the database.
        self._threads = trio.CapacityLimiter(16)

    async def acquire(
        self,
        leaf_path: str,
        mode: LeaseMode,
        holder: Holder,
        *,
        parents_mode: LeaseMode = LeaseMode.READ,
        wait: float | None = None,
        resolving: trio.Lock | None = None,
    ) -> Lease:
        """Lease the chain whose leaf is at `leaf_path`.

        Waits up to `wait` seconds (by default the limit `lease_wait`) for everybody else together, then
        raises VDI_IN_USE with the one who stands in the way. `resolving` is held while the chain is opened:
        the lock of the SR whose files may be about to be renamed. A missing file is FileNotFoundError, a
        broken one an ImageError.
        """
        deadline = trio.current_time() + (self._limits.lease_wait if wait is None else wait)
        attempt = _Attempt()
        try:
            await self._settle(
                attempt,
                leaf_path,
                mode,
                holder,
                parents_mode=parents_mode,
                deadline=deadline,
                resolving=resolving,
            )
            assert attempt.chain is not None
            assert attempt.grant is not None
            return Lease(self, attempt.chain, mode, attempt.grant)
        except BaseException:
            await self._drop_chain(attempt)
            if attempt.grant is not None:
                self._table.release(attempt.grant)
            raise

    async def adopt(self, chain: ChainFiles, mode: LeaseMode, holder: Holder) -> Lease:
        """Enter a lease that another process has kept over a restart, READ or WRITE; `chain` are its files.

        The kernel decides whether it still is one: the locks are taken once more on the same open file
        descriptions, which changes nothing if they are there, and fails if somebody else has come between.
        The table is not asked, since those who were granted a file after the restart don't get its locks.
        Raises VDI_IN_USE, OSError; then, too, the chain is closed.
        """
        try:
            deadline = trio.current_time() + self._limits.lease_wait
            while True:
                try:
                    await self._in_thread(_lock_chain, chain, mode, LeaseMode.READ)
                    break
                except FileInUse as busy:
                    # Whoever tries to get the files in vain has taken some of the bytes for a moment.
                    if trio.current_time() >= deadline:
                        raise XenAPIError("VDI_IN_USE", holder.vdi, f"{busy.path}: {busy.why}") from None
                await trio.sleep(_FIRST_RETRY_SECONDS)
        except BaseException:
            await self.close_chain(chain)
            raise
        return Lease(self, chain, mode, self._table.adopt(_files_of(chain, mode, LeaseMode.READ), holder))

    @asynccontextmanager
    async def hold(
        self,
        leaf_path: str,
        mode: LeaseMode,
        holder: Holder,
        *,
        parents_mode: LeaseMode = LeaseMode.READ,
        wait: float | None = None,
        resolving: trio.Lock | None = None,
    ) -> AsyncIterator[Lease]:
        """`acquire` for the time of a block; after it others have been let in."""
        lease = await self.acquire(
            leaf_path, mode, holder, parents_mode=parents_mode, wait=wait, resolving=resolving
        )
        try:
            yield lease
        finally:
            lease.release()
            with trio.CancelScope(shield=True):
                await lease.released()

    def holders_of(self, file: FileIdentity) -> tuple[Holder, ...]:
        """Who holds `file` now."""
        return self._table.holders_of(file)

    def holders_for(self, vdi: str) -> tuple[Holder, ...]:
        """Who holds a lease for the VDI with this reference: its current operations."""
        return tuple(grant.holder for grant in self._table.grants_for(vdi))

    def operations_for(self, vdi: str) -> dict[str, str]:
        """VDI.current_operations: the holders' operations by their tasks.

        A holder without a task has a dummy reference of the form that xapi uses for such work.
        """
        return {
            grant.holder.task or f"DummyRef:|{grant.uuid}|{grant.holder.who}": grant.holder.operation
            for grant in self._table.grants_for(vdi)
        }

    def modes_for(self, vdi: str) -> tuple[LeaseMode, ...]:
        """The strongest mode of each lease that is held for the VDI with this reference."""
        strength = list(LeaseMode)
        return tuple(max(grant.files.values(), key=strength.index) for grant in self._table.grants_for(vdi))

    def work_under(self, grant: Grant, task: str) -> None:
        """See Lease.work_under."""
        self._table.work_under(grant, task)

    def extend(self, grant: Grant, file: FileIdentity, mode: LeaseMode) -> None:
        """See Lease.move_to."""
        self._table.extend(grant, file, mode)

    def end(self, grant: Grant) -> None:
        """Let others in; see Lease.release."""
        self._table.release(grant)

    async def close_chain(self, chain: ChainFiles) -> None:
        """Close descriptors in a worker thread, whatever is being cancelled."""
        with trio.CancelScope(shield=True):
            await self._in_thread(chain.close)

    async def _settle(
        self,
        attempt: _Attempt,
        leaf_path: str,
        mode: LeaseMode,
        holder: Holder,
        *,
        parents_mode: LeaseMode,
        deadline: float,
        resolving: trio.Lock | None,
    ) -> None:
        ticket = self._table.ticket()
        pause = _FIRST_RETRY_SECONDS
        attempts = 0
        while True:
            attempts += 1
            late = trio.current_time() >= deadline
            attempt.chain = chain = await self._resolve(
                leaf_path, holder, resolving, deadline, writable=mode is LeaseMode.WRITE
            )
            wanted = _files_of(chain, mode, parents_mode)
            await self._step("resolved")
            # After a retry the same files are held still; after a rename others have to be asked for.
            if attempt.grant is not None and attempt.grant.files != wanted:
                self._table.release(attempt.grant)
                attempt.grant = None
            if attempt.grant is None:
                try:
                    attempt.grant = await self._table.acquire(
                        wanted, holder, ticket=ticket, deadline=deadline
                    )
                except TableBusy as busy:
                    raise XenAPIError("VDI_IN_USE", holder.vdi, str(busy.holder)) from None
            await self._step("granted")
            try:
                await self._in_thread(_lock_chain, chain, mode, parents_mode)
            except FileInUse as busy:
                if late:
                    raise XenAPIError("VDI_IN_USE", holder.vdi, f"{busy.path}: {busy.why}") from None
                await self._drop_chain(attempt)
                await trio.sleep(min(pause, max(deadline - trio.current_time(), 0)))
                pause = min(pause * 2, _SLOWEST_RETRY_SECONDS)
                continue
            await self._step("locked")
            if await self._in_thread(chain_is_current, chain):
                await self._step("checked")
                return
            await self._drop_chain(attempt)
            if late and attempts >= _FEWEST_ATTEMPTS:
                raise XenAPIError("VDI_IN_USE", holder.vdi, f"{leaf_path}: its files are being renamed")

    async def _resolve(
        self,
        leaf_path: str,
        holder: Holder,
        resolving: trio.Lock | None,
        deadline: float,
        *,
        writable: bool,
    ) -> ChainFiles:
        if resolving is None:
            return await self._in_thread(_open_chain, leaf_path, writable)
        try:
            resolving.acquire_nowait()
        except trio.WouldBlock:
            with trio.move_on_at(deadline) as waiting:
                await resolving.acquire()
            if waiting.cancelled_caught:
                raise XenAPIError(
                    "VDI_IN_USE", holder.vdi, "files of its storage repository are being renamed"
                ) from None
        try:
            return await self._in_thread(_open_chain, leaf_path, writable)
        finally:
            resolving.release()

    async def _drop_chain(self, attempt: _Attempt) -> None:
        chain, attempt.chain = attempt.chain, None
        if chain is not None:
            await self.close_chain(chain)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        # Never abandoned: what the thread opens always comes back to somebody who closes it.
        return await trio.to_thread.run_sync(call, *arguments, limiter=self._threads)


async def _go_on(_step: Step) -> None:
    pass


def _open_chain(leaf_path: str, writable: bool) -> ChainFiles:
    return open_chain_files(leaf_path, writable=writable)


def _files_of(
    chain: ChainFiles, mode: LeaseMode, parents_mode: LeaseMode
) -> Mapping[FileIdentity, LeaseMode]:
    files = {node.identity: parents_mode for node in chain.nodes[1:]}
    files[chain.nodes[0].identity] = mode
    return files


def _lock_chain(chain: ChainFiles, mode: LeaseMode, parents_mode: LeaseMode) -> None:
    for index, node in enumerate(chain.nodes):
        wanted = parents_mode if index else mode
        use = FileUse.WRITE if wanted is LeaseMode.WRITE else FileUse.READ
        lock_file(node.fd, use, node.path)
