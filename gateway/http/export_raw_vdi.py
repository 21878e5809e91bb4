"""GET and HEAD /export_raw_vdi: a disk, or one range of it, as it is.

Everything is known before the first byte: size, ETag, what is asked for. So an interrupted download goes on,
and a connection is kept for the next range. Whole disks are sent under a task; a range only if the client
brought one, since programs that read a disk piece by piece would fill the list of tasks. The trap: clients
drop downloads on purpose, and often; that cancels the task and is no error.
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
from gateway.http.byte_ranges import ByteRange, UnsatisfiableRange, is_unchanged, requested_range
from gateway.http.disk_request import DiskRequest, DiskServices, Refusal
from gateway.http.wire import WireBroken
from gateway.images.errors import ImageError
from gateway.transfers.body import SinkClosed, SinkStalled
from gateway.transfers.export_raw import RawExport, open_raw_export, raw_entity_tag

if TYPE_CHECKING:
    from gateway.core.leases import Lease
    from gateway.core.records import VDI
    from gateway.core.sessions import Identity
    from gateway.core.tasks import Task
    from gateway.http.connection import Connection
    from gateway.http.request import Request

log = structlog.get_logger("gateway.http.export")

PERMISSION: Final = Permission("http/get_export_raw_vdi", Role.VM_ADMIN)
OCTETS: Final = "application/octet-stream"


class ExportRawVDI:
    """The handler of GET /export_raw_vdi."""

    def __init__(self, services: DiskServices) -> None:
        self._services: Final = services

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
        asked.require_raw()
        asked.require_here(vdi)
        tag = raw_entity_tag(vdi.content_id)
        if is_unchanged(request.headers, tag):
            await connection.respond_head(HTTPStatus.NOT_MODIFIED, [("etag", tag)])
        elif request.method == "HEAD":
            await connection.respond_head(HTTPStatus.OK, _headers(vdi, vdi.virtual_size))
        else:
            with self._services.slot(identity):
                vdi, lease = await self._lease(asked, vdi.ref, identity, task)
                try:
                    await self._answer(_Download(connection, request, asked, identity, vdi, lease), task)
                finally:
                    lease.release()

    async def _lease(
        self, asked: DiskRequest, ref: str, identity: "Identity", task: "Task | None"
    ) -> "tuple[VDI, Lease]":
        """A read lease, with the record whose content id names the leased bytes."""
        records = self._services.inventory.records.vdis
        while True:
            before = records.get(ref)
            lease = await asked.lease(before, LeaseMode.READ, identity, task, "export_raw_vdi")
            try:
                await self._services.publications.settled(ref, lease.chain.nodes[0].identity)
                vdi = records.get(ref)
            except BaseException:
                lease.release()
                raise
            if vdi.content_id == before.content_id:
                return vdi, lease
            lease.release()

    async def _answer(self, download: "_Download", task: "Task | None") -> None:
        async with AsyncExitStack() as stack:
            try:
                export = await stack.enter_async_context(
                    open_raw_export(download.lease, self._services.threads)
                )
            except (OSError, ImageError) as error:
                raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, as_xenapi_error(error)) from error
            vdi, size, headers = download.vdi, export.size, download.request.headers
            try:
                wanted = requested_range(headers, size, raw_entity_tag(vdi.content_id))
            except UnsatisfiableRange:
                await download.connection.respond(
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                    f"The disk has {size} bytes; ask for a range inside of it.\n".encode(),
                    headers=[("content-range", f"bytes */{size}"), ("accept-ranges", "bytes")],
                )
                return
            if wanted is None and task is None:
                text = f"export of VDI {vdi.uuid}"
                task = await download.asked.new_task(download.identity, "export_raw_vdi", text)
                download.lease.work_under(task.ref)
            try:
                if task is None:
                    await self._send(download, export, vdi, wanted, None)
                else:
                    await self._send_under(task, download, export, vdi, wanted)
            except (OSError, ImageError, XenAPIError) as failure:
                # The client sees it by the missing bytes; there is no other way to say it any more.
                download.connection.break_off()
                told = as_xenapi_error(failure)
                say = log.debug if told.code == "TASK_CANCELLED" else log.info
                say("export ended early", vdi=vdi.uuid, error=told.error_info)

    async def _send_under(
        self, task: "Task", download: "_Download", export: RawExport, vdi: "VDI", wanted: ByteRange | None
    ) -> None:
        length = export.size if wanted is None else wanted.stop - wanted.start
        cancellation = trio.CancelScope()
        async with self._services.tasks.operation(task, cancellation.cancel) as operation:
            operation.progress = lambda: export.sent / length
            with cancellation:
                await self._send(download, export, vdi, wanted, task)
            if cancellation.cancelled_caught:
                raise XenAPIError("TASK_CANCELLED", task.ref)

    async def _send(
        self,
        download: "_Download",
        export: RawExport,
        vdi: "VDI",
        wanted: ByteRange | None,
        task: "Task | None",
    ) -> None:
        """Send head and body. Raises XenAPIError, OSError, ImageError when less than that was sent."""
        connection = download.connection
        start, stop = (0, export.size) if wanted is None else (wanted.start, wanted.stop)
        headers = _headers(vdi, stop - start)
        if task is not None:
            headers.append(("task-id", task.ref))
        status = HTTPStatus.OK
        if wanted is not None:
            status = HTTPStatus.PARTIAL_CONTENT
            headers.append(("content-range", wanted.content_range(export.size)))
        sink = connection.take_sink()
        try:
            await connection.respond_head(status, headers)
            await export.transfer(sink, start, stop, self._services.threads)
        except (SinkClosed, WireBroken, trio.TooSlowError) as closed:
            log.debug("the client dropped its download", vdi=vdi.uuid, sent=export.sent, why=str(closed))
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
class _Download:
    """One admitted request with its lease."""

    connection: "Connection"
    request: "Request"
    asked: DiskRequest
    identity: "Identity"
    vdi: "VDI"
    lease: "Lease"


def _headers(vdi: "VDI", length: int) -> list[tuple[str, str]]:
    return [
        ("content-type", OCTETS),
        ("content-length", str(length)),
        ("content-disposition", f'attachment; filename="{vdi.uuid}.raw"'),
        ("accept-ranges", "bytes"),
        ("etag", raw_entity_tag(vdi.content_id)),
        ("cache-control", "no-cache"),
    ]
