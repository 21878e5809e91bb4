"""What every request for the bytes of a disk is asked before anything is done with it.

Who asks, which VDI, under which task, and whether this gateway can reach it. A request that fails a question
is refused with one line that says what is wrong and what to do. What can't be found is 500 as the Xen
proposal has it for imports, and for exports as xapi does. The traps: a task may be failed only for somebody
who was verified and owns it, and never by a redirection, since the client goes on with the same task
elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import trio

from gateway.core.database import DatabaseFailed
from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.leases import Holder, Lease, LeaseMode
from gateway.core.records import Host
from gateway.core.roles import Permission, Role
from gateway.core.tasks import TaskStatus
from gateway.http.credentials import presented
from gateway.images.errors import ImageError
from gateway.repository.inventory import Where
from gateway.transfers.publications import Publications

if TYPE_CHECKING:
    from gateway.core.limits import Limits
    from gateway.core.records import SR, VDI
    from gateway.core.sessions import Identity, Sessions
    from gateway.core.tasks import Task, Tasks
    from gateway.http.connection import Connection
    from gateway.http.request import Request
    from gateway.repository.inventory import Inventory

_STATUSES: Final = {
    "VDI_IN_USE": HTTPStatus.CONFLICT,
    "OTHER_OPERATION_IN_PROGRESS": HTTPStatus.CONFLICT,
    "VDI_READONLY": HTTPStatus.CONFLICT,
    "OPERATION_NOT_ALLOWED": HTTPStatus.CONFLICT,
    "TASK_CANCELLED": HTTPStatus.CONFLICT,
    "SR_NOT_ATTACHED": HTTPStatus.SERVICE_UNAVAILABLE,
}
_NOT_YOURS: Final = "the task belongs to another user"
_RETRY_AFTER: Final = ("retry-after", "5")
_CHALLENGE: Final = ("www-authenticate", 'Basic realm="VDI Gateway"')


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """The request is not carried out; `error` is the reason for the client and for its task."""

    def __init__(self, status: HTTPStatus, error: XenAPIError, *headers: tuple[str, str]) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.headers = headers


@dataclass(frozen=True, slots=True)
class DiskServices:
    """What the requests for disk bytes work with."""

    inventory: "Inventory"
    tasks: "Tasks"
    sessions: "Sessions"
    limits: "Limits"
    slots: trio.CapacityLimiter
    threads: trio.CapacityLimiter
    publications: Publications

    @classmethod
    def for_limits(
        cls,
        inventory: "Inventory",
        tasks: "Tasks",
        sessions: "Sessions",
        limits: "Limits",
        publications: Publications | None = None,
    ) -> "DiskServices":
        """Services with as many transfers at once as the limits allow.

        `publications` are those of all who give VDIs new content.
        """
        slots, threads = trio.CapacityLimiter(limits.transfers), trio.CapacityLimiter(limits.transfers)
        return cls(inventory, tasks, sessions, limits, slots, threads, publications or Publications())

    @contextmanager
    def slot(self, identity: "Identity") -> Iterator[None]:
        """Be one of the transfers; the session doesn't expire meanwhile. Raises Refusal at the limit."""
        holder = object()
        # The limit may have changed since.
        self.slots.total_tokens = self.threads.total_tokens = self.limits.transfers
        try:
            self.slots.acquire_on_behalf_of_nowait(holder)
        except trio.WouldBlock:
            error = XenAPIError("TOO_MANY_TRANSFERS", str(self.limits.transfers))
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, error, _RETRY_AFTER) from None
        used = nullcontext() if identity.session is None else self.sessions.in_use(identity.session)
        try:
            with used:
                yield
        finally:
            self.slots.release_on_behalf_of(holder)


class DiskRequest:
    """One request on its way through the questions. Each raises Refusal."""

    def __init__(
        self, services: DiskServices, request: "Request", permission: Permission, *, challenge: bool
    ) -> None:
        """`challenge`: a request without any credentials is asked for them (401)."""
        self._services: Final = services
        self._request: Final = request
        self._permission: Final = permission
        self._challenge: Final = challenge
        self._task: Task | None = None

    async def identity(self) -> "Identity":
        """Who asks. What can't be verified is 403.

        The given task is found here too, since every later refusal fails it.
        """
        found = presented(self._request)
        if found.credentials is None:
            reason = "the credentials can't be read" if found.anything else "there are no credentials"
            error = XenAPIError("SESSION_AUTHENTICATION_FAILED", "", reason)
            if self._challenge and not found.anything:
                raise Refusal(HTTPStatus.UNAUTHORIZED, error, _CHALLENGE)
            raise Refusal(HTTPStatus.FORBIDDEN, error)
        anybody = Permission(self._permission.name, Role.READ_ONLY)
        try:
            identity = await self._services.sessions.authorize(found.credentials, anybody)
        except XenAPIError as error:
            raise Refusal(HTTPStatus.FORBIDDEN, error) from error
        self._task = self._usable_task(identity)
        try:
            self._permission.check(identity.role)
        except XenAPIError as error:
            raise Refusal(HTTPStatus.FORBIDDEN, error) from error
        return identity

    def _usable_task(self, identity: "Identity") -> "Task | None":
        """The given task, if this request may fail it: known, the user's own, pending."""
        try:
            task = self._find_task()
        except XenAPIError:
            return None
        if task is None or task.user != identity.user or not _is_free(task):
            return None
        return task

    def _find_task(self) -> "Task | None":
        name = self._request.parameter("task_id")
        if name is None:
            return None
        tasks = self._services.tasks
        return tasks.get(name) if name.startswith("OpaqueRef:") else tasks.by_uuid(name)

    def vdi(self) -> "VDI":
        """The VDI that `vdi` names, by reference or uuid."""
        name = self._request.parameter("vdi")
        if name is None:
            error = XenAPIError("VDI_NOT_NAMED")
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, error)
        try:
            return self._services.inventory.records.vdis.find(name)
        except XenAPIError as error:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, error) from error

    def sr(self) -> "SR | None":
        """The SR that `sr_uuid` or `sr_id` names, by reference or uuid, if no VDI is named."""
        if self._request.parameter("vdi") is not None:
            return None
        name = self._request.parameter("sr_uuid") or self._request.parameter("sr_id")
        if name is None:
            return None
        try:
            return self._services.inventory.records.srs.find(name)
        except XenAPIError as error:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, error) from error

    def task(self, identity: "Identity") -> "Task | None":
        """The given task, None if none was given."""
        try:
            task = self._find_task()
        except XenAPIError as error:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, error) from error
        if task is None or (self._task is not None and task.ref == self._task.ref):
            return task
        reason: tuple[str, ...]
        if task.user != identity.user:
            status, reason = (
                HTTPStatus.FORBIDDEN,
                ("RBAC_PERMISSION_DENIED", self._permission.name, _NOT_YOURS),
            )
        elif task.status is TaskStatus.PENDING:
            status, reason = HTTPStatus.CONFLICT, ("OTHER_OPERATION_IN_PROGRESS", "task", task.ref)
        else:
            ended = f"the task {task.ref} has ended already ({task.status})"
            status, reason = HTTPStatus.CONFLICT, ("OPERATION_NOT_ALLOWED", ended)
        raise Refusal(status, XenAPIError(*reason))

    def require_here(self, vdi: "VDI") -> None:
        """This gateway reaches the VDI's SR; else 302 to the host that does, or 503."""
        self.require_sr_here(vdi.sr)

    def require_sr_here(self, sr: str) -> None:
        """As require_here, for the SR itself."""
        place = self._services.inventory.where_is(sr)
        if place is Where.LOCAL:
            return
        error = XenAPIError("SR_NOT_ATTACHED", sr)
        if isinstance(place, Host) and place.address:
            raise Refusal(HTTPStatus.FOUND, error, ("location", location(self._request, place.address)))
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, error)

    async def lease(
        self,
        vdi: "VDI",
        mode: LeaseMode,
        identity: "Identity",
        task: "Task | None",
        operation: str,
        *,
        wait: float | None = None,
    ) -> Lease:
        """The lease of a VDI that this gateway reaches.

        Waits for others `wait` seconds, unless given as long as the limits say.
        """
        holder = Holder(identity.user, operation, vdi.ref, None if task is None else task.ref)
        try:
            return await self._services.inventory.lease(vdi, mode, holder, wait)
        except (OSError, ImageError, XenAPIError) as failure:
            error = as_xenapi_error(failure)
            raise Refusal(status_of(error), error) from failure

    async def new_task(self, identity: "Identity", label: str, description: str) -> "Task":
        """A task of the gateway's own for a request that brought none. A later refusal fails it, too."""
        session_uuid = identity.session.uuid if identity.session is not None else ""
        try:
            self._task = await self._services.tasks.create(
                label, description, user=identity.user, session_uuid=session_uuid, client_made=False
            )
        except DatabaseFailed as failure:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, as_xenapi_error(failure)) from failure
        return self._task

    async def refuse(self, connection: "Connection", refusal: Refusal) -> None:
        """Answer a refusal; the given task fails with it."""
        if self._task is not None and refusal.status is not HTTPStatus.FOUND:
            await self._services.tasks.fail(self._task.ref, refusal.error)
        line = f"{refusal.error.code}: {refusal.error.message}\n"
        await connection.respond(refusal.status, line.encode(), headers=refusal.headers)


def status_of(error: XenAPIError) -> HTTPStatus:
    """With which status a request is refused for what stands in its way."""
    return _STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)


def _is_free(task: "Task") -> bool:
    """Whether an operation may begin under the task: it is pending, and none has begun."""
    return task.status is TaskStatus.PENDING and not task.worked_on


def location(request: "Request", address: str) -> str:
    """The same request at another host. `address` is a name or IP address, with a port or without."""
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"
    query = f"?{request.raw_query}" if request.raw_query else ""
    return f"{request.scheme}://{address}{request.raw_path}{query}"
