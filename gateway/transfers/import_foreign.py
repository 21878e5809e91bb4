"""Images that qemu-img reads: qcow2, VHDX and VMDK. They need all of the file, so it is kept until then.

The body goes into a file of the SR's staging directory. foreign_header.py looks at it first, as soon as it
can; then qemu-img, told the format and held in limits of memory, time and file size, says where in the file
the disk lies (foreign_map.py). Where that can't be said it writes the disk into a sparse file beside. What
isn't zeroes goes into the image. Both files have no name that an image could have, and go at the end whatever
happens; after a crash the next start sweeps them.

The trap: the process must end with its thread. It is killed when the transfer is aborted, and by the kernel
when the gateway dies; that goes by the thread that started it, and this one stays until the process has gone.
"""

import errno
import os
import selectors
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

from gateway.core.errors import XenAPIError
from gateway.images.disk import Disk
from gateway.images.errors import CorruptImage
from gateway.images.file_locks import FileUse, lock_file
from gateway.images.files import FILES, FileCalls
from gateway.images.raw import RawDisk
from gateway.images.vhd.format import round_up_to_sector
from gateway.transfers.body import BodyEnded, BodyReader, TransferAborted
from gateway.transfers.copy_disk import Copied, Readable, fill
from gateway.transfers.foreign_header import NotYet, end_unit, virtual_size
from gateway.transfers.foreign_map import MappedDisk, Unmapped
from gateway.transfers.formats import BodyFormat, Fits, corrupt_image, unsupported_image
from gateway.transfers.import_raw import BUFFER_BYTES

PROGRAM: Final = "qemu-img"
_NEEDED: Final = (PROGRAM, "setpriv", "prlimit")
# The head of an image is looked at when so much of it has come.
_HEAD_BYTES: Final = 4 << 20
# qemu-img takes 50 MiB; the caches of qcow2 and the threads that decompress take address space beside.
_MEMORY_BYTES: Final = 2 << 30
# Processor time: so many seconds, and one more for so many bytes of the disk.
_SECONDS: Final = 120
_BYTES_PER_SECOND: Final = 16 << 20
_MOST_SAID: Final = 4096
_PIPE_BYTES: Final = 64 << 10
# Of VHDX nothing is told.
_MAPPED: Final = frozenset({BodyFormat.QCOW2, BodyFormat.VMDK})
# What `qemu-img check` ends with when there are no errors, and when clusters are lost to nobody.
_CHECKED, _LEAKS = 0, 3
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# What it says of a VHDX that was open when its machine crashed: its metadata is whole only with its log.
_LOG: Final = "contains a log that needs to be replayed"


@dataclass(slots=True)
class Spool:
    """The files of one import, `prefix` with a suffix each; made when they are needed.

    `most` is how many bytes of a body are kept. A body is written by one thread; `abort` may come from any.
    """

    prefix: str
    most: int
    files: FileCalls = FILES
    fd: int = field(default=-1, init=False)
    aborted: bool = field(default=False, init=False)
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def image(self) -> str:
        """The body."""
        return f"{self.prefix}.image"

    @property
    def disk(self) -> str:
        """The disk in it."""
        return f"{self.prefix}.disk"

    def open(self) -> int:
        """Make the file of the body. Its lock keeps it from being swept."""
        self.fd = self.files.open(self.image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        lock_file(self.fd, FileUse.READ, self.image)
        return self.fd

    def remove(self) -> None:
        """Remove what there is. Blocks. Raises OSError when something stays, which the next start sweeps."""
        fd, self.fd = self.fd, -1
        with ExitStack() as all_of_it:
            for path in (self.disk, self.image):
                all_of_it.callback(self._unlink, path)
            if fd >= 0:
                all_of_it.callback(self.files.close, fd)

    def _unlink(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.files.unlink(path)

    def abort(self) -> None:
        """Kill the program that reads the image, and start none any more."""
        with self._lock:
            self.aborted = True
            if self._process is not None:
                self._process.kill()

    def check(self) -> None:
        """Raise TransferAborted after an abort."""
        if self.aborted:
            raise TransferAborted

    def run(self, command: list[str], tell: Callable[[bytes], None] | None = None) -> tuple[int, str]:
        """Run a program that reads nothing and names no file but ours; its exit code and its last words.

        `tell` gets each line of what it writes; if that raises, the program is killed.
        """
        with tempfile.TemporaryDirectory(prefix="vdi-gateway-") as empty:
            with self._lock:
                self.check()
                process = self._process = subprocess.Popen(  # noqa: S603 - no shell, and a format we chose
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if tell is None else subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=empty,
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "MALLOC_ARENA_MAX": "2"},
                )
            try:
                said = _listen(process, tell)
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            finally:
                with self._lock:
                    self._process = None
        self.check()
        return code, said.decode("utf-8", "replace")


def _listen(process: "subprocess.Popen[bytes]", tell: Callable[[bytes], None] | None) -> bytes:
    """Read what a program writes until it ends; its last words."""
    said = begun = b""
    with selectors.DefaultSelector() as selector, ExitStack() as streams:
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                selector.register(streams.enter_context(stream), selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                more = os.read(key.fd, _PIPE_BYTES)
                if not more:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    said = (said + more)[-_MOST_SAID:]
                elif tell is not None:
                    *lines, begun = (begun + more).split(b"\n")
                    for line in lines:
                        tell(line)
    if tell is not None:
        tell(begun)
    return said


def begin_foreign(reader: BodyReader, name: BodyFormat, fits: Fits, spool: Spool) -> "ForeignImage":
    """Keep the body until it says how large its disk is. Blocks.

    Raises XenAPIError, BodyEnded, OSError and what a body raises.
    """
    if any(shutil.which(program) is None for program in _NEEDED):
        raise XenAPIError("IMPORT_ERROR_CONVERTER_MISSING", name, PROGRAM)
    if reader.length is not None and reader.length > spool.most:
        raise _too_much(name, spool)
    image = ForeignImage(reader, name, spool)
    spool.open()
    try:
        image.keep(_HEAD_BYTES)
        image.look(whole=image.ended)
    except NotYet:
        image.keep(None)
        image.look(whole=True)
    fits(image.virtual_size)
    return image


def _too_much(name: BodyFormat, spool: Spool) -> XenAPIError:
    return XenAPIError("IMPORT_ERROR_IMAGE_TOO_LONG", name, str(spool.most))


@dataclass(slots=True)
class ForeignImage:
    """An image whose beginning lies in the spool."""

    reader: BodyReader
    name: BodyFormat
    spool: Spool
    virtual_size: int = 0
    ended: bool = False
    patches: bool = field(default=False, init=False)
    _copied: Copied | None = field(default=None, init=False)

    def fraction(self) -> float:
        """From 0.0 to 0.5 while it comes, the second half while its disk is written."""
        received = 1.0 if self.ended else self.reader.fraction(self.reader.length or self.virtual_size)
        return 0.5 * received + (0.5 * self._copied.fraction() if self._copied is not None else 0.0)

    def keep(self, most: int | None) -> None:
        """Write the next `most` bytes of the body to the spool, or all of it."""
        reader, spool = self.reader, self.spool
        left = most
        with memoryview(bytearray(BUFFER_BYTES)) as view:
            while not self.ended and left != 0:
                wanted = len(view) if left is None else min(len(view), left)
                position = reader.position
                got = reader.fill(view[:wanted])
                if position + got > spool.most:
                    raise _too_much(self.name, spool)
                spool.files.pwrite(spool.fd, view[:got], position)
                if left is not None:
                    left -= got
                self.ended = got < wanted
        if self.ended:
            reader.require_whole()

    def look(self, *, whole: bool) -> None:
        """Hold the header against what may be read. Raises XenAPIError, NotYet."""
        size = virtual_size(self.name, self.spool.fd, whole=whole)
        if self.virtual_size not in (0, size):
            raise corrupt_image(self.name, "it says two sizes")
        self.virtual_size = size

    def receive(self, disk: Disk, *, files: FileCalls = FILES) -> None:
        """Keep the rest, have it read, and write its disk to `disk`, which reads as zeroes all over. Blocks.

        Raises XenAPIError, BodyEnded, OSError and what a body raises.
        """
        self.keep(None)
        self.look(whole=True)
        seconds = _SECONDS + self._size // _BYTES_PER_SECOND
        command = ["setpriv", "--pdeathsig", "KILL", "--no-new-privs", "--", "prlimit"]
        command += [f"--as={_MEMORY_BYTES}", f"--cpu={seconds}", f"--fsize={self._size}", "--core=0"]
        command += ["--nofile=64", "--", PROGRAM]
        # What lies beyond the end of a file that was cut short would be read as zeroes.
        code, said = self.spool.run([*command, "check", "-q", "-f", self.name, self.spool.image])
        if code not in (_CHECKED, _LEAKS):
            raise self._failed(code, said, seconds)
        mapped = self._map(command, seconds) if self.name in _MAPPED else None
        if self.reader.length is None and not self.reader.end_is_told:
            self._require_end(mapped)
        if mapped is not None:
            self._fill(mapped, disk, files)
            return
        self._convert(command, seconds)
        fd = os.open(self.spool.disk, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        written = RawDisk(fd, os.fstat(fd).st_size, read_only=True, path=self.spool.disk)
        try:
            if written.size > self._size:
                raise corrupt_image(self.name, f"{PROGRAM} finds {written.size} bytes in it")
            # There need not be room for the body any more.
            self.spool.files.truncate(self.spool.fd, 0)
            self._fill(written, disk, files)
        finally:
            written.close()

    @property
    def _size(self) -> int:
        """Bytes of the disk as qemu counts them."""
        return round_up_to_sector(self.virtual_size)

    def _fill(self, source: Readable, disk: Disk, files: FileCalls) -> None:
        self._copied = Copied(source.size)
        fill(source, disk, self._copied, check=self.spool.check, files=files)

    def _require_end(self, mapped: MappedDisk | None) -> None:
        """Nobody has told where the body ends, and qemu-img lets a file lack nearly all of its last cluster.

        Raises BodyEnded for what is cut off, XenAPIError where that can't be told.
        """
        unit = end_unit(self.name, self.spool.fd)
        if unit is None:
            return
        if mapped is None:
            problem = "it has no length, and compressed as it is nothing tells whether its end is missing"
            raise unsupported_image(self.name, problem)
        end = os.fstat(self.spool.fd).st_size
        needed = max(mapped.needed, -(-end // unit) * unit)
        if end < needed:
            raise BodyEnded(needed, end)

    def _map(self, command: list[str], seconds: int) -> MappedDisk | None:
        """The disk as it lies in the body; None if it doesn't, or not all of it."""
        spool = self.spool
        mapped = MappedDisk(spool.fd, self._size, os.fstat(spool.fd).st_size, spool.image)
        try:
            code, said = spool.run(
                [*command, "map", "--output=json", "-f", self.name, spool.image], mapped.tell
            )
            if code:
                raise self._failed(code, said, seconds)
            mapped.require_whole()
        except Unmapped:
            return None
        except CorruptImage as error:
            raise corrupt_image(self.name, error.problem) from error
        return mapped

    def _convert(self, command: list[str], seconds: int) -> None:
        source, disk = self.spool.image, self.spool.disk
        code, said = self.spool.run(
            [*command, "convert", "-f", self.name, "-O", "raw", "-S", "64k", source, disk]
        )
        if code:
            raise self._failed(code, said, seconds)

    def _failed(self, code: int, said: str, seconds: int) -> Exception:
        for number in _FULL:
            if os.strerror(number) in said:
                return OSError(number, os.strerror(number))
        if code < 0 or "Cannot allocate memory" in said:
            return XenAPIError("IMPORT_ERROR_CONVERTER_LIMIT", self.name, str(seconds))
        if _LOG in said:
            problem = "it wasn't closed properly; let `qemu-img check -r all` replay its log first"
            return unsupported_image(self.name, problem)
        # Of our paths nobody has to know.
        for path in (self.spool.image, self.spool.disk):
            said = said.replace(path, "the image")
        return corrupt_image(self.name, " ".join(said.split())[-300:] or f"{PROGRAM} ended with {code}")
