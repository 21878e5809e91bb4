"""Fetching a disk by GET /export_raw_vdi, over as many connections as it takes.

After a break the next request asks for the rest of the same content (Range and If-Range with its ETag); if
the disk has changed meanwhile, the whole of it comes, and what is a file begins anew. The trap: bytes that
went into a pipe can't be taken back, so there another content is a failure.
"""

import time
from dataclasses import dataclass
from typing import Final

from gateway.cli.connection import CallRefusedError, Connection
from gateway.cli.door import DoorClosedError
from gateway.cli.exchange import ConnectionLostError, Exchange, Head
from gateway.cli.export_target import ExportTarget
from gateway.cli.output import CommandError
from gateway.cli.progress import Display, Transfer
from gateway.cli.transfer_task import TransferTask, refusal, target_of

TRIES: Final = 6
FIRST_PAUSE_SECONDS: Final = 0.5
BUFFER_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is fetched: a VDI (uuid) in a format, with `base` (uuid) only what differs from that one."""

    vdi: str
    image_format: str = "raw"
    base: str | None = None

    def target(self, task: TransferTask) -> str:
        """The request target. uuids, references and names of formats need no quoting."""
        chosen = "" if self.image_format == "raw" else f"&format={self.image_format}"
        chosen += "" if self.base is None else f"&base={self.base}"
        return target_of("/export_raw_vdi", self.vdi, task) + chosen


def download(
    connection: Connection, wanted: Wanted, target: ExportTarget, display: Display, transfer: Transfer
) -> None:
    """Bring all of it into the target, durably. Raises CommandError, OSError of the target.

    When it ends early, what can be gone on with is kept, and the message says so.
    """
    try:
        _until_whole(connection, wanted, target, display, transfer)
        target.finish()
    except KeyboardInterrupt:
        display.note(f"interrupted{_kept(target)}")
        raise
    except CommandError as error:
        error.args = (f"{error}{_kept(target)}",)
        raise
    except OSError as error:
        raise CommandError(f"{target.name}: {error.strerror or error}{_kept(target)}") from None


def _kept(target: ExportTarget) -> str:
    try:
        return target.keep()
    except OSError as error:
        return f"; what was received can't be kept ({error.strerror})"


def _until_whole(
    connection: Connection, wanted: Wanted, target: ExportTarget, display: Display, transfer: Transfer
) -> None:
    failures = 0
    if target.offset:
        display.note(f"going on with {target.name} at {target.offset} bytes")
    while True:
        before = target.offset
        try:
            _Download(connection, wanted, target, display, transfer).run()
        except (ConnectionLostError, DoorClosedError) as lost:
            failures = 1 if target.offset > before else failures + 1
            if failures >= TRIES:
                raise CommandError(f"{lost} (tried {failures} times)") from None
            pause = FIRST_PAUSE_SECONDS * 2 ** (failures - 1)
            display.note(f"{lost}; trying again in {pause:g} s at {target.offset} bytes")
            time.sleep(pause)
            connection.restart(30.0)
        else:
            return


class _Download:
    """One request, and the bytes that it brings."""

    def __init__(
        self,
        connection: Connection,
        wanted: Wanted,
        target: ExportTarget,
        display: Display,
        transfer: Transfer,
    ) -> None:
        self._connection = connection
        self._wanted = wanted
        self._vdi = wanted.vdi
        self._target = target
        self._display = display
        self._transfer = transfer

    def run(self) -> None:
        """Raises ConnectionLostError when less came than was promised."""
        task = self._task()
        begun = False
        try:
            with Exchange(self._connection.door) as exchange:
                try:
                    exchange.request("GET", self._wanted.target(task), self._headers())
                    head = exchange.answer()
                    stop = self._begin(exchange, head)
                    begun = True
                    self._receive(exchange, stop)
                except (KeyboardInterrupt, OSError):
                    if begun and not task.cancel():
                        self._display.note(f"the task {task.ref} could not be cancelled; it ends by itself")
                    raise
        finally:
            if not begun:
                task.drop()

    def _task(self) -> TransferTask:
        description = f"export of VDI {self._vdi} to {self._target.name}"
        try:
            return TransferTask(self._connection, "vdi-export", description)
        except CallRefusedError as refused:
            if refused.code != "SESSION_INVALID":
                raise
            # The gateway was started anew while we waited.
            self._connection.log_in()
            return TransferTask(self._connection, "vdi-export", description)

    def _headers(self) -> dict[str, str]:
        headers = {"Cookie": f"session_id={self._connection.session}", "Connection": "close"}
        if self._target.offset and self._target.etag is not None:
            headers["Range"] = f"bytes={self._target.offset}-"
            headers["If-Range"] = self._target.etag
        return headers

    def _begin(self, exchange: Exchange, head: Head) -> int:
        """Prepare the target for what comes; where the disk ends. CommandError for a refusal."""
        target, etag = self._target, head.headers.get("etag", "")
        if head.status == 206 and target.offset:
            unit, _, rest = head.headers.get("content-range", "").partition(" ")
            place, _, whole = rest.partition("/")
            if (unit, place) != ("bytes", f"{target.offset}-{int(whole or 0) - 1}") or etag != target.etag:
                raise CommandError("the gateway sends another range than it was asked for; report this")
            self._transfer.begin(target.offset, int(whole))
            return int(whole)
        if head.status != 200 or head.length is None:
            raise refusal(exchange, head, self._vdi)
        if target.offset:
            self._display.note("the disk has changed since; beginning anew")
        target.begin(self._vdi, etag, head.length)
        self._transfer.begin(0, head.length)
        return head.length

    def _receive(self, exchange: Exchange, stop: int) -> None:
        target, transfer = self._target, self._transfer
        buffer = bytearray(BUFFER_BYTES)
        with memoryview(buffer) as view:
            while target.offset < stop:
                wanted = min(BUFFER_BYTES, stop - target.offset)
                filled = 0
                lost: ConnectionLostError | None = None
                while filled < wanted and lost is None:
                    try:
                        got = exchange.recv_into(view[filled:wanted])
                    except ConnectionLostError as error:
                        lost = error
                    else:
                        filled += got
                        if not got:
                            lost = ConnectionLostError(
                                f"the connection to {self._connection.door.url} ended early"
                            )
                target.write(buffer, filled)
                transfer.logical = target.offset
                transfer.physical = target.physical
                if lost is not None:
                    raise lost
