"""Disks for other processes: a VDI is opened through the gateway's control socket, and its bytes move here.

The gateway decides who may, leases the chain, and passes its descriptors, which carry the locks; after that
it is not on the way of the data. Every open has its own connection: its end is release. When the gateway
goes, reads and writes go on, and a thread announces the lease to the next one. Standard library only.

The trap: a revoked disk's descriptors are replaced under requests that run, and a number that is closed may
be somebody else's file a moment later. So closing, replacing and announcing take turns, closing as the last.
"""

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from gateway.access.client_answer import AccessRefused, answer
from gateway.access.client_link import ANSWER_SECONDS, ClientLink
from gateway.access.client_listing import list_vdis
from gateway.access.protocol import (
    Adopted,
    Announce,
    Granted,
    Moved,
    Open,
    ProtocolError,
    Refused,
    Revoke,
    Working,
    close_descriptors,
)
from gateway.images.chain import ChainFiles, NodeKind, OpenNode, open_disk
from gateway.images.disk import Extent, FileDisk, FileRange, Hole, Reader
from gateway.images.errors import ImageError
from gateway.images.files import Buffer, FileIdentity, identity_of

T = TypeVar("T")

__all__ = ["AccessDisk", "AccessRefused", "list_vdis", "open_vdi"]

REPORT_SECONDS: Final = 1.0  # how often the gateway is told of bytes that have moved
FIRST_RETRY_SECONDS: Final = 0.02  # a gateway that restarts is back within a second
SLOWEST_RETRY_SECONDS: Final = 1.0
RELEASE_SECONDS: Final = 5.0  # how long `close` waits for the gateway to have let others in

# Refusals of an announcement that say the right is gone; all others may pass, and the locks are ours still.
_FINAL: Final = frozenset(
    {
        "SESSION_INVALID",
        "SESSION_AUTHENTICATION_FAILED",
        "RBAC_PERMISSION_DENIED",
        "TASK_CANCELLED",
        "VDI_IN_USE",
        "OPERATION_NOT_ALLOWED",
    }
)


def open_vdi(
    control_socket: str,
    vdi: str,
    *,
    write: bool = False,
    session: str | None = None,
    purpose: str = "access",
    on_revoke: Callable[[str], None] | None = None,
) -> "AccessDisk":
    """Open the VDI with this uuid, for reading or alone for writing.

    `session` is a session's reference; without one the gateway asks the kernel who this process is. `purpose`
    is told to people who meet the lease. `on_revoke` gets the reason, in a thread of its own, once the files
    are given up. Raises AccessRefused, ImageError, OSError (no gateway there, or it went away).
    """
    link = ClientLink.connect(control_socket)
    try:
        granted = _ask(link, Open(vdi, write, purpose, session))
        chain = _chain(granted, link.take_descriptors(), write=write)
        try:
            files = tuple(node.identity for node in chain.nodes)
            disk = open_disk(chain, read_only=not write)
        except BaseException:
            chain.close()
            raise
        hold = _Hold(control_socket, vdi, write, purpose, session, granted.lease, files)
        return AccessDisk(disk, chain, link, hold, on_revoke)
    except ProtocolError as error:
        link.close()
        raise ConnectionError(f"{control_socket}: the gateway was not understood: {error}") from error
    except BaseException:
        link.close()
        raise


def _ask(link: ClientLink, asked: Open) -> Granted:
    link.send(asked)
    granted = answer(link)
    if not isinstance(granted, Granted) or not granted.files:
        raise ProtocolError("a disk was asked for and something else came")
    return granted


@dataclass(frozen=True, slots=True)
class _Hold:
    """What this process says of its lease when it announces it."""

    control_socket: str
    vdi: str
    write: bool
    purpose: str
    session: str | None
    lease: str
    files: tuple[FileIdentity, ...]


class AccessDisk:
    """A `Disk` under a lease of the gateway. After a revocation every request is OSError ESHUTDOWN."""

    def __init__(
        self,
        disk: FileDisk,
        chain: ChainFiles,
        link: ClientLink,
        hold: _Hold,
        on_revoke: Callable[[str], None] | None,
    ) -> None:
        self.size: Final = disk.size
        self.read_only: Final = disk.read_only
        self.revoked: str | None = None  # why, once it is
        # For people to look at: two threads at once may lose one's bytes.
        self.bytes_read = 0
        self.bytes_written = 0
        self._disk = disk
        self._chain = chain  # the disk owns its descriptors
        self._hold = hold
        self._on_revoke = on_revoke
        self._link: ClientLink | None = link
        self._task: str | None = None
        self._told = (0, 0)
        # Guards the numbers of the descriptors, the link and `_closing`.
        self._guard = threading.Lock()
        self._closing = threading.Event()
        # The thread gets its link here: in `_link` a `close` that comes before the thread does leaves none.
        self._thread = threading.Thread(
            target=self._listen, args=(link,), name=f"lease of {hold.vdi}", daemon=True
        )
        try:
            _dead_descriptor()
            self._thread.start()
        except BaseException:
            # No more threads or descriptors, or Ctrl-C: the thread must not hold what nobody will ever close.
            self._closing.set()
            self._link = None
            disk.close()
            link.end()
            raise

    @property
    def connected(self) -> bool:
        """Whether the gateway knows of the lease now; reads and writes don't depend on it."""
        return self._link is not None

    # The disk

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        """Fill `buf` with the bytes at `offset`."""
        # Asked for first, because what is known to be zeroes is read from no file.
        if self.revoked is not None:
            raise self._reason(None)
        try:
            self._disk.pread_into(buf, offset)
        except (OSError, ImageError) as error:
            raise self._reason(error) from error
        self.bytes_read += len(buf)

    def reader(self, *, nowait: bool = False) -> Reader:
        """Return the fastest way to read (see FileDisk); bytes and a revocation count there, too."""
        read = self._disk.reader(nowait=nowait)

        def counted(buf: bytearray | memoryview, offset: int) -> None:
            if self.revoked is not None:
                raise self._reason(None)
            try:
                read(buf, offset)
            except (OSError, ImageError) as error:
                raise self._reason(error) from error
            self.bytes_read += len(buf)

        return counted

    def pwrite(self, buf: Buffer, offset: int) -> None:
        """Write `buf` at `offset`. Durable only after `flush`."""
        if self.revoked is not None:
            raise self._reason(None)
        try:
            self._disk.pwrite(buf, offset)
        except (OSError, ImageError) as error:
            raise self._reason(error) from error
        self.bytes_written += len(buf)

    def zero(self, offset: int, length: int, *, trim: bool) -> None:
        """Make a range read as zeroes; with `trim` its space may be given back."""
        with self._told_of_revocation():
            self._disk.zero(offset, length, trim=trim)
        self.bytes_written += length

    def flush(self) -> None:
        """Make every completed write durable."""
        with self._told_of_revocation():
            self._disk.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what the range is made of, in order and without gaps."""
        with self._told_of_revocation():
            yield from self._disk.extents(offset, length)

    def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        """Yield where the bytes of the range lie, in order and without gaps."""
        with self._told_of_revocation():
            yield from self._disk.segments(offset, length)

    def look(self, question: Callable[[ChainFiles], T]) -> T:
        """What `question` finds in the files of the chain, which stay open and locked.

        Raises what it raises, or that the disk was revoked meanwhile.
        """
        with self._told_of_revocation():
            return question(self._chain)

    def close(self) -> None:
        """Flush, close the files and end the lease; after it others have been let in. Twice is allowed.

        Raises OSError when what was written could not be made durable; the lease has ended all the same.
        """
        with self._guard:
            if self._closing.is_set():
                return
            self._closing.set()
            try:
                self._disk.close()
            except (OSError, ImageError):
                if self.revoked is None:
                    raise
            finally:
                link, self._link = self._link, None
                if link is not None:
                    self._tell_moved(link)
                    link.end()
        if threading.current_thread() is not self._thread:
            self._thread.join(RELEASE_SECONDS)

    @contextlib.contextmanager
    def _told_of_revocation(self) -> Iterator[None]:
        """For requests that aren't made 100,000 times a second."""
        if self.revoked is not None:
            raise self._reason(None)
        try:
            yield
        except (OSError, ImageError) as error:
            raise self._reason(error) from error

    def _reason(self, error: Exception | None) -> Exception:
        if self.revoked is not None:
            return OSError(errno.ESHUTDOWN, f"the lease has ended: {self.revoked}")
        assert error is not None
        return error

    # The gateway

    def _listen(self, first: ClientLink) -> None:
        """Obey the gateway until the disk is closed or revoked; find the next one when it goes."""
        link: ClientLink | None = first
        while link is not None:
            try:
                self._follow(link)
            finally:
                with self._guard:
                    self._link = None
                link.close()
            if self._closing.is_set() or self.revoked is not None:
                break
            link = self._come_back()
        if self.revoked is not None and self._on_revoke is not None:
            self._on_revoke(self.revoked)

    def _follow(self, link: ClientLink) -> None:
        """Until the gateway goes or revokes the disk, or has let others in after it was closed."""
        while True:
            closed = self._closing.is_set()
            try:
                message = link.receive(RELEASE_SECONDS if closed else REPORT_SECONDS)
            except TimeoutError:
                if closed:
                    return
                with self._guard:
                    if self._link is link:
                        self._tell_moved(link)
                continue
            except (OSError, ProtocolError):
                return
            if message is None:
                return
            if isinstance(message, Working):
                self._task = message.task
            elif isinstance(message, Revoke):
                self._give_up(message.reason)
                return

    def _tell_moved(self, link: ClientLink) -> None:
        moved = (self.bytes_read, self.bytes_written)
        if moved != self._told:
            with contextlib.suppress(OSError):
                link.send(Moved(*moved))
                self._told = moved

    def _come_back(self) -> ClientLink | None:
        """Announce the lease to the next gateway, however late it comes; None once there is no need."""
        pause = FIRST_RETRY_SECONDS
        while not self._closing.wait(pause):
            pause = min(pause * 2, SLOWEST_RETRY_SECONDS)
            try:
                link = ClientLink.connect(self._hold.control_socket)
            except OSError:
                continue
            announced = False
            try:
                announced = self._announce(link)
            finally:
                if not announced:
                    link.close()
            if announced:
                return link
            if self.revoked is not None:
                return None
        return None

    def _announce(self, link: ClientLink) -> bool:
        hold = self._hold
        moved = (self.bytes_read, self.bytes_written)
        announce = Announce(
            hold.vdi, hold.write, hold.purpose, hold.session, hold.lease, self._task, *moved, hold.files
        )
        try:
            with self._guard:
                if self._closing.is_set():
                    return False
                link.send(announce, [node.fd for node in self._chain.nodes])
            come = link.receive(ANSWER_SECONDS)
        except (OSError, ProtocolError):
            return False
        if isinstance(come, Refused) and come.code in _FINAL:
            self._give_up(come.message)
        if isinstance(come, Revoke):
            self._give_up(come.reason)
        if not isinstance(come, Adopted):
            return False
        with self._guard:
            if self._closing.is_set():
                return False
            self._told = moved
            self._link = link
        return True

    def _give_up(self, reason: str) -> None:
        """Take the files away from whoever uses them now; with the last descriptor the locks go."""
        with self._guard:
            self.revoked = reason
            if self._closing.is_set():
                return
            for node in self._chain.nodes:
                os.dup2(_dead_descriptor(), node.fd, inheritable=False)


@functools.cache
def _dead_descriptor() -> int:
    """What takes the place of files that are given up: one for the process, which may have none left by then.

    Reads and writes on a descriptor that is open as a mere path are EBADF.
    """
    return os.open("/", os.O_PATH | os.O_CLOEXEC)


def _chain(granted: Granted, fds: list[int], *, write: bool) -> ChainFiles:
    """The files as they were granted; closed if they can't be used."""
    chain = ChainFiles([], write)
    try:
        # zip is strict: as many descriptors came as were promised.
        for file, fd in zip(granted.files, fds, strict=True):
            chain.nodes.append(OpenNode(file.path, fd, identity_of(fd), NodeKind(file.kind), file.parent))
    except ValueError as error:
        close_descriptors(fds)
        raise ConnectionError("the gateway sent other files than it said") from error
    except BaseException:
        close_descriptors(fds)
        raise
    return chain
