"""The logs of changed blocks of one SR: which VDI's log tells since which other one, and how they change.

A VDI whose changes are tracked has a log, `<uuid>.cbtlog` beside its image. What a log's header names as its
parent is the snapshot since which it tells, and that is what counts here; the child that it names is there
for XenServer, which goes the other way. All calls here block, and each write is durable or hasn't been.

The trap: a snapshot's log is there before its image. Until the VDI's own log names it as parent nobody goes
by it, and what a crash leaves of that, `recover_logs` finishes or undoes.
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

from gateway.images.cbtlog import CbtHeader, CbtLog, read_header, read_log
from gateway.images.errors import ImageError
from gateway.images.files import FileCalls
from gateway.images.vhd.image import open_vhd
from gateway.repository.directory import SRDirectory, is_there
from gateway.repository.scan import UUID_PATTERN
from gateway.repository.staging import staging_path

_LOG: Final = re.compile(rf"({UUID_PATTERN})\.cbtlog")
# Of a file that is damaged, or no file at all; what else fails may succeed a moment later.
_UNUSABLE: Final = frozenset(
    {
        errno.EIO,
        errno.EUCLEAN,
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENXIO,
        errno.ESPIPE,
        errno.ENOENT,
    }
)


class CbtLogs:
    """The logs in the directory of one SR."""

    def __init__(self, directory: SRDirectory, files: FileCalls) -> None:
        self._directory = directory
        self._files = files

    def path(self, uuid: str) -> str:
        """The log of a VDI."""
        return os.path.join(self._directory.root, f"{uuid}.cbtlog")

    def headers(self) -> dict[str, CbtHeader]:
        """All that can be read, by uuid: the chain breaks where one can't. Raises OSError."""
        found: dict[str, CbtHeader] = {}
        for name in os.listdir(self._directory.root):
            match = _LOG.fullmatch(name)
            if match is not None:
                with _unless_unusable():
                    found[match[1]] = read_header(os.path.join(self._directory.root, name))
        return found

    def read(self, uuid: str) -> CbtLog | None:
        """The log of a VDI; None if there is none that can be read. Raises OSError."""
        with _unless_unusable():
            return read_log(self.path(uuid))
        return None

    def write(self, uuid: str, log: CbtLog) -> None:
        """Replace a log, durably. Raises OSError (ENOSPC too); then the old one is there."""
        files, staged = self._files, staging_path(self._directory, uuid)
        header, bits = log.pack()
        try:
            fd = files.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if any(bits):
                    files.pwrite(fd, header + bits, 0)
                else:
                    files.pwrite(fd, header, 0)
                    files.truncate(fd, len(header) + len(bits))
                files.sync(fd)
            finally:
                files.close(fd)
            files.rename(staged, self.path(uuid))
        except BaseException:
            with suppress(OSError):
                files.unlink(staged)
            raise
        files.sync_directory(self._directory.root)

    def write_header(self, uuid: str, header: CbtHeader) -> None:
        """Replace what comes before the bits, durably. Raises OSError.

        It lies in one sector, so after a crash the old one is there or the new one; and it needs no space,
        which an SR doesn't have in which a snapshot is destroyed because it is full.
        """
        fd = self._files.open(self.path(uuid), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._files.pwrite(fd, header.pack(), 0)
            self._files.datasync(fd)
        finally:
            self._files.close(fd)

    def remove(self, uuid: str) -> None:
        """Remove a log, if there is one, durably. Raises OSError."""
        with suppress(FileNotFoundError):
            self._files.unlink(self.path(uuid))
            self._files.sync_directory(self._directory.root)

    def name_child(self, uuid: str | None, child: str | None) -> None:
        """Let a log say which one follows it; nothing if there is no such log. Raises OSError."""
        log = None if uuid is None else self.read(uuid)
        if uuid is not None and log is not None and log.header.child != child:
            self.write_header(uuid, replace(log.header, child=child))

    # A snapshot

    def begin_snapshot(self, source: str, snapshot: str, size: int) -> None:
        """Before the image of a snapshot is there: it gets what the log of its source says. Raises OSError.

        A source whose log is lost gets a new one, that tells since nothing.
        """
        log = self.read(source)
        if log is None:
            log = CbtLog.empty(size)
            self.write(source, log)
        header = replace(log.header, child=source, consistent=log.header.parent is None)
        self.write(snapshot, replace(log, header=header).resized(size))

    def settle_snapshot(self, source: str, snapshot: str) -> None:
        """After that, if the image of the snapshot is there, its source's log begins anew; else all is as
        before. Doing so again does no harm. Raises OSError, but not for what only XenServer goes by.
        """
        made, log = self.read(snapshot), self.read(source)
        if made is None or log is None:
            return
        if not is_there(self._directory.image(snapshot, "vhd")):
            if log.header.parent == snapshot:
                self.write(source, replace(made, header=replace(log.header, parent=made.header.parent)))
            self.remove(snapshot)
            return
        if log.header.parent == snapshot:
            return
        self.write(source, CbtLog.empty(made.header.size, parent=snapshot))
        with suppress(OSError):  # the next attach looks for it
            self.name_child(made.header.parent, snapshot)


def child_of_log(headers: Mapping[str, CbtHeader], uuid: str) -> str | None:
    """The VDI whose log tells what has changed since this one."""
    for child, header in headers.items():
        if header.parent == uuid and child != uuid:
            return child
    return None


def way_between(headers: Mapping[str, CbtHeader], older: str, newer: str) -> list[str]:
    """The uuids from one VDI to a later one, both included; empty if no logs lead there."""
    way = [newer]
    while way[-1] != older:
        header = headers.get(way[-1])
        parent = None if header is None else header.parent
        if parent is None or parent not in headers or parent in way:
            return []
        way.append(parent)
    return way[::-1]


def recover_logs(directory: SRDirectory, files: FileCalls) -> None:
    """Finish or undo what a crash left half done, for a writable SR whose images have been recovered.

    The log of a VDI that is written to here doesn't say what has changed in it, so XenServer is told not to
    believe it. Doing so again after a crash is safe. Raises OSError.
    """
    logs = CbtLogs(directory, files)
    headers = logs.headers()
    for uuid, header in headers.items():
        source = headers.get(header.child or "")
        if source is not None and header.child != uuid and source.parent == header.parent:
            assert header.child is not None
            logs.settle_snapshot(header.child, uuid)
    headers = logs.headers()
    for uuid, header in headers.items():
        child = child_of_log(headers, uuid)
        if header.child not in (None, child):
            logs.name_child(uuid, child)
        if child is None and header.consistent and _is_visible(directory.image(uuid, "vhd")):
            log = logs.read(uuid)
            if log is not None:
                logs.write(uuid, replace(log, header=replace(log.header, consistent=False)))


@contextmanager
def _unless_unusable() -> Iterator[None]:
    """Go on behind the block if one file in it is damaged or missing: it keeps nobody from the others."""
    try:
        yield
    except ImageError:
        return
    except OSError as error:
        if error.errno not in _UNUSABLE:
            raise


def _is_visible(path: str) -> bool:
    with _unless_unusable():
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return not open_vhd(fd, path).footer.hidden
        finally:
            os.close(fd)
    return False
