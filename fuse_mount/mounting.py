"""A mount from its directory to its end: checks, stale mounts, signals, the loop, the unmount.

One mount per process: pyfuse3 has one session. The traps: nothing in this process may look into the mount
while the loop doesn't run, not even stat(); after a crash the mount point stays and answers ENOTCONN; and
what libfuse has to say about a mount that fails, it writes to descriptor 2 and tells nobody else.
"""

import ctypes
import errno
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import pyfuse3
import structlog
import trio

from fuse_mount.catalogue import Changes, Feed
from fuse_mount.operations import VdiOperations
from fuse_mount.tree import Tree

log = structlog.get_logger(__name__)

NAME: Final = "vdi-gateway"
KIND: Final = f"fuse.{NAME}"
"""How mountinfo calls the file system."""

DEVICE: Final = "/dev/fuse"
FUSE_CONFIGURATION: Final = "/etc/fuse.conf"

FIRST_RETRY_SECONDS: Final = 0.1
SLOWEST_RETRY_SECONDS: Final = 1.0
ENDING_SECONDS: Final = 20.0
"""How long requests that have begun may take to end; an open waits up to 10 s."""

MOST_REQUESTS: Final = 500
"""How many requests may be under way: all others wait, and opens of disks that are in use take seconds."""

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8


class MountRefused(Exception):  # noqa: N818 - an answer, not a fault
    """It can't be mounted: one line that says why and what to do."""


class OpenDisks(Protocol):
    """What the end of a mount needs of the disks."""

    @property
    def held(self) -> Mapping[str, str]:
        """The uuids of the VDIs that are open, and whether for "reading" or "writing"."""

    async def close(self) -> None:
        """Close them all, once what was written is durable."""


class Forgetting(Protocol):
    """What wants to hear that a VDI has changed."""

    def forget(self, vdi: str) -> None:
        """The VDI with this uuid may be another now."""

    def remove(self, vdi: str) -> None:
        """There is no VDI with this uuid any more."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of /proc/self/mountinfo: the device as MAJOR:MINOR, where, and the kind of file system."""

    device: str
    directory: str
    kind: str


def mounted_at(directory: str) -> Mounted | None:
    """What is mounted on this directory (a path without symbolic links), the topmost; None if nothing is."""
    found: Mounted | None = None
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            fields, _, rest = line.partition(b" - ")
            words = fields.split(b" ")
            place = os.fsdecode(_unescaped(words[4]))
            if place == directory:
                found = Mounted(words[2].decode(), place, rest.split(b" ", 1)[0].decode())
    return found


def _unescaped(field: bytes) -> bytes:
    r"""Spaces, tabs, line breaks and backslashes are written as \040 and so on (proc(5))."""
    first, *rest = field.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)


def claim(directory: str) -> str:
    """The directory to mount on, without symbolic links: it exists, is empty and nothing is mounted on it.

    What a mount of ours has left that crashed is cleaned away. MountRefused says what is in the way.
    """
    path = os.path.realpath(directory)
    while (mounted := mounted_at(path)) is not None:
        _clean(mounted)
    try:
        with os.scandir(path) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError:
        raise MountRefused(f"there is no directory {directory}; make it with: mkdir {directory}") from None
    except NotADirectoryError:
        raise MountRefused(f"{directory} is no directory; give an empty one") from None
    except OSError as error:
        raise MountRefused(f"{directory} can't be used: {error.strerror}; give an empty directory") from None
    if not empty:
        raise MountRefused(
            f"{directory} isn't empty; give an empty directory, since a mount hides what is in it"
        )
    if not os.access(path, os.W_OK):
        raise MountRefused(
            f"{directory} can't be written to by this user, as a mount needs; give one of your own"
        )
    return path


def _clean(mounted: Mounted) -> None:
    """Take away a mount of ours that has died; MountRefused for any other."""
    directory = mounted.directory
    try:
        os.statvfs(directory)  # what stat() says the kernel may still remember
    except OSError as error:
        dead = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    else:
        dead = False
    if not dead and mounted.kind == KIND:
        raise MountRefused(
            f"{directory} is mounted already, by another vdi-gateway mount;"
            f" unmount it with: fusermount3 -u {directory}"
        )
    if not dead or mounted.kind != KIND:
        state = "has died and is still" if dead else "is"
        raise MountRefused(
            f"a file system ({mounted.kind}) {state} mounted on {directory}; give another directory"
        )
    try:
        unmount(directory, lazily=True)
    except OSError as error:
        raise MountRefused(
            f"a mount that has died is still on {directory} and can't be unmounted: {error.strerror};"
            f" try as its owner or as root: fusermount3 -uz {directory}"
        ) from None
    log.warning("a mount that had died was unmounted", directory=directory)


def unmount(directory: str, *, lazily: bool) -> None:
    """Unmount; with `lazily` at once out of sight, and gone when the last file in it is closed. Blocks.

    OSError EBUSY if files in it are open.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(directory), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), directory)
        return
    # A session of its own: Ctrl-C is for us.
    done = subprocess.run(  # noqa: S603
        ["fusermount3", "-uz" if lazily else "-u", "--", directory],  # noqa: S607 - setuid, where PATH has it
        check=False,
        capture_output=True,
        text=True,
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["fusermount3 failed"])[-1]
        busy = "busy" in said.lower()
        raise OSError(errno.EBUSY if busy else errno.EPERM, said, directory)


def check_machine(*, others: bool) -> None:
    """Whether this machine and user can mount at all. MountRefused says what is missing."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        reason = "there is no" if missing else f"{error.strerror}:"
        remedy = (
            "load the kernel's module with: modprobe fuse; a container needs --device /dev/fuse"
            " and the capability SYS_ADMIN"
            if missing
            else "run this as root, or as a user who may open it; a container needs --device /dev/fuse"
        )
        raise MountRefused(f"{reason} {DEVICE}; {remedy}") from None
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise MountRefused("there is no fusermount3, by which users mount; install the package fuse3")
    if others and not _others_allowed():
        raise MountRefused(
            f"--allow-other: {FUSE_CONFIGURATION} doesn't let users do this; write a line user_allow_other"
            " into it as root, or leave --allow-other out"
        )


def _others_allowed() -> bool:
    try:
        with open(FUSE_CONFIGURATION, encoding="utf-8", errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Mount:
    """What is to be mounted where. `directory` comes from `claim`."""

    directory: str
    operations: VdiOperations
    tree: Tree
    feed: Feed
    disks: OpenDisks
    descriptions: Forgetting
    writable: bool = False
    others: bool = False

    @property
    def options(self) -> set[str]:
        """What libfuse and the kernel are told. The kernel compares owner and mode by itself."""
        options = {f"fsname={NAME}", f"subtype={NAME}", "default_permissions", "nosuid", "nodev", "noatime"}
        if not self.writable:
            options.add("ro")
        if self.others:
            options.add("allow_other")
        return options


async def serve(mount: Mount, mounted: Callable[[], None]) -> int:
    """Mount, call `mounted`, and serve until it is unmounted or SIGTERM, SIGHUP or Ctrl-C comes.

    The exit code: 1 if something that was written may be lost. Raises MountRefused.
    """
    # Where a shell starts it with &, Ctrl-C is meant for others.
    ends = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
    ends -= {number for number in ends if signal.getsignal(number) is signal.SIG_IGN}
    with trio.open_signal_receiver(*ends) as signals:
        _begin(mount)
        point = mounted_at(mount.directory)
        code = 0
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_follow, mount)
                nursery.start_soon(_obey, mount, point, signals)
                nursery.start_soon(_announce, mount.operations, mounted)
                # A request whose handler is cancelled hangs its reader for ever.
                with trio.CancelScope(shield=True):
                    await pyfuse3.main(max_tasks=MOST_REQUESTS)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await _leave(mount, point)
                code = await _close(mount)
                pyfuse3.close(unmount=False)
    return code


class _Noted(logging.Handler):
    """What pyfuse3 says goes to our log: answers that nobody waits for any more, mostly."""

    def emit(self, record: logging.LogRecord) -> None:
        log.debug("pyfuse3", said=record.getMessage())


def _begin(mount: Mount) -> None:
    noted = logging.getLogger("pyfuse3")
    noted.handlers, noted.propagate = [_Noted()], False
    with _libfuse_heard() as heard:
        try:
            pyfuse3.init(mount.operations, mount.directory, mount.options)
        except RuntimeError as error:
            said = heard().strip().splitlines() or [str(error)]
            raise MountRefused(
                f"{mount.directory} can't be mounted on: {said[-1]}; in a container the capability SYS_ADMIN"
                " is needed"
            ) from None


@contextmanager
def _libfuse_heard() -> Iterator[Callable[[], str]]:
    """Keeps what is written to descriptor 2."""
    kept = os.dup(2)
    memory = os.memfd_create("libfuse", os.MFD_CLOEXEC)
    try:
        os.dup2(memory, 2)
        yield lambda: os.pread(memory, 4096, 0).decode("utf-8", "replace")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(memory)


async def _announce(operations: VdiOperations, mounted: Callable[[], None]) -> None:
    await operations.ready.wait()
    mounted()


async def _follow(mount: Mount) -> None:
    """Keep the tree as the gateway is. While that is away, what is known stays."""
    pause = FIRST_RETRY_SECONDS
    away = False
    while True:
        try:
            changes: Changes = await trio.to_thread.run_sync(mount.feed.wait, abandon_on_cancel=True)
            for uuid, gone in mount.tree.apply(changes).items():
                (mount.descriptions.remove if gone else mount.descriptions.forget)(uuid)
        except Exception as error:
            # Whatever it is, disks that are open can be read on, so the mount stays.
            if not away and isinstance(error, OSError):
                answers = "is away" if isinstance(error, ConnectionError) else "doesn't tell what changes"
                log.warning(f"the gateway {answers}; what is known of its disks stays", why=str(error))
            elif not away:
                log.exception("what has changed could not be taken over; it is tried again")
            away = True
            await trio.sleep(pause)
            pause = min(pause * 2, SLOWEST_RETRY_SECONDS)
            continue
        if away:
            log.info("the gateway is back")
        away = False
        pause = FIRST_RETRY_SECONDS


async def _obey(mount: Mount, point: Mounted | None, signals: AsyncIterator[int]) -> None:
    """The first signal unmounts, a second one ends the process at once."""
    async with trio.open_nursery() as nursery:
        ending = False
        async for number in signals:
            if ending:
                log.error("ended at once, by a second signal", signal=signal.Signals(number).name)
                os._exit(128 + number)
            ending = True
            nursery.start_soon(_end, mount, point)


async def _end(mount: Mount, point: Mounted | None) -> None:
    with trio.CancelScope(shield=True):
        await _leave(mount, point)
    pyfuse3.terminate()
    # main() waits for the requests that have begun; it cancels this when they have ended.
    await trio.sleep(ENDING_SECONDS)
    log.error("requests that have begun don't end; what was written and not synced may be lost")
    os._exit(1)


async def _leave(mount: Mount, point: Mounted | None) -> None:
    """Unmount, also while files are open; whoever has them gets errors from now on.

    Where `umount --lazy` has been before, the directory may be another one's mount by now.
    """
    if point is None or mounted_at(mount.directory) != point:
        return
    try:
        await trio.to_thread.run_sync(_unmount_now, mount)
    except OSError as error:
        log.error("the directory can't be unmounted", directory=mount.directory, why=error.strerror)  # noqa: TRY400


def _unmount_now(mount: Mount) -> None:
    try:
        unmount(mount.directory, lazily=False)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        log.warning(
            "the mount is in use; it is unmounted, and files in it can't be read or written to any more",
            open=dict(mount.disks.held) or "none: it is somebody's working directory",
        )
        unmount(mount.directory, lazily=True)


async def _close(mount: Mount) -> int:
    """Close the disks and the session with the gateway; 1 if what was written is not durable."""
    code = 0
    try:
        await mount.disks.close()
    except Exception as error:  # noqa: BLE001  the end must come, and the exit code tells
        log.error("what was written to a disk could not be made durable", why=str(error))  # noqa: TRY400
        code = 1
    with trio.move_on_after(2):
        await trio.to_thread.run_sync(mount.feed.close, abandon_on_cancel=True)
    return code
