"""The disks that other processes hold: each from its lease to its release, with a task while bytes move.

The trap: nobody can be forced to give a disk up. A revocation is asked for, and the lease counts until the
client has gone, because the locks on the files are there until then: also while its process is stopped.
"""

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
import trio

from gateway.access.protocol import Closed, Moved, ProtocolError, Revoke, Working
from gateway.access.server_link import Link, printable
from gateway.core.errors import XenAPIError
from gateway.core.leases import Lease
from gateway.core.peer import Peer

if TYPE_CHECKING:
    from gateway.core.records import VDI
    from gateway.core.sessions import Identity
    from gateway.core.tasks import Tasks

log = structlog.get_logger("gateway.access")

# A client that is asked to give a disk up does so at once; one that doesn't is told of in the log.
REVOKE_SECONDS: Final = 5.0

# proc(5), of /proc/PID/stat.
_STATES: Final = {
    "T": "it is stopped, and goes on with SIGCONT",
    "t": "a debugger has stopped it",
    "D": "it waits for its storage",
    "Z": "it has ended, and its parent has not noticed",
}


@dataclass(eq=False, slots=True)
class Held:
    """One lease that a client holds. `purpose` is its word for what it does (nbd)."""

    lease: Lease
    vdi: "VDI"
    write: bool
    purpose: str
    identity: "Identity"
    task: str | None = None
    read: int = 0
    written: int = 0
    clean: bool = False
    revoked: str | None = None
    overdue: bool = False
    revoking: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)

    def revoke(self, reason: str) -> None:
        """Ask the client to give the disk up; the first reason counts."""
        if self.revoked is None:
            self.revoked = reason
            self.revoking.set()

    def check_end(self, task: str) -> None:
        """Raise TASK_CANCELLED unless the client has closed the disk of its own will."""
        if self.revoked is not None or not self.clean:
            raise XenAPIError("TASK_CANCELLED", task)

    def progress(self) -> float:
        """How much of the disk has moved: all there is to say, since nobody knows what the client wants."""
        return (self.read + self.written) / max(self.vdi.virtual_size, 1)

    def moved(self) -> dict[str, str]:
        """Bytes so far, as told by the client once a second."""
        return {"bytes-read": str(self.read), "bytes-written": str(self.written)}


class Holds:
    """All disks that other processes hold now."""

    def __init__(self) -> None:
        self._held: set[Held] = set()

    def add(self, held: Held) -> None:
        """Enter one, before its holder is told that it has the disk."""
        self._held.add(held)

    def discard(self, held: Held) -> None:
        """Its holder has gone."""
        self._held.discard(held)

    def revoke_session(self, uuid: str, reason: str) -> None:
        """Ask for all disks that are held under a session."""
        for held in self._held:
            if held.identity.session is not None and held.identity.session.uuid == uuid:
                held.revoke(reason)

    def revoke_vdi(self, ref: str, reason: str) -> None:
        """Ask all who hold a VDI to give it up."""
        for held in self._held:
            if held.vdi.ref == ref:
                held.revoke(reason)


class Holding:
    """One client that holds a disk, from the grant to the end of its connection."""

    def __init__(self, link: Link, held: Held, tasks: "Tasks") -> None:
        self._link = link
        self._held = held
        self._tasks = tasks

    async def last(self, written: Callable[[], Awaitable[None]]) -> None:
        """Until the client has gone. `written` is awaited after a writer's end, before others are let in."""
        held = self._held
        try:
            async with trio.open_nursery() as beside:
                beside.start_soon(self._pass_on_revocation)
                async with trio.open_nursery() as working:
                    if held.task is not None:
                        working.start_soon(self._work)
                    try:
                        await self._listen(working)
                        if held.write:
                            await written()
                    finally:
                        held.lease.release()
                        held.ended.set()
                beside.cancel_scope.cancel()
        finally:
            held.lease.release()
            if held.overdue:
                log.info("a revoked disk was given up at last", **self._about)

    @property
    def _about(self) -> dict[str, object]:
        held = self._held
        return {"vdi": held.vdi.uuid, "holder": str(held.lease.holder), "why": held.revoked}

    async def _listen(self, working: trio.Nursery) -> None:
        """Until the client closes the disk or is gone."""
        held = self._held
        began = held.task is not None
        while True:
            try:
                message = await self._link.receive()
            except OSError:
                return
            except ProtocolError as error:
                log.warning("a client of the control socket was not understood", why=str(error))
                return
            if isinstance(message, Moved):
                held.read, held.written = message.read, message.written
                if not began and (held.read or held.written):
                    began = True
                    working.start_soon(self._work)
            elif isinstance(message, Closed):
                held.clean = True
            elif message is None:
                return
            else:
                log.warning("a client of the control socket sent what a holder doesn't send")
                return

    async def _pass_on_revocation(self) -> None:
        held = self._held
        await held.revoking.wait()
        assert held.revoked is not None
        log.info("revoked", **self._about)
        with trio.move_on_after(REVOKE_SECONDS):
            with contextlib.suppress(OSError):
                await self._link.send(Revoke(printable(held.revoked)))
            await held.ended.wait()
            return
        held.overdue = True
        log.warning(
            "a revoked disk is still held, and nobody can be forced to give it up: end the process",
            **self._about,
            process=self._link.peer.process,
            state=process_state(self._link.peer.process),
        )

    async def _work(self) -> None:
        """The task of a connection that moves data."""
        held = self._held
        try:
            task = held.task or await self._new_task()
            cancel = partial(held.revoke, "its task was cancelled")
            async with self._tasks.operation(task, cancel) as operation:
                operation.progress = held.progress
                operation.details = held.moved
                held.lease.work_under(task)
                if task != held.task:
                    held.task = task
                    with contextlib.suppress(OSError):
                        await self._link.send(Working(task))
                await held.ended.wait()
                operation.result = f"{held.read} bytes read, {held.written} bytes written"
                held.check_end(task)
        except XenAPIError as error:
            if error.code == "TASK_CANCELLED":
                held.revoke("its task was cancelled")
            else:
                log.warning("a disk is held without a task", vdi=held.vdi.uuid, error=error.error_info)
        except Exception:
            # The data does not need the task.
            log.exception("the task of a disk that is held failed", vdi=held.vdi.uuid)

    async def _new_task(self) -> str:
        held, peer = self._held, self._link.peer
        session = held.identity.session
        task = await self._tasks.create(
            f"{held.purpose} {'write' if held.write else 'read'}",
            described(held, peer),
            user=held.identity.user,
            session_uuid="" if session is None else session.uuid,
            client_made=False,
            other_config={
                "vdi": held.vdi.uuid,
                "mode": "rw" if held.write else "ro",
                "process": str(peer.process),
            },
        )
        return task.ref


def described(held: Held, peer: Peer) -> str:
    """Who does what to which VDI, in words."""
    session = held.identity.session
    at = "" if session is None else f" (logged in at {session.address})"
    verb = "writes to" if held.write else "reads"
    name = f" {held.vdi.name_label!r}" if held.vdi.name_label else ""
    return f"{held.identity.user}{at} {verb} the VDI {held.vdi.uuid}{name}, process {peer.process}"


def process_state(process: int) -> str:
    """Why a process may not answer, in words; empty if nothing is known that would explain it."""
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()  # the kernel has it in memory
    except OSError:
        return ""
    # The name, in parentheses, may hold anything.
    state = stat.rpartition(b") ")[2][:1].decode("ascii", "replace")
    return _STATES.get(state, "")
