"""The gateway's half of the control socket: leases for other processes, with the descriptors of their chains.

One connection holds one disk; its end, also by kill -9, is the end of the lease. Here is decided who may, and
for whom a lease is kept in the table after a restart; the locks go with the descriptors, so what is not in
the table is still kept out by the kernel. What happens while a disk is held is holding.py's.

The trap: a message may bring descriptors, which are closed whatever the message says.
"""

import contextlib
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import trio

from gateway.access.announced import verified_chain
from gateway.access.described import Describing
from gateway.access.holding import Held, Holding, Holds
from gateway.access.listing import listed
from gateway.access.protocol import (
    Adopted,
    Announce,
    Describe,
    File,
    First,
    Granted,
    List,
    Open,
    ProtocolError,
)
from gateway.access.server_link import Link, printable
from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.leases import Holder, LeaseMode
from gateway.core.peer import Peer
from gateway.core.refs import new_uuid
from gateway.core.roles import Permission, Role
from gateway.core.sessions import Credentials, Identity
from gateway.core.threads import in_thread
from gateway.images.errors import ImageError
from gateway.transfers.publications import Publications

if TYPE_CHECKING:
    from gateway.core.limits import Limits
    from gateway.core.nbd_service import NbdDoor
    from gateway.core.records import VDI
    from gateway.core.refusals import Refusals
    from gateway.core.sessions import Sessions
    from gateway.core.tasks import Tasks
    from gateway.repository.inventory import Inventory

log = structlog.get_logger("gateway.access")

# What the same bytes take over HTTP.
READ_PERMISSION: Final = Permission("access/read", Role.VM_ADMIN)
WRITE_PERMISSION: Final = Permission("access/write", Role.VM_ADMIN)
LIST_PERMISSION: Final = Permission("access/list", Role.VM_ADMIN)

_CLOSES_AT_A_TIME: Final = 8

_SESSION_ENDED: Final = "its session has ended"

NBD: Final = "nbd"
"""The purpose of those who can be switched off all together."""


class AccessServer:
    """All disks that other processes hold. `administrator` is the user that the gateway's own uid acts as."""

    def __init__(
        self,
        inventory: "Inventory",
        tasks: "Tasks",
        sessions: "Sessions",
        limits: "Limits",
        *,
        administrator: str,
        holds: Holds,
        nbd: "NbdDoor",
        refusals: "Refusals",
        publications: Publications | None = None,
    ) -> None:
        self._inventory = inventory
        self._tasks = tasks
        self._sessions = sessions
        self._limits = limits
        self._administrator = administrator
        self._connections = 0
        self._closes = trio.CapacityLimiter(_CLOSES_AT_A_TIME)
        self._holds = holds
        self._nbd = nbd
        self._refusals = refusals
        self._describing = Describing(inventory, limits, publications or Publications())
        sessions.on_end(partial(holds.revoke_session, reason=_SESSION_ENDED))

    async def run(self, listener: socket.socket) -> None:
        """Answer whoever connects. Never returns; `listener` is closed by its owner."""
        listening = trio.socket.from_stdlib_socket(listener)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    accepted, _ = await listening.accept()
                except OSError as error:
                    # No more descriptors, or a client that has gone already.
                    log.warning("a connection could not be accepted", why=str(error))
                    await trio.sleep(0.1)
                    continue
                nursery.start_soon(self.serve, accepted)

    async def serve(self, accepted: trio.socket.SocketType) -> None:
        """One connection, from its first message to its end."""
        link = Link(accepted)
        self._connections += 1
        try:
            if self._connections > self._limits.connections:
                error = XenAPIError("TOO_MANY_TRANSFERS", str(self._limits.connections))
                _log_refusal("refused a connection", error, process=link.peer.process)
                await link.refuse(error)
                return
            first = await self._first(link)
            if first is not None:
                await self._answer(link, first)
        except ProtocolError as error:
            log.warning("a client of the control socket was not understood", why=str(error))
            await link.refuse(XenAPIError("VALUE_NOT_SUPPORTED", "message", "", str(error)))
        except OSError as error:
            log.debug("a client of the control socket has gone", why=str(error))
        except Exception:
            log.exception("a connection of the control socket failed")
        finally:
            self._connections -= 1
            await link.aclose(self._closes)

    async def _first(self, link: Link) -> First | None:
        with trio.move_on_after(self._limits.header_seconds):
            first = await link.receive()
            if first is None or isinstance(first, First):
                return first
            raise ProtocolError("a connection begins by opening or announcing a disk, or with a question")
        return None

    # Beginning

    async def _answer(self, link: Link, first: First) -> None:
        if isinstance(first, List):
            await self._list(link, first)
            return
        if isinstance(first, Describe):
            await self._describe(link, first)
            return
        identity: Identity | None = None
        try:
            permission = WRITE_PERMISSION if first.write else READ_PERMISSION
            identity = await self._identify(link.peer, first.session, permission)
            with self._using(identity):
                held = await (
                    self._open(link, first, identity)
                    if isinstance(first, Open)
                    else self._adopt(link, first, identity)
                )
        except (XenAPIError, ImageError, OSError) as failure:
            error = as_xenapi_error(failure)
            self._tell_refusal(link.peer, first, identity, error)
            await link.refuse(error)
            return
        with self._using(identity):
            await self._keep(link, held)

    def _tell_refusal(
        self, peer: Peer, first: Open | Announce, identity: Identity | None, error: XenAPIError
    ) -> None:
        """In the log and, if there is such a VDI, with it: the client's protocol may have no words for it."""
        user = "somebody" if identity is None else identity.user
        _log_refusal(
            "refused",
            error,
            vdi=printable(first.vdi)[:64],
            write=first.write,
            purpose=first.purpose,
            user=user,
            process=peer.process,
        )
        with contextlib.suppress(XenAPIError):
            vdi = self._inventory.records.vdis.by_uuid(first.vdi)
            what = "writing" if first.write else "reading"
            who = f"{user} ({first.purpose}, process {peer.process})"
            self._refusals.note(vdi.ref, f"{what} by {who}", f"{error.code}: {error.message}")

    def _using(self, identity: Identity) -> contextlib.AbstractContextManager[None]:
        return (
            contextlib.nullcontext() if identity.session is None else self._sessions.in_use(identity.session)
        )

    async def _list(self, link: Link, asked: List) -> None:
        try:
            await self._identify(link.peer, asked.session, LIST_PERMISSION)
        except XenAPIError as error:
            _log_refusal("refused a list", error, process=link.peer.process)
            await link.refuse(error)
            return
        for page in listed(self._inventory):
            await link.send(page)

    async def _describe(self, link: Link, asked: Describe) -> None:
        try:
            await self._identify(link.peer, asked.session, READ_PERMISSION)
            await link.send(await self._describing.describe(asked.vdi))
        except (XenAPIError, ImageError, OSError) as failure:
            # Who lists directories asks again and again, so that it isn't noted with the VDI.
            error = as_xenapi_error(failure)
            _log_refusal("refused a description", error, vdi=printable(asked.vdi)[:64])
            await link.refuse(error)

    async def _identify(self, peer: Peer, session: str | None, permission: Permission) -> Identity:
        """Who asks: the session's user if one is given, else the gateway's own user or root."""
        if session is not None:
            address = f"process {peer.process}"
            return await self._sessions.authorize(Credentials(address, session_ref=session), permission)
        if peer.uid in {0, os.geteuid()}:
            return Identity(self._administrator, Role.POOL_ADMIN)
        reason = "another user than the gateway's own gives the reference of a session"
        raise XenAPIError("SESSION_AUTHENTICATION_FAILED", f"uid {peer.uid}", reason)

    async def _open(self, link: Link, asked: Open, identity: Identity) -> Held:
        if asked.purpose == NBD and asked.session is not None:
            self._nbd.check()
        vdi = self._inventory.records.vdis.by_uuid(asked.vdi)
        mode = LeaseMode.WRITE if asked.write else LeaseMode.READ
        lease = await self._inventory.lease(vdi, mode, _holder(asked, identity, link.peer, vdi))
        held = Held(lease, vdi, asked.write, asked.purpose, identity)
        self._holds.add(held)
        try:
            if asked.write:
                # Before the first write, and before anybody could have read a part of it.
                await self._inventory.records.vdis.change(vdi.ref, content_id=new_uuid())
            nodes = lease.chain.nodes
            files = tuple(File(node.path, node.kind.value, node.parent) for node in nodes)
            await link.send(Granted(new_uuid(), files), [node.fd for node in nodes])
            await lease.give_away()
        except BaseException:
            lease.release()
            self._holds.discard(held)
            raise
        return held

    async def _adopt(self, link: Link, told: Announce, identity: Identity) -> Held:
        fds = link.take_descriptors()
        try:
            vdi = self._inventory.records.vdis.by_uuid(told.vdi)
            path = self._image_path(vdi, told)
            chain = await in_thread(verified_chain, fds, told, path)
        except BaseException:
            link.give_back(fds)
            raise
        mode = LeaseMode.WRITE if told.write else LeaseMode.READ
        holder = _holder(told, identity, link.peer, vdi)
        lease = await self._inventory.leases.adopt(chain, mode, holder)
        held = Held(lease, vdi, told.write, told.purpose, identity, read=told.read, written=told.written)
        self._holds.add(held)
        try:
            await lease.give_away()
            held.task = self._announced_task(told, identity)
            await link.send(Adopted())
        except BaseException:
            lease.release()
            self._holds.discard(held)
            raise
        log.info("a lease from before the restart is back", lease=printable(told.lease)[:64], vdi=vdi.uuid)
        return held

    def _image_path(self, vdi: "VDI", told: Announce) -> str:
        repository = self._inventory.repository_of(vdi)
        if told.write and not repository.writable:
            raise XenAPIError("VDI_READONLY", vdi.ref)
        return repository.image_path(vdi.uuid)

    def _announced_task(self, told: Announce, identity: Identity) -> str | None:
        """The task to go on under, None for a new one. Raises TASK_CANCELLED."""
        if told.task is None:
            return None
        try:
            if self._tasks.get(told.task).user != identity.user:
                return None
            self._tasks.announce(told.task)
        except XenAPIError as error:
            if error.code == "TASK_CANCELLED":
                raise
            return None
        return told.task

    # Holding

    async def _keep(self, link: Link, held: Held) -> None:
        try:
            self._check_session(held)
            await Holding(link, held, self._tasks).last(partial(self._written, held))
        finally:
            self._holds.discard(held)

    def _check_session(self, held: Held) -> None:
        """It may have ended while the files were waited for."""
        session = held.identity.session
        if session is not None:
            try:
                self._sessions.by_uuid(session.uuid)
            except XenAPIError:
                held.revoke(_SESSION_ENDED)

    async def _written(self, held: Held) -> None:
        """A writer has gone: the sizes are others, and so is the content."""
        try:
            await self._inventory.vdi_changed(held.vdi.ref)
        except (XenAPIError, ImageError, OSError) as failure:
            log.warning("a written VDI could not be looked at", vdi=held.vdi.uuid, why=str(failure))


def _log_refusal(event: str, error: XenAPIError, **more: object) -> None:
    # A session's reference is a secret, also one that is none any more.
    log.info(event, **more, error=error.code if error.code == "SESSION_INVALID" else error.error_info)


def _holder(message: Open | Announce, identity: Identity, peer: Peer, vdi: "VDI") -> Holder:
    session = identity.session
    user = identity.user if session is None else f"{identity.user} at {session.address}"
    who = f"{user} ({message.purpose}, process {peer.process})"
    return Holder(who, "write" if message.write else "read", vdi.ref)
