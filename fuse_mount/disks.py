"""The VDIs that are open in the mount: one lease for each, shared by all files that are open on it.

A lease is asked for at the first open and ends with the last close. Who only reads shares a lease to read;
who writes needs one alone, which those who read through this mount share. The kernel tells of a close after
close(2) has returned, so whoever finds a file of this mount in his way waits a moment.

The trap: another file may take the VDI's name while readers hold the old one (an import, a revert, a
snapshot). They go on with what they opened; who opens the VDI now gets what it is now, on another lease.
"""

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import structlog
import trio

from fuse_mount.disk_file import DiskFile, OpenFile
from fuse_mount.reading import Buffers, DiskReads
from fuse_mount.synthesised import SynthesisedFile, layout_of
from gateway.access.client import AccessDisk, open_vdi
from gateway.access.client_describe import describe_vdi
from gateway.access.client_patience import SharedPatience
from gateway.images.at_hand import AtHand, how_at_hand
from gateway.images.errors import ImageError
from gateway.images.export_layout import SparseFormat
from gateway.images.files import FileIdentity

if TYPE_CHECKING:
    from gateway.images.chain import ChainFiles
    from gateway.images.layout import Layout

log = structlog.get_logger("fuse_mount.disks")

PURPOSE: Final = "fuse"
_OPENS_AT_A_TIME: Final = 128  # what waits here waits for others, and who wants a free disk must not
_READS_AT_A_TIME: Final = 16
_ATTEMPTS: Final = 4  # at a VDI that gets another file each time


class Part(Enum):
    """Which of a VDI's files."""

    RAW = "raw"
    VHD = "vhd"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the disk, in bytes: a partition."""

    offset: int
    length: int


@dataclass(eq=False)
class _Held:
    """A VDI under one lease, from the asking to the end of it."""

    vdi: str
    write: bool
    users: int = 1
    failure: BaseException | None = None
    opened: trio.Event = field(default_factory=trio.Event)
    ending: bool = False
    ended: trio.Event = field(default_factory=trio.Event)
    files: set[DiskFile | SynthesisedFile] = field(default_factory=set)
    layouts: "dict[SparseFormat, Layout]" = field(default_factory=dict)
    content: object = field(default_factory=object)
    laying: trio.Lock = field(default_factory=trio.Lock)
    _disk: AccessDisk | None = None
    _reads: DiskReads | None = None

    @property
    def disk(self) -> AccessDisk:
        assert self._disk is not None
        return self._disk

    @property
    def reads(self) -> DiskReads:
        assert self._reads is not None
        return self._reads

    def begin(self, disk: AccessDisk, reads: DiskReads) -> None:
        self._disk, self._reads = disk, reads

    @property
    def is_revoked(self) -> bool:
        return self._disk is not None and self._disk.revoked is not None


class Disks:
    """The open VDIs of a mount. `session` gives a session's reference or None, each time it is asked.

    `wait_seconds` is how long an open waits for files of this mount to be closed, and for a gateway that
    restarts.
    """

    def __init__(
        self, control_socket: str, session: Callable[[], str | None], *, wait_seconds: float = 5.0
    ) -> None:
        self._control_socket: Final = control_socket
        self._session: Final = session
        self._wait: Final = wait_seconds
        self._patiently: Final = SharedPatience(wait_seconds)
        self._current: dict[str, _Held] = {}  # what a new file of a VDI can share
        self._all: dict[_Held, None] = {}
        self._held: dict[str, str] = {}
        self.held: Final[Mapping[str, str]] = MappingProxyType(self._held)
        """What is leased at any time, by the VDIs' uuids: "reading" or "writing"."""
        self._buffers = Buffers()
        self._opens = trio.CapacityLimiter(_OPENS_AT_A_TIME)
        self._closes = trio.CapacityLimiter(_OPENS_AT_A_TIME)  # an open may wait for one
        self._threads = trio.CapacityLimiter(_READS_AT_A_TIME)
        self._closed = False

    async def open(self, vdi: str, part: Part | Window, *, write: bool) -> OpenFile:
        """Open a file of the VDI with this uuid.

        Raises AccessRefused, ImageError, OSError: EBUSY when another file of this mount is in the way.
        """
        sparse = SparseFormat(part.value) if isinstance(part, Part) and part is not Part.RAW else None
        if sparse is not None and write:
            raise OSError(errno.EROFS, "this file is made of the disk when it is read")
        deadline = trio.current_time() + self._wait
        for _ in range(_ATTEMPTS):
            held = await self._hold(vdi, write=write, alone=sparse is not None, deadline=deadline)
            try:
                if sparse is None:
                    return self._disk_file(held, part if isinstance(part, Window) else None, write=write)
                layout = await self._layout(held, sparse)
                if layout is not None:
                    return self._synthesised(held, layout)
            except BaseException:
                await self._let_go(held)
                raise
            await self._let_go(held)
        raise OSError(errno.EBUSY, f"the VDI {vdi} gets another content each time it is opened")

    async def close(self) -> None:
        """End all leases, whatever is still open; the writers' data is durable then.

        Raises the first failure of a writer's flush, after all have ended.
        """
        self._closed = True
        failures: list[Exception] = []
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for held in list(self._all):
                    nursery.start_soon(self._end_noting, held, failures)
        if failures:
            raise failures[0]

    # Files

    def _disk_file(self, held: _Held, window: Window | None, *, write: bool) -> DiskFile:
        size = held.disk.size
        start, length = (0, size) if window is None else (window.offset, window.length)
        start = min(start, size)
        length = min(length, size - start)  # a table may say more than there is
        file: DiskFile
        disk = held.disk if held.write else None

        async def close() -> None:
            held.files.discard(file)
            await self._let_go(held)

        file = DiskFile(
            held.reads,
            self._buffers,
            disk,
            write=write,
            start=start,
            length=length,
            content=held.content,
            close=close,
        )
        held.files.add(file)
        return file

    def _synthesised(self, held: _Held, layout: "Layout") -> SynthesisedFile:
        file: SynthesisedFile

        async def close() -> None:
            held.files.discard(file)
            await self._let_go(held)

        file = SynthesisedFile(held.disk, layout, held.reads, close, held.content)
        held.files.add(file)
        return file

    async def _layout(self, held: _Held, sparse: SparseFormat) -> "Layout | None":
        """The file's layout; None if the VDI has another content by now."""
        async with held.laying:
            if sparse not in held.layouts:
                ask = partial(describe_vdi, self._control_socket, held.vdi, self._session())
                now = await trio.to_thread.run_sync(self._patiently, ask, limiter=self._opens)
                if now.leaf != held.disk.look(_leaf):
                    self._retire(held)
                    return None
                make = partial(layout_of, held.disk, now.content_id, sparse)
                held.layouts[sparse] = await held.reads.work(make)
            return held.layouts[sparse]

    # Leases

    async def _hold(self, vdi: str, *, write: bool, alone: bool, deadline: float) -> _Held:
        """A use of the VDI's lease, to be let go of; `alone`: without a writer in this mount."""
        while True:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the mount is about to end")
            held = self._current.get(vdi)
            if held is None or held.is_revoked:
                held = self._current[vdi] = _Held(vdi, write)
                self._all[held] = None
                self._note(vdi)
                await self._begin(held)
                return held
            if held.ending or (write and not held.write) or (alone and held.write):
                await _wait_for_end(held, deadline)
                continue
            held.users += 1
            try:
                await held.opened.wait()
                if held.failure is None and await self._is_current(held):
                    return held
            except BaseException:
                await self._let_go(held)
                raise
            await self._let_go(held)
            if isinstance(held.failure, Exception):
                raise held.failure
            # Who asked was cancelled, or the VDI has another file now.

    async def _begin(self, held: _Held) -> None:
        """Ask for the lease."""
        try:
            disk, at_hand = await trio.to_thread.run_sync(self._ask, held, limiter=self._opens)
            held.begin(disk, DiskReads(disk, at_hand, self._buffers, self._threads))
        except BaseException as failure:
            held.failure = failure
            self._forget(held)  # who opens it from now on asks anew
            held.opened.set()
            await self._let_go(held)
            raise
        held.opened.set()
        if self._closed:
            await self._let_go(held)
            raise OSError(errno.ESHUTDOWN, "the mount is about to end")

    def _ask(self, held: _Held) -> tuple[AccessDisk, AtHand]:
        def ask() -> AccessDisk:
            return open_vdi(
                self._control_socket,
                held.vdi,
                write=held.write,
                session=self._session(),
                purpose=PURPOSE,
                on_revoke=partial(_tell_revoked, held.vdi),
            )

        disk = self._patiently(ask)
        try:
            return disk, disk.look(_at_hand)
        except BaseException:
            disk.close()
            raise

    async def _is_current(self, held: _Held) -> bool:
        """Whether the VDI has the files still that are held; if not, who opens it next asks for a lease."""
        if held.write or held.ending:  # nobody replaces the files of a writer
            return not held.ending
        current = await trio.to_thread.run_sync(self._has_same_leaf, held, limiter=self._threads)
        if not current or held.is_revoked:
            self._retire(held)
            return False
        return not held.ending

    def _has_same_leaf(self, held: _Held) -> bool:
        path, identity = held.disk.look(_leaf_path)
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except PermissionError:  # another user's directory; the gateway may look
            return describe_vdi(self._control_socket, held.vdi, self._session()).leaf == identity
        return FileIdentity(status.st_dev, status.st_ino) == identity

    def _retire(self, held: _Held) -> None:
        if self._current.get(held.vdi) is held:
            del self._current[held.vdi]

    def _forget(self, held: _Held) -> None:
        self._retire(held)
        self._all.pop(held, None)
        self._note(held.vdi)

    def _note(self, vdi: str) -> None:
        """Have `held` say what is; one VDI may be read by more than one lease."""
        writes = [held.write for held in self._all if held.vdi == vdi]
        if writes:
            self._held[vdi] = "writing" if any(writes) else "reading"
        else:
            self._held.pop(vdi, None)

    async def _let_go(self, held: _Held) -> None:
        """One use less; with the last the lease ends. Raises what the last flush does."""
        held.users -= 1
        if held.users == 0:
            with trio.CancelScope(shield=True):
                await self._end(held)

    async def _end(self, held: _Held) -> None:
        """Close the disk, or wait until it is."""
        if held.ending:
            await held.ended.wait()
            return
        held.ending = True
        try:
            await held.opened.wait()
            if held.failure is None:
                for file in held.files:
                    file.end()
                await held.reads.end()
                await trio.to_thread.run_sync(held.disk.close, limiter=self._closes)
        finally:
            self._forget(held)
            held.ended.set()

    async def _end_noting(self, held: _Held, failures: list[Exception]) -> None:
        try:
            await self._end(held)
        except (OSError, ImageError) as failure:
            log.warning("what was written may be lost", vdi=held.vdi, why=str(failure))
            failures.append(failure)


async def _wait_for_end(held: _Held, deadline: float) -> None:
    with trio.move_on_at(deadline):
        await held.ended.wait()
        return
    what = "written to" if held.write else "read"
    raise OSError(errno.EBUSY, f"the VDI {held.vdi} is {what} through this mount")


def _at_hand(chain: "ChainFiles") -> AtHand:
    return how_at_hand(chain.nodes[0].fd)


def _leaf(chain: "ChainFiles") -> FileIdentity:
    return chain.nodes[0].identity


def _leaf_path(chain: "ChainFiles") -> tuple[str, FileIdentity]:
    return chain.nodes[0].path, chain.nodes[0].identity


def _tell_revoked(vdi: str, reason: str) -> None:
    log.warning("a VDI was taken away", vdi=vdi, why=reason)
