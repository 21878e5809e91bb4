"""One lease in the hands of its holder: the open, locked files of a chain and its place in the table.

The trap: the locks live as long as the descriptors, and those may be given to a disk or to another process.
So the end of a lease lets others in at the table, while the files may stay locked for as long as somebody
has them open.
"""

import threading
from collections.abc import Awaitable, Callable

import trio

from gateway.core.lease_table import Grant, Holder, LeaseMode, LeaseTable
from gateway.images.chain import ChainFiles, open_disk
from gateway.images.disk import Disk
from gateway.images.files import FILES, FileCalls, FileIdentity


class Lease:
    """The right to use one chain, from `Leases.acquire` until `release`.

    `mode` is that of the leaf. `close` closes the files of a chain in a worker thread, whatever is being
    cancelled.
    """

    def __init__(
        self,
        table: LeaseTable,
        close: Callable[[ChainFiles], Awaitable[None]],
        chain: ChainFiles,
        mode: LeaseMode,
        grant: Grant,
    ) -> None:
        self.chain = chain
        self.mode = mode
        self._table = table
        self._close = close
        self._grant = grant
        # The clock itself: trio.current_time works in trio's thread only.
        self._clock = trio.lowlevel.current_clock()
        self._guard = threading.Lock()
        self._descriptors_taken = False
        self._released = False
        self._settled = trio.Event()

    @property
    def holder(self) -> Holder:
        """Who holds it, and what for."""
        return self._grant.holder

    @property
    def since(self) -> float:
        """When it was granted, by trio's clock."""
        return self._grant.since

    @property
    def wanted(self) -> bool:
        """Whether somebody waits in the table for a file that this lease keeps from them. From any thread.

        It is so from the moment on in which they ask, and not any more when they have given up. A lease that
        goes before others `until` some time is not wanted sooner. Who would not wait (wait=0) and programs
        outside the gateway are not seen.
        """
        return self._grant.wanted and not self._grant.goes_first(self._clock.current_time())

    @property
    def leaf_path(self) -> str:
        """The file that the VDI's name led to when the lease was taken."""
        return self.chain.nodes[0].path

    @property
    def is_released(self) -> bool:
        """Whether `release` was called."""
        return self._released

    def work_under(self, task: str) -> None:
        """Name the task (its reference) under which the holder works, if it was not known before."""
        self._table.work_under(self._grant, task)

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
        await self._close(self.chain)

    def move_to(self, file: FileIdentity) -> None:
        """Hold `file` with this lease's mode too, because it is about to be renamed over the leaf.

        To be called before the rename, while nobody else can know the file. Whoever then finds the new file
        under the name meets this lease there as it would have at the old one.
        """
        self._table.extend(self._grant, file, self.mode)

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
            trio.lowlevel.spawn_system_task(self._close_and_end, name="close the files of a lease")
        else:
            self._end()

    async def released(self) -> None:
        """Wait until a release has let others in."""
        await self._settled.wait()

    async def _close_and_end(self) -> None:
        try:
            await self._close(self.chain)
        finally:
            self._end()

    def _end(self) -> None:
        self._table.release(self._grant)
        self._settled.set()
