"""Leases: the right to use the files of a VDI's chain, against everybody in this gateway and outside it.

A lease has two layers. The table (lease_table.py) orders those who come through this gateway; locks on the
files (images/file_locks.py) keep out, and respect, programs that know nothing of it. Both belong to files,
not to names, while callers name a VDI. So taking a lease is one loop: open the chain, be granted its files,
lock them, look again whether the names still lead there, and start over if they do not. What a holder has in
hand is lease.py's, why somebody was refused lease_refusal.py's.

The trap: from the first step on descriptors are open, and a task may be cancelled at every await. Every file
call runs in a worker thread that is never abandoned, and what it opened is closed whatever happens.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import trio

from gateway.core.lease import Lease
from gateway.core.lease_refusal import Blocker, LeaseRefused, refused_by_grants, refused_by_lock
from gateway.core.lease_table import Grant, Holder, LeaseMode, LeaseTable, TableBusy
from gateway.core.limits import Limits
from gateway.core.threads import in_thread
from gateway.images.chain import ChainFiles, chain_is_current, open_chain_files
from gateway.images.file_locks import FileInUse, FileUse, lock_files
from gateway.images.files import FileIdentity

__all__ = ["Blocker", "Holder", "Lease", "LeaseMode", "LeaseRefused", "Leases", "Step"]

Step = Literal["resolved", "granted", "locked", "checked"]
T = TypeVar("T")

# A foreign holder's end is not announced: it has to be asked for, soon at first since most closes are near.
_FIRST_RETRY_SECONDS = 0.01
_SLOWEST_RETRY_SECONDS = 0.25

# Even without any wait, a chain that changed while it was locked is resolved again a few times.
_FEWEST_ATTEMPTS = 4


@dataclass(frozen=True)
class _Request:
    """What one caller of `acquire` asks for; `modes` are those of the first files of the chain."""

    leaf_path: str
    modes: tuple[LeaseMode, ...]
    holder: Holder
    ticket: int
    deadline: float
    until: float | None
    resolving: trio.Lock | None
    patient: bool


@dataclass
class _Attempt:
    """What that caller has in hand so far."""

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
        self._step = step
        self._table = LeaseTable(changed)
        # Its own threads: a file server that hangs here must not stop transfers or the database.
        self._threads = trio.CapacityLimiter(16)

    async def acquire(
        self,
        leaf_path: str,
        mode: LeaseMode,
        holder: Holder,
        *,
        parents: Sequence[LeaseMode] = (),
        wait: float | None = None,
        until: float | None = None,
        resolving: trio.Lock | None = None,
    ) -> Lease:
        """Lease the chain whose leaf is at `leaf_path`, with `mode` for the leaf.

        `parents` are the modes of the first parents, all others are read. What is leased to be written is
        open for writing. The chain may turn out to be shorter than `parents`: the caller looks.

        Waits up to `wait` seconds (by default the limit `lease_wait`) for everybody else together, then
        raises LeaseRefused: VDI_IN_USE with the one who stands in the way. With wait=0 nobody in this gateway
        ever waits for a request that is refused because of others here.

        Up to `until` (trio's clock) the request and the lease go before those who come later: who is refused
        because of them is told OTHER_OPERATION_IN_PROGRESS with the time left, and the lease is not `wanted`.
        It neither ends the lease nor lets the request overtake others.

        `resolving` is held while the chain is opened: the lock of the SR whose files may be about to be
        renamed. A missing file is FileNotFoundError, a broken one an ImageError.
        """
        now = trio.current_time()
        deadline = now + (self._limits.lease_wait if wait is None else wait)
        request = _Request(
            leaf_path,
            (mode, *parents),
            holder,
            self._table.ticket(),
            deadline,
            until,
            resolving,
            patient=deadline > now,
        )
        attempt = _Attempt()
        try:
            await self._settle(request, attempt)
            assert attempt.chain is not None
            assert attempt.grant is not None
            return Lease(self._table, self._close_chain, attempt.chain, mode, attempt.grant)
        except BaseException:
            await self._drop_chain(attempt)
            self._drop_grant(request, attempt)
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
                    await self._in_thread(_lock_chain, chain, (mode,))
                    break
                except FileInUse as busy:
                    # Whoever tries to get the files in vain has taken some of the bytes for a moment.
                    if trio.current_time() >= deadline:
                        raise refused_by_lock(holder.vdi, busy) from None
                await trio.sleep(_FIRST_RETRY_SECONDS)
        except BaseException:
            await self._close_chain(chain)
            raise
        grant = self._table.adopt(_files_of(chain, (mode,)), holder)
        return Lease(self._table, self._close_chain, chain, mode, grant)

    @asynccontextmanager
    async def hold(
        self,
        leaf_path: str,
        mode: LeaseMode,
        holder: Holder,
        *,
        parents: Sequence[LeaseMode] = (),
        wait: float | None = None,
        until: float | None = None,
        resolving: trio.Lock | None = None,
    ) -> AsyncIterator[Lease]:
        """`acquire` for the time of a block; after it others have been let in."""
        lease = await self.acquire(
            leaf_path, mode, holder, parents=parents, wait=wait, until=until, resolving=resolving
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

    @property
    def releases(self) -> int:
        """How often it has become worth trying again: leases that ended, requests that were given up.

        What a refused request with wait=0 held for a moment doesn't count, so that the same caller is not
        told of itself.
        """
        return self._table.releases

    async def some_release(self, after: int | None = None) -> int:
        """Wait until `releases` is more than `after`, by default than now, and return it.

        To miss nothing: read `releases` before the attempt that may be refused, and wait for more than that.
        Programs outside the gateway announce nothing; they have to be asked again after a while.
        """
        return await self._table.some_release(after)

    async def _settle(self, request: _Request, attempt: _Attempt) -> None:
        pause = _FIRST_RETRY_SECONDS
        attempts = 0
        vdi = request.holder.vdi
        while True:
            attempts += 1
            late = trio.current_time() >= request.deadline
            attempt.chain = chain = await self._resolve(request)
            await self._reached("resolved")
            await self._be_granted(request, attempt, chain)
            await self._reached("granted")
            try:
                current = await self._lock(chain, request.modes)
            except FileInUse as busy:
                if late:
                    raise refused_by_lock(vdi, busy) from None
                await self._drop_chain(attempt)
                await trio.sleep(min(pause, max(request.deadline - trio.current_time(), 0)))
                pause = min(pause * 2, _SLOWEST_RETRY_SECONDS)
                continue
            if current:
                await self._reached("checked")
                return
            await self._drop_chain(attempt)
            if late and attempts >= _FEWEST_ATTEMPTS:
                raise LeaseRefused("VDI_IN_USE", vdi, f"{request.leaf_path}: its files are being renamed")

    async def _resolve(self, request: _Request) -> ChainFiles:
        resolving = request.resolving
        if resolving is None:
            return await self._in_thread(_open_chain, request.leaf_path, request.modes)
        try:
            resolving.acquire_nowait()
        except trio.WouldBlock:
            with trio.move_on_at(request.deadline) as waiting:
                await resolving.acquire()
            if waiting.cancelled_caught:
                raise LeaseRefused(
                    "VDI_IN_USE", request.holder.vdi, "files of its storage repository are being renamed"
                ) from None
        try:
            return await self._in_thread(_open_chain, request.leaf_path, request.modes)
        finally:
            resolving.release()

    async def _be_granted(self, request: _Request, attempt: _Attempt, chain: ChainFiles) -> None:
        files = _files_of(chain, request.modes)
        # After a retry the same files are held still; after a rename others have to be asked for.
        if attempt.grant is not None and attempt.grant.files != files:
            self._drop_grant(request, attempt)
        if attempt.grant is None:
            try:
                attempt.grant = await self._table.acquire(
                    files,
                    request.holder,
                    ticket=request.ticket,
                    deadline=request.deadline,
                    until=request.until,
                )
            except TableBusy as busy:
                raise refused_by_grants(request.holder.vdi, busy.in_the_way, trio.current_time()) from None

    async def _lock(self, chain: ChainFiles, modes: Sequence[LeaseMode]) -> bool:
        """Lock the files and tell whether the names still lead to them. Raises FileInUse."""
        if self._step is None:
            return await self._in_thread(_lock_and_check, chain, modes)
        await self._in_thread(_lock_chain, chain, modes)
        await self._reached("locked")
        return await self._in_thread(chain_is_current, chain)

    async def _reached(self, step: Step) -> None:
        if self._step is not None:
            await self._step(step)

    def _drop_grant(self, request: _Request, attempt: _Attempt) -> None:
        grant, attempt.grant = attempt.grant, None
        if grant is not None:
            self._table.release(grant, announce=request.patient)

    async def _drop_chain(self, attempt: _Attempt) -> None:
        chain, attempt.chain = attempt.chain, None
        if chain is not None:
            await self._close_chain(chain)

    async def _close_chain(self, chain: ChainFiles) -> None:
        """Close descriptors in a worker thread, whatever is being cancelled."""
        with trio.CancelScope(shield=True):
            await self._in_thread(chain.close)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        # Never abandoned: what the thread opens always comes back to somebody who closes it.
        return await in_thread(call, *arguments, limiter=self._threads)


def _open_chain(leaf_path: str, modes: Sequence[LeaseMode]) -> ChainFiles:
    leaf, *parents = (mode is LeaseMode.WRITE for mode in modes)
    return open_chain_files(leaf_path, writable=leaf, writable_parents=parents)


def _modes_of(chain: ChainFiles, modes: Sequence[LeaseMode]) -> Sequence[LeaseMode]:
    """The mode of each file: what was not asked for otherwise is read."""
    return (*modes, *[LeaseMode.READ] * (chain.depth - len(modes)))[: chain.depth]


def _files_of(chain: ChainFiles, modes: Sequence[LeaseMode]) -> Mapping[FileIdentity, LeaseMode]:
    return {node.identity: mode for node, mode in zip(chain.nodes, _modes_of(chain, modes), strict=True)}


def _lock_chain(chain: ChainFiles, modes: Sequence[LeaseMode]) -> None:
    lock_files(
        (node.fd, FileUse.WRITE if mode is LeaseMode.WRITE else FileUse.READ, node.path)
        for node, mode in zip(chain.nodes, _modes_of(chain, modes), strict=True)
    )


def _lock_and_check(chain: ChainFiles, modes: Sequence[LeaseMode]) -> bool:
    _lock_chain(chain, modes)
    return chain_is_current(chain)
