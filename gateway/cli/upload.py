"""Sending a disk: from a file, a block device or a pipe into PUT /import_raw_vdi.

A file's data goes from the page cache to the socket within the kernel, its holes cost no read. From a pipe
whose length nobody knows, exactly as many bytes as the VDI has are taken. The trap: the gateway commits as
soon as it has all bytes, so the last ones are held back until it is certain that the pipe has no more.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gateway.cli.connection import Connection
from gateway.cli.exchange import PIECE_BYTES, SENDFILE_BYTES, ConnectionLostError, Exchange
from gateway.cli.output import CommandError, UsageError
from gateway.cli.progress import Display, Transfer
from gateway.cli.transfer_task import TransferTask, refusal, target_of
from gateway.images.files import next_data, next_hole

STDIN: Final = "-"
_ZEROES: Final = memoryview(bytes(PIECE_BYTES))
_MAGIC: Final = ((b"conectix", "VHD"), (b"QFI\xfb", "qcow2"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"))


@dataclass(frozen=True, slots=True)
class Source:
    """What is sent: `size` bytes from `offset` of a file, or a pipe of unknown (None) or given size."""

    fd: int
    name: str
    size: int | None
    offset: int
    seekable: bool


@contextlib.contextmanager
def open_source(name: str, size: int | None) -> Iterator[Source]:
    """Open what is to be sent; `size` bytes of it if given. Raises CommandError, UsageError."""
    if name == STDIN:
        yield _source(0, "stdin", size)
        return
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CommandError(f"{name}: {error.strerror}") from None
    try:
        yield _source(fd, name, size)
    finally:
        os.close(fd)


def _source(fd: int, name: str, size: int | None) -> Source:
    mode = os.fstat(fd).st_mode
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
    return Source(fd, name, length if size is None else size, offset, seekable=True)


def refuse_images(source: Source) -> None:
    """CommandError when the source is the file of another disk format: raw means the bytes of the disk."""
    begin = os.pread(source.fd, 16, source.offset) if source.seekable else b""
    for magic, name in _MAGIC:
        if begin.startswith(magic):
            raise CommandError(
                f"{source.name} looks like a {name} image, and only raw disks can be imported;"
                " convert it with `qemu-img convert -O raw`, or give --format raw to import it as it is"
            )


def upload(connection: Connection, source: Source, size: int, display: Display, transfer: Transfer) -> None:
    """Replace the first `size` bytes of the transfer's VDI by the source; durably, or not at all.

    Raises CommandError with the gateway's reason. Ctrl-C cancels the task on the gateway.
    """
    vdi = transfer.vdi
    task = TransferTask(connection, "vdi-import", f"import of {source.name} into VDI {vdi}")
    transfer.begin(0, size)
    begun = False
    try:
        with Exchange(connection.door) as exchange:
            try:
                exchange.request(
                    "PUT",
                    target_of("/import_raw_vdi", vdi, task),
                    {
                        "Cookie": f"session_id={connection.session}",
                        "Content-Length": str(size),
                        "Content-Type": "application/octet-stream",
                        "Expect": "100-continue",
                    },
                )
                head = exchange.answer()
                if head.status != 200:
                    raise refusal(exchange, head, vdi)
                begun = True
                _Sender(exchange, source, size, transfer).run()
                line = exchange.rest(head.length or 0)
            except (KeyboardInterrupt, CommandError, OSError) as error:
                if begun and not isinstance(error, ConnectionLostError) and not task.cancel():
                    display.note(f"the task {task.ref} could not be cancelled; the gateway ends it by itself")
                raise
    except ConnectionLostError as lost:
        # Perhaps only the last line was lost.
        _judge_by_task(connection, task, lost)
        return
    except OSError as error:
        raise CommandError(f"{source.name}: {error.strerror or error}; nothing was changed") from None
    finally:
        if not begun:
            task.drop()
    if len(line) != head.length or not line.startswith(b"success"):
        said = line.decode("utf-8", "replace").strip().removeprefix("failure ")
        raise CommandError(f"{said or task.failure() or 'the gateway ended the connection'}")


def _judge_by_task(connection: Connection, task: TransferTask, lost: ConnectionLostError) -> None:
    connection.restart(10.0)
    try:
        record = task.record()
        failure = task.failure()
    except CommandError:
        raise CommandError(
            f"{lost}, and the gateway can't be asked what became of it;"
            " look with task-list, and import the disk again if the task is no success"
        ) from None
    if record["status"] == "success":
        return
    raise CommandError(f"{failure or lost}; nothing was changed: import the disk again")


class _Sender:
    def __init__(self, exchange: Exchange, source: Source, size: int, transfer: Transfer) -> None:
        self._exchange = exchange
        self._source = source
        self._size = size
        self._transfer = transfer
        self._buffer = bytearray(PIECE_BYTES)
        self._sendfile = exchange.can_sendfile

    def run(self) -> None:
        """Send the body, or as much of it as the gateway wants: after its last word nothing is sent."""
        with contextlib.suppress(_AnsweredEarlyError):
            if self._source.seekable:
                self._send_file()
            else:
                self._send_pipe()

    def _send_file(self) -> None:
        fd, position = self._source.fd, self._source.offset
        stop = position + self._size
        while position < stop:
            data = next_data(fd, position, stop)
            if data > position:
                self._send_zeroes(data - position)
            position = next_hole(fd, data, stop) if data < stop else stop
            if data < position:
                self._send_data(fd, data, position)

    def _send_zeroes(self, count: int) -> None:
        while count:
            piece = min(count, PIECE_BYTES)
            self._send(_ZEROES[:piece])
            count -= piece

    def _send_data(self, fd: int, position: int, stop: int) -> None:
        while position < stop:
            count = self._send_some(fd, position, stop - position)
            if not count:
                raise CommandError(
                    f"{self._source.name} became shorter while it was read; nothing was changed"
                )
            position += count
            self._transfer.physical += count

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

    def _fill(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view):
            got = os.readv(self._source.fd, [view[filled:]])
            if not got:
                break
            filled += got
        return filled

    def _too_short(self, count: int) -> str:
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
