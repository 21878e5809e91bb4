"""GET and HEAD /export_raw_vdi: a disk in some format, what differs from another one, or one range of that.

Everything is known before the first byte: size, ETag, what is asked for. So an interrupted download goes on,
and a connection is kept for the next range. Whole disks are sent under a task; a range only if the client
brought one, since programs that read a disk piece by piece would fill the list of tasks.

The traps: clients drop downloads on purpose, and often; that cancels the task and is no error. And a delta
needs leases of two chains with files in common: whoever holds one and waits for the other may wait for
somebody who waits for the first.
"""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import structlog
import trio

from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.leases import LeaseMode
from gateway.core.roles import Permission, Role
from gateway.http.byte_ranges import ByteRange, UnsatisfiableRange, is_another, is_unchanged, requested_range
from gateway.http.disk_request import DiskRequest, DiskServices, Refusal, status_of
from gateway.http.export_choice import ExportChoice, export_choice, unrelated
from gateway.http.wire import WireBroken
from gateway.images.allocation import UnrelatedChains
from gateway.images.errors import ImageError, ImageTooLarge
from gateway.images.vhd.format import MAX_VIRTUAL_SIZE
from gateway.transfers.body import SinkClosed, SinkStalled
from gateway.transfers.export_formats import (
    Base,
    ExportFormat,
    OpenExport,
    Source,
    base_of,
    open_export,
    raw_entity_tag,
)
from gateway.transfers.known_blocks import KnownBlocks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.core.leases import Lease
    from gateway.core.records import VDI
    from gateway.core.sessions import Identity
    from gateway.core.tasks import Task
    from gateway.http.connection import Connection
    from gateway.http.request import Request

log = structlog.get_logger("gateway.http.export")

PERMISSION: Final = Permission("http/get_export_raw_vdi", Role.VM_ADMIN)


class ExportRawVDI:
    """The handler of GET /export_raw_vdi."""

    def __init__(self, services: DiskServices) -> None:
        self._services: Final = services
        self._known_blocks: Final = KnownBlocks()

    async def __call__(self, connection: "Connection", request: "Request") -> None:
        """Answer one request."""
        asked = DiskRequest(self._services, request, PERMISSION, challenge=True)
        try:
            await self._admit(connection, request, asked)
        except Refusal as refusal:
            await asked.refuse(connection, refusal)

    async def _admit(self, connection: "Connection", request: "Request", asked: DiskRequest) -> None:
        identity = await asked.identity()
        vdi = asked.vdi()
        task = asked.task(identity)
        choice = export_choice(request, vdi, self._services.inventory.records.vdis)
        asked.require_here(vdi)
        if choice.image_format is ExportFormat.RAW and await self._is_as_recorded(vdi):
            tag = raw_entity_tag(vdi.content_id)
            if await _is_answered_by(
                connection, request, _Head(vdi, choice.image_format, tag), vdi.virtual_size
            ):
                return
        with self._services.slot(identity):
            asking = _Asking(asked, identity, task)
            vdi, lease, base = await self._leases(asking, vdi, choice)
            try:
                source = Source(lease, vdi.content_id, choice.image_format, base)
                download = _Download(connection, request, asked, identity, vdi, choice, source)
                await self._answer(download, task)
            finally:
                lease.release()

    async def _is_as_recorded(self, vdi: "VDI") -> bool:
        """Whether the record may answer without a lease; what is wrong with the file is found with one."""
        try:
            return await self._services.inventory.is_as_recorded(vdi.ref)
        except (OSError, XenAPIError):
            return False

    async def _leases(
        self, asking: "_Asking", vdi: "VDI", choice: ExportChoice
    ) -> "tuple[VDI, Lease, Base | None]":
        """A read lease of the VDI, and of its base what a delta has to know."""
        if choice.base is None:
            return *await self._lease(asking, vdi.ref), None
        vdi, lease, base, base_lease = await self._lease_both(asking, vdi.ref, choice.base.ref)
        try:
            return vdi, lease, await base_of(lease, base_lease, base.uuid, base.content_id)
        except BaseException as error:
            lease.release()
            if isinstance(error, UnrelatedChains):
                raise unrelated(vdi, base, "no file is part of both their chains") from error
            if isinstance(error, (OSError, ImageError)):
                raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, as_xenapi_error(error)) from error
            raise
        finally:
            base_lease.release()

    async def _lease_both(self, asking: "_Asking", ref: str, base: str) -> "tuple[VDI, Lease, VDI, Lease]":
        """Read leases of two VDIs at the same time.

        The second is never waited for while the first is held; instead they change places, and everybody who
        waits is let in between.
        """
        deadline = trio.current_time() + self._services.limits.lease_wait
        first, second = ref, base
        while True:
            left = max(0.0, deadline - trio.current_time())
            record, lease = await self._lease(asking, first, left)
            try:
                other, other_lease = await self._lease(asking, second, 0)
            except BaseException as error:
                lease.release()
                if not isinstance(error, Refusal) or trio.current_time() >= deadline:
                    raise
                await lease.released()
                first, second = second, first
                continue
            if first == ref:
                return record, lease, other, other_lease
            return other, other_lease, record, lease

    async def _lease(self, asking: "_Asking", ref: str, wait: float | None = None) -> "tuple[VDI, Lease]":
        """A read lease, with the record whose content id names the leased bytes."""
        records = self._services.inventory.records.vdis
        while True:
            before = records.get(ref)
            lease = await asking.request.lease(
                before, LeaseMode.READ, asking.identity, asking.task, "export_raw_vdi", wait=wait
            )
            try:
                await self._services.publications.settled(ref, lease.chain.nodes[0].identity)
                vdi = await self._services.inventory.vdi_as_it_is(ref)
            except BaseException as error:
                lease.release()
                if isinstance(error, (OSError, ImageError, XenAPIError)):
                    told = as_xenapi_error(error)
                    raise Refusal(status_of(told), told) from error
                raise
            if vdi.content_id == before.content_id:
                return vdi, lease
            lease.release()

    async def _answer(self, download: "_Download", task: "Task | None") -> None:
        async with AsyncExitStack() as stack:
            export = await self._open(stack, download)
            vdi, size, headers = download.vdi, export.body.size, download.request.headers
            head = _Head(vdi, download.choice.image_format, export.tag)
            if await _is_answered_by(download.connection, download.request, head, size):
                return
            try:
                wanted = requested_range(headers, size, export.tag)
            except UnsatisfiableRange:
                raise Refusal(
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                    _refused(headers, "range", f"there are {size} bytes"),
                    ("content-range", f"bytes */{size}"),
                    ("accept-ranges", "bytes"),
                ) from None
            if wanted is None and task is None:
                text = f"export of VDI {vdi.uuid}"
                task = await download.asked.new_task(download.identity, "export_raw_vdi", text)
                download.source.lease.work_under(task.ref)
            try:
                if task is None:
                    await self._send(download, export, head, wanted, None)
                else:
                    await self._send_under(task, download, export, head, wanted)
            except (OSError, ImageError, XenAPIError) as failure:
                told = as_xenapi_error(failure)
                if download.connection.answered is None:
                    # Its task has ended, or another request has begun under it, while the lease was awaited.
                    raise Refusal(status_of(told), told) from failure
                # The client sees it by the missing bytes; there is no other way to say it any more.
                download.connection.break_off()
                say = log.debug if told.code == "TASK_CANCELLED" else log.info
                say("export ended early", vdi=vdi.uuid, error=told.error_info)

    async def _open(self, stack: AsyncExitStack, download: "_Download") -> OpenExport:
        try:
            export = open_export(download.source, self._known_blocks, self._services.threads)
            return await stack.enter_async_context(export)
        except ImageTooLarge as error:
            size = XenAPIError("VDI_TOO_LARGE", str(download.vdi.virtual_size), str(MAX_VIRTUAL_SIZE))
            raise Refusal(HTTPStatus.CONFLICT, size) from error
        except (OSError, ImageError) as error:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, as_xenapi_error(error)) from error

    async def _send_under(
        self, task: "Task", download: "_Download", export: OpenExport, head: "_Head", wanted: ByteRange | None
    ) -> None:
        body = export.body
        length = body.size if wanted is None else wanted.stop - wanted.start
        cancellation = trio.CancelScope()
        async with self._services.tasks.operation(task, cancellation.cancel) as operation:
            operation.progress = lambda: body.sent / length
            with cancellation:
                await self._send(download, export, head, wanted, task)
            if cancellation.cancelled_caught:
                raise XenAPIError("TASK_CANCELLED", task.ref)

    async def _send(
        self,
        download: "_Download",
        export: OpenExport,
        head: "_Head",
        wanted: ByteRange | None,
        task: "Task | None",
    ) -> None:
        """Send head and body. Raises XenAPIError, OSError, ImageError when less than that was sent."""
        connection, body, vdi = download.connection, export.body, download.vdi
        start, stop = (0, body.size) if wanted is None else (wanted.start, wanted.stop)
        headers = head.headers(stop - start)
        if task is not None:
            headers.append(("task-id", task.ref))
        status = HTTPStatus.OK
        if wanted is not None:
            status = HTTPStatus.PARTIAL_CONTENT
            headers.append(("content-range", wanted.content_range(body.size)))
        sink = connection.take_sink()
        try:
            await connection.respond_head(status, headers)
            await body.transfer(sink, start, stop, self._services.threads)
        except (SinkClosed, WireBroken, trio.TooSlowError) as closed:
            log.debug("the client dropped its download", vdi=vdi.uuid, sent=body.sent, why=str(closed))
            connection.break_off()
            if task is not None:
                raise XenAPIError("TASK_CANCELLED", task.ref) from closed
        except SinkStalled as stalled:
            connection.break_off()
            log.info("a client that took nothing was cut off", vdi=vdi.uuid, seconds=stalled.seconds)
            raise XenAPIError("EXPORT_ERROR_CLIENT_STALLED", f"{stalled.seconds:g}") from stalled
        finally:
            sink.close()
            connection.sent(sink.sent)


@dataclass(frozen=True, slots=True)
class _Asking:
    """For whom, and under which task, something is leased."""

    request: DiskRequest
    identity: "Identity"
    task: "Task | None"


@dataclass(frozen=True, slots=True)
class _Download:
    """One admitted request with its lease."""

    connection: "Connection"
    request: "Request"
    asked: DiskRequest
    identity: "Identity"
    vdi: "VDI"
    choice: ExportChoice
    source: Source


@dataclass(frozen=True, slots=True)
class _Head:
    """What the head of an answer says of an export."""

    vdi: "VDI"
    image_format: ExportFormat
    tag: str

    def headers(self, length: int) -> list[tuple[str, str]]:
        """For `length` bytes of it."""
        return [
            ("content-type", self.image_format.content_type),
            ("content-length", str(length)),
            ("content-disposition", f'attachment; filename="{self.vdi.uuid}.{self.image_format.value}"'),
            ("accept-ranges", "bytes"),
            ("etag", self.tag),
            ("cache-control", "no-cache"),
        ]


async def _is_answered_by(connection: "Connection", request: "Request", head: _Head, size: int) -> bool:
    """Whether no body was asked for: the client has it already, or wants to know its head alone.

    Raises Refusal (412) for a client that wants another content, as one that goes on with a download may.
    """
    if is_another(request.headers, head.tag):
        error = _refused(request.headers, "if-match", f"the content has the ETag {head.tag}")
        raise Refusal(HTTPStatus.PRECONDITION_FAILED, error, ("etag", head.tag))
    if is_unchanged(request.headers, head.tag):
        await connection.respond_head(HTTPStatus.NOT_MODIFIED, [("etag", head.tag)])
    elif request.method == "HEAD":
        await connection.respond_head(HTTPStatus.OK, head.headers(size))
    else:
        return False
    return True


def _refused(headers: "Mapping[str, str]", name: str, reason: str) -> XenAPIError:
    return XenAPIError("VALUE_NOT_SUPPORTED", name, headers[name][:100], reason)
