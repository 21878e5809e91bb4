"""Sending a disk or an image of one: from a file, a block device or a pipe into PUT /import_raw_vdi.

A file's data goes from the page cache to the socket within the kernel, its holes cost no read. A raw disk
from a pipe whose length nobody knows has to have exactly as many bytes as the VDI; an image goes in chunks.
The trap: the gateway commits as soon as it has all bytes, so the last ones of a raw disk are held back until
it is certain that the pipe has no more.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from gateway.cli.connection import Connection
from gateway.cli.exchange import PIECE_BYTES, SENDFILE_BYTES, ConnectionLostError, Exchange
from gateway.cli.output import CommandError, UsageError
from gateway.cli.progress import Display, Transfer
from gateway.cli.transfer_task import CANCEL_SECONDS, TransferTask, refusal
from gateway.core.errors import XenAPIError
from gateway.images.files import length_of, next_data, next_hole
from gateway.transfers.formats import MAGIC_BYTES, BodyFormat, recognise

STDIN: Final = "-"
_ZEROES: Final = memoryview(bytes(PIECE_BYTES))
# Of a VHD's footer (gateway/images/vhd/format.py).
_FOOTER_BYTES: Final = 512
_CURRENT_SIZE: Final = slice(48, 56)
_DISK_TYPE: Final = slice(60, 64)
_FIXED: Final = 2
_UUID: Final = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Source:
    """What is sent: `size` bytes from `offset` of a file, or a pipe of unknown (None) or given size.

    With `pieces` it is what that yields instead, `size` bytes in all; a failure of it ends the upload.
    """

    fd: int
    name: str
    size: int | None
    offset: int
    seekable: bool
    pieces: Callable[[], Iterable[bytes | memoryview]] | None = None
    modified_ns: int = 0

    def was_written_to(self) -> bool:
        """Whether somebody wrote to the file since it was opened. A block device doesn't tell."""
        return self.seekable and os.fstat(self.fd).st_mtime_ns != self.modified_ns


@contextlib.contextmanager
def open_source(name: str, size: int | None) -> Iterator[Source]:
    """Open what is to be sent; `size` bytes of it if given. Raises CommandError, UsageError."""
    if name == STDIN:
        yield _source(0, "stdin", size)
        return
    if not name:
        raise UsageError("the file's name is empty; give a file, a block device, or - for stdin")
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CommandError(f"{name}: {error.strerror}") from None
    try:
        yield _source(fd, name, size)
    finally:
        os.close(fd)


def _source(fd: int, name: str, size: int | None) -> Source:
    status = os.fstat(fd)
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise CommandError(f"{name} is a directory; give the file of a disk")
    if os.isatty(fd):
        raise UsageError(f"{name} is a terminal; give a file, or send a disk through a pipe")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIECE_BYTES)
        return Source(fd, name, size, 0, seekable=False)
    offset = os.lseek(fd, 0, os.SEEK_CUR)
    length = os.lseek(fd, 0, os.SEEK_END) - offset
    if size is not None and size > length:
        raise UsageError(f"--size: {name} has {length} bytes, fewer than {size}")
    wanted = length if size is None else size
    return Source(fd, name, wanted, offset, seekable=True, modified_ns=status.st_mtime_ns)


def format_of(source: Source) -> str:
    """The format of an image by its beginning, of a fixed VHD by its end; raw of a pipe and all else.

    CommandError for what is known and can't be read.
    """
    if not source.seekable:
        return "raw"
    try:
        name = recognise(os.pread(source.fd, MAGIC_BYTES, source.offset))
    except XenAPIError as error:
        _, what = error.params
        raise CommandError(f"{source.name} can't be imported: {what}") from None
    if name is not BodyFormat.RAW:
        return name
    size = source.size or 0
    end = os.pread(source.fd, _FOOTER_BYTES, source.offset + size - _FOOTER_BYTES) if size >= 1024 else b""
    is_fixed_vhd = (
        end.startswith(b"conectix")
        and int.from_bytes(end[_CURRENT_SIZE], "big") == size - _FOOTER_BYTES
        and int.from_bytes(end[_DISK_TYPE], "big") == _FIXED
    )
    return "vhd" if is_fixed_vhd else "raw"


@dataclass(frozen=True, slots=True)
class Upload:
    """What is sent: the bytes of `source`, as an image in `format` into what `query` names.

    `size` is how many bytes, None if a pipe tells it by its end. `is_new`: a VDI is made for it.
    """

    source: Source
    size: int | None
    format: str
    query: str
    what: str
    note: str = ""
    is_new: bool = False


def upload(connection: Connection, sent: Upload, display: Display, transfer: Transfer) -> str | None:
    """Send a disk; durably, or not at all. The uuid of the VDI if a new one was made.

    Raises CommandError with the gateway's reason. Ctrl-C cancels the task on the gateway.
    """
    source, size = sent.source, sent.size
    task = TransferTask(connection, "vdi-import", f"import of {source.name} into {sent.what}")
    transfer.begin(0, size or 0)
    begun = False
    try:
        # A gateway that copies the disk first, or makes gigabytes durable, takes nothing and says nothing.
        with Exchange(connection.door, task.goes_on) as exchange:
            try:
                exchange.request(
                    "PUT",
                    f"/import_raw_vdi?{sent.query}&format={sent.format}&task_id={task.ref}",
                    {
                        "Cookie": f"session_id={connection.session}",
                        **_length(size),
                        "Content-Type": "application/octet-stream",
                        "Expect": "100-continue",
                    },
                )
                head = exchange.answer()
                if head.status != 200:
                    raise refusal(exchange, head, sent.what)
                begun = True
                _Sender(exchange, source, size, transfer).run()
                line = exchange.rest(head.length or 0)
            except (KeyboardInterrupt, CommandError, OSError) as error:
                if begun and not isinstance(error, ConnectionLostError):
                    _cancel(connection, sent, task, display)
                raise
    except ConnectionLostError as lost:
        # Perhaps only the last line was lost.
        _judge_by_task(connection, sent, task, lost, display)
        return _made_by(connection, task) if sent.is_new else None
    except OSError as error:
        raise CommandError(f"{source.name}: {error.strerror or error}; nothing was changed") from None
    finally:
        if not begun:
            task.drop()
    if line.startswith(b"failure "):
        raise CommandError(line.decode("utf-8", "replace").strip().removeprefix("failure "))
    if len(line) != head.length or not line.startswith(b"success"):
        ended = ConnectionLostError("the gateway ended the connection")
        _judge_by_task(connection, sent, task, ended, display)
    if not sent.is_new:
        return None
    # A gateway that is being stopped finishes what it has, and can be asked nothing more.
    named = _UUID.search(line)
    return _made_by(connection, task) if named is None else named[0].decode()


def _made_by(connection: Connection, task: TransferTask) -> str:
    uuid: str = connection.call("VDI.get_uuid", task.made())
    return uuid


def _length(size: int | None) -> dict[str, str]:
    return {"Transfer-Encoding": "chunked"} if size is None else {"Content-Length": str(size)}


def _cancel(connection: Connection, sent: Upload, task: TransferTask, display: Display) -> None:
    """Cancel, and say what became of it if it isn't nothing: the gateway may have had all of it."""
    status = ""
    with contextlib.suppress(CommandError):
        if task.cancel():
            status = task.ended(CANCEL_SECONDS)["status"]
        if status == "success":
            made = f"; the new disk is {_made_by(connection, task)}" if sent.is_new else ""
            display.note(f"the import was done already{made}")
    if status not in ("success", "failure", "cancelled"):
        display.note(f"the task {task.ref} could not be cancelled; look with task-watch")


def _judge_by_task(
    connection: Connection, sent: Upload, task: TransferTask, lost: ConnectionLostError, display: Display
) -> None:
    """What became of an upload whose connection is lost: the gateway may have all of it, and go on."""
    connection.restart(10.0)
    try:
        if task.goes_on():
            display.note(f"{lost}; waiting for what the gateway makes of it")
        record = task.ended()
        failure = task.failure()
    except KeyboardInterrupt:
        _cancel(connection, sent, task, display)
        raise
    except CommandError:
        raise CommandError(
            f"{lost}, and the gateway can't be asked what became of it;"
            " look with task-list, and import the disk again if the task is no success"
        ) from None
    if record["status"] == "success":
        return
    raise CommandError(f"{failure or lost}; nothing was changed: import the disk again")


class _Sender:
    def __init__(self, exchange: Exchange, source: Source, size: int | None, transfer: Transfer) -> None:
        self._exchange = exchange
        self._source = source
        self._size = size or 0
        self._in_chunks = size is None
        self._transfer = transfer
        self._buffer = bytearray(PIECE_BYTES)
        self._sendfile = exchange.can_sendfile

    def run(self) -> None:
        """Send the body, or as much of it as the gateway wants: after its last word nothing is sent."""
        with contextlib.suppress(_AnsweredEarlyError):
            if self._source.pieces is not None:
                self._send_pieces(self._source.pieces())
            elif self._source.seekable:
                self._send_file()
            elif self._in_chunks:
                self._send_chunks()
            else:
                self._send_pipe()

    def _send_file(self) -> None:
        fd, position = self._source.fd, self._source.offset
        stop = position + self._size
        while position < stop:
            data = next_data(fd, position, stop)
            if data > position:
                self._send_hole(data - position, stop)
            position = next_hole(fd, data, stop) if data < stop else stop
            if data < position:
                self._send_data(fd, data, position)

    def _send_hole(self, count: int, stop: int) -> None:
        while count:
            # What was cut off a file looks like a hole at its end.
            if length_of(self._source.fd) < stop:
                raise self._shrunk()
            piece = min(count, PIECE_BYTES)
            self._send(_ZEROES[:piece])
            count -= piece

    def _send_data(self, fd: int, position: int, stop: int) -> None:
        while position < stop:
            count = self._send_some(fd, position, stop - position)
            if not count:
                raise self._shrunk()
            position += count
            self._transfer.physical += count

    def _shrunk(self) -> CommandError:
        return CommandError(f"{self._source.name} became shorter while it was read; nothing was changed")

    def _send_some(self, fd: int, position: int, count: int) -> int:
        if self._sendfile:
            self._listen()
            try:
                sent = self._exchange.sendfile(fd, position, min(count, SENDFILE_BYTES))
            except ConnectionLostError:
                self._listen()
                raise
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
                self._sendfile = False  # this kind of file can only be read
            else:
                self._transfer.logical += sent
                return sent
        with memoryview(self._buffer) as view:
            got = os.preadv(fd, [view[: min(count, PIECE_BYTES)]], position)
            self._send(view[:got])
        return got

    def _send_pieces(self, pieces: Iterable[bytes | memoryview]) -> None:
        for piece in pieces:
            self._send(memoryview(piece))
            self._transfer.physical += len(piece)

    def _send_pipe(self) -> None:
        held = 0
        left = self._size
        with memoryview(self._buffer) as view:
            while left:
                filled = self._fill(view[: min(left, PIECE_BYTES)])
                left -= filled
                self._transfer.physical += filled
                if left == 0:
                    held = filled
                    break
                if filled < PIECE_BYTES:
                    raise CommandError(self._too_short(self._size - left))
                self._send(view[:filled])
            if self._fill(memoryview(bytearray(1))):
                raise CommandError(self._too_long())
            self._send(view[:held])

    def _send_chunks(self) -> None:
        with memoryview(self._buffer) as view:
            while filled := self._fill(view):
                self._exchange.send(b"%x\r\n" % filled)
                self._send(view[:filled])
                self._exchange.send(b"\r\n")
                self._transfer.physical += filled
                self._transfer.total = self._transfer.logical  # nobody knows how much will come
        self._exchange.send(b"0\r\n\r\n")

    def _fill(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view):
            got = os.readv(self._source.fd, [view[filled:]])
            if not got:
                break
            filled += got
        return filled

    def _too_short(self, count: int) -> str:
        if not count:
            return f"{self._source.name} is empty; nothing was changed"
        if self._source.size is not None:
            return (
                f"--size: {self._source.name} ended after {count} of {self._size} bytes; nothing was changed"
            )
        return (
            f"{self._source.name} ended after {count} bytes, the disk has {self._size}; nothing was changed."
            f" If that is all, say so with --size {count}: the rest of the disk then stays as it is"
        )

    def _too_long(self) -> str:
        if self._source.size is not None:
            return f"--size: {self._source.name} has more than {self._size} bytes; nothing was changed"
        return f"{self._source.name} has more than the {self._size} bytes of the disk; nothing was changed"

    def _send(self, data: memoryview) -> None:
        self._listen()
        try:
            self._exchange.send(data)
        except ConnectionLostError:
            self._listen()
            raise
        self._transfer.logical += len(data)

    def _listen(self) -> None:
        if self._exchange.spoke():
            raise _AnsweredEarlyError


class _AnsweredEarlyError(Exception):
    """The gateway has sent its last line before the body had ended."""
