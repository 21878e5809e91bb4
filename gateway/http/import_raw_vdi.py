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
from gateway.http.disk_request import DiskRequest, DiskServices, Refusal
from gateway.http.import_request import format_of
from gateway.http.wire import WireBroken
from gateway.images.errors import ImageError
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_disk import IntoVDI, Sent, import_disk
from gateway.transfers.import_raw import import_raw

if TYPE_CHECKING:
    from gateway.core.leases import Lease
    from gateway.core.records import VDI
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
        vdi = asked.vdi()
        task = asked.task(identity)
        if request.transfer_encoding is not None:
            raise Refusal(HTTPStatus.FORBIDDEN, XenAPIError("IMPORT_ERROR_CANNOT_HANDLE_CHUNKED"))
        form = format_of(request)
        asked.require_here(vdi)
        if vdi.read_only or vdi.is_a_snapshot or not vdi.managed:
            raise Refusal(HTTPStatus.CONFLICT, XenAPIError("VDI_READONLY", vdi.ref))
        if request.content_length == 0:
            text = b"nothing was sent: the VDI and the task are as they were; send the disk with its length\n"
            await connection.respond(HTTPStatus.OK, text, OCTETS)
            return
        with self._services.slot(identity):
            lease = await asked.lease(vdi, LeaseMode.REPLACE, identity, task, "import")
            try:
                task = task or await asked.new_task(identity, "import", f"import into VDI {vdi.uuid}")
                lease.work_under(task.ref)
                line = await self._import(_Upload(connection, request, form, vdi, lease), task)
            finally:
                lease.release()
        await connection.send(line)

    async def _import(self, upload: "_Upload", task: "Task") -> bytes:
        """Answer the head, receive the body, and return the last line."""
        connection, vdi = upload.connection, upload.vdi
        body = connection.take_body()
        try:
            await self._begin(connection, task)
            await self._receive(upload, body, task)
        except (OSError, ImageError, XenAPIError) as failure:
            error = as_xenapi_error(failure)
            log.info("import failed", vdi=vdi.uuid, task=task.ref, error=error.error_info)
            return failure_line(error)
        finally:
            body.close()
        log.info("imported", vdi=vdi.uuid, format=str(upload.form), task=task.ref)
        return success_line(vdi)

    async def _receive(self, upload: "_Upload", body: "Body", task: "Task") -> None:
        services = self._services
        if upload.form is not BodyFormat.RAW:
            await import_disk(
                services.tasks,
                task,
                sent=Sent(body, upload.form, upload.request.content_length),
                target=IntoVDI(services.inventory, services.publications, upload.vdi, upload.lease),
                threads=services.threads,
            )
            return
        await import_raw(
            services.inventory,
            services.tasks,
            task,
            vdi=upload.vdi,
            lease=upload.lease,
            body=body,
            length=upload.request.content_length,
            publications=services.publications,
            excess_wait=services.limits.excess_wait,
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
    """One admitted request with its lease."""

    connection: "Connection"
    request: "Request"
    form: BodyFormat
    vdi: "VDI"
    lease: "Lease"


def success_line(vdi: "VDI") -> bytes:
    """The promised last line, padded to its length."""
    text = f"success: the VDI {vdi.uuid} holds what was sent, durably; its task has succeeded"
    return text.encode().ljust(LAST_LINE_BYTES - 1) + b"\n"


def failure_line(error: XenAPIError) -> bytes:
    """One line that is shorter than was promised, however long the error is."""
    text = f"failure {error.code}: {error.message}".encode()
    return text[: LAST_LINE_BYTES - 2] + b"\n"
