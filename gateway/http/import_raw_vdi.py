"""PUT /import_raw_vdi: a disk from the body into a VDI, raw as the Xen proposal states it, or as an image.

The answer begins before the body is read, since some clients send nothing before it; so a status can't tell
how the import ended. What tells is one last line of a length that the head has promised: it comes whole only
after the commit and the task's success. After a failure a shorter line comes and the connection ends, and
every client that checks lengths reports an error. The trap: 200 alone is no success.
"""

import contextlib
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import structlog
import trio

from gateway.core.errors import XenAPIError, as_xenapi_error
from gateway.core.leases import LeaseMode
from gateway.core.roles import Permission, Role
from gateway.http.chunked_body import ChunkedBody
from gateway.http.disk_request import DiskRequest, DiskServices, Refusal
from gateway.http.import_request import format_of, require_encoding, require_plain, size_of
from gateway.http.wire import WireBroken
from gateway.images.errors import ImageError
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_disk import NEW_NAME, IntoSR, IntoVDI, Sent, import_disk
from gateway.transfers.import_raw import import_raw

if TYPE_CHECKING:
    from gateway.core.records import SR, VDI
    from gateway.core.sessions import Identity
    from gateway.core.tasks import Task
    from gateway.http.connection import Connection
    from gateway.http.request import Request
    from gateway.transfers.body import Body

log = structlog.get_logger("gateway.http.import")

PERMISSION: Final = Permission("http/put_import_raw_vdi", Role.VM_ADMIN)
# The last line of a success has exactly so many bytes; that of a failure has fewer.
LAST_LINE_BYTES: Final = 256
OCTETS: Final = "application/octet-stream"


class ImportRawVDI:
    """The handler of PUT /import_raw_vdi."""

    def __init__(self, services: DiskServices) -> None:
        self._services: Final = services

    async def __call__(self, connection: "Connection", request: "Request") -> None:
        """Answer one request."""
        asked = DiskRequest(self._services, request, PERMISSION, challenge=False)
        try:
            await self._admit(connection, request, asked)
        except Refusal as refusal:
            await asked.refuse(connection, refusal)

    async def _admit(self, connection: "Connection", request: "Request", asked: DiskRequest) -> None:
        identity = await asked.identity()
        sr = asked.sr()
        vdi = asked.vdi() if sr is None else None
        task = asked.task(identity)
        form = format_of(request)
        # Of the Xen proposal is a raw disk into a VDI that exists.
        require_encoding(request, as_proposed=form is BodyFormat.RAW and vdi is not None)
        require_plain(request)
        if sr is not None:
            self._require_writable(asked, sr)
        else:
            assert vdi is not None
            asked.require_here(vdi)
            if vdi.read_only or vdi.is_a_snapshot or not vdi.managed:
                raise Refusal(HTTPStatus.CONFLICT, XenAPIError("VDI_READONLY", vdi.ref))
        if request.content_length == 0 and request.transfer_encoding is None:
            text = b"nothing was sent: the VDI and the task are as they were; send the disk with its length\n"
            await connection.respond(HTTPStatus.OK, text, OCTETS)
            return
        upload = _Upload(connection, request, form, asked, identity)
        with self._services.slot(identity):
            if vdi is not None:
                line = await self._into_vdi(upload, vdi, task)
            else:
                assert sr is not None
                line = await self._into_sr(upload, sr, task)
        await connection.send(line)

    def _require_writable(self, asked: DiskRequest, sr: "SR") -> None:
        asked.require_sr_here(sr.ref)
        if not self._services.inventory.repository(sr.ref).writable:
            error = XenAPIError("OPERATION_NOT_ALLOWED", "the SR is attached read-only")
            raise Refusal(HTTPStatus.CONFLICT, error)

    async def _into_vdi(self, upload: "_Upload", vdi: "VDI", task: "Task | None") -> bytes:
        services = self._services
        lease = await upload.asked.lease(vdi, LeaseMode.REPLACE, upload.identity, task, "import")
        try:
            task = task or await upload.asked.new_task(
                upload.identity, "import", f"import into VDI {vdi.uuid}"
            )
            lease.work_under(task.ref)
            # A resize or revert that was waited for has given it another size.
            vdi = upload.asked.vdi()
            target = IntoVDI(services.inventory, services.publications, vdi, lease)
            return await self._import(upload, target, task)
        finally:
            lease.release()

    async def _into_sr(self, upload: "_Upload", sr: "SR", task: "Task | None") -> bytes:
        size = size_of(upload.request)
        task = task or await upload.asked.new_task(upload.identity, "import", f"import into SR {sr.uuid}")
        name = upload.request.parameter("name_label") or NEW_NAME
        target = IntoSR(self._services.inventory, sr.ref, upload.identity.user, task.ref, size, name)
        return await self._import(upload, target, task)

    async def _import(self, upload: "_Upload", target: "IntoVDI | IntoSR", task: "Task") -> bytes:
        """Answer the head, receive the body, and return the last line."""
        connection = upload.connection
        uuid = target.vdi.uuid if isinstance(target, IntoVDI) else target.uuid
        try:
            body = connection.take_body()
        except OSError as failure:  # no descriptor is left
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, as_xenapi_error(failure)) from failure
        try:
            await self._begin(connection, task)
            await self._receive(upload, target, body, task)
        except (OSError, ImageError, XenAPIError) as failure:
            error = as_xenapi_error(failure)
            log.info("import failed", vdi=uuid, task=task.ref, error=error.error_info)
            return failure_line(error)
        finally:
            body.close()
        log.info("imported", vdi=uuid, format=str(upload.form), task=task.ref)
        return success_line(uuid)

    async def _receive(
        self, upload: "_Upload", target: "IntoVDI | IntoSR", body: "Body", task: "Task"
    ) -> None:
        services, request = self._services, upload.request
        if upload.form is BodyFormat.RAW and isinstance(target, IntoVDI):
            await import_raw(
                services.inventory,
                services.tasks,
                task,
                vdi=target.vdi,
                lease=target.lease,
                body=body,
                length=request.content_length,
                publications=services.publications,
                excess_wait=services.limits.excess_wait,
                threads=services.threads,
            )
            return
        is_chunked = request.transfer_encoding is not None
        sent = Sent(
            ChunkedBody(body) if is_chunked else body,
            upload.form,
            None if is_chunked else request.content_length,
            end_is_told=is_chunked,
        )
        await import_disk(
            services.tasks,
            task,
            sent=sent,
            target=target,
            spool_bytes=services.limits.spool_bytes,
            threads=services.threads,
        )

    @staticmethod
    async def _begin(connection: "Connection", task: "Task") -> None:
        head = [
            ("content-type", OCTETS),
            ("cache-control", "no-cache, no-store"),
            ("task-id", task.ref),
            ("content-length", str(LAST_LINE_BYTES)),
        ]
        # A client that has gone already is found out by its body, and so the task tells it.
        with contextlib.suppress(WireBroken, trio.TooSlowError):
            await connection.continue_body()
            await connection.respond_head(HTTPStatus.OK, head, close=True)


@dataclass(frozen=True, slots=True)
class _Upload:
    """One admitted request."""

    connection: "Connection"
    request: "Request"
    form: BodyFormat
    asked: DiskRequest
    identity: "Identity"


def success_line(uuid: str) -> bytes:
    """The promised last line, padded to its length."""
    text = f"success: the VDI {uuid} holds what was sent, durably; its task has succeeded"
    return text.encode().ljust(LAST_LINE_BYTES - 1) + b"\n"


def failure_line(error: XenAPIError) -> bytes:
    """One line that is shorter than was promised, however long the error is."""
    text = f"failure {error.code}: {error.message}".encode()
    return text[: LAST_LINE_BYTES - 2] + b"\n"
