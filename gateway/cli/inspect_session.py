"""One VDI as files for as long as a command runs, and filesystems of it mounted from them by loop devices.

`vdi-gateway mount` runs as a child process on a directory of ours under /run. Cleaning up goes by what is
mounted, not by what this process remembers, so that it does the same wherever it was interrupted, and the
next start does it for one that was killed. The traps: a program that hangs on our own mount ends only when
the mount does; and once a mount has gone, the kernel calls the file behind a loop device by its path in it.
"""

import errno
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, Final, TypeAlias

from fuse_mount.programs import ProgramError, end_process, program_path, run_program
from gateway.cli.output import CommandError, print_note

Handler: TypeAlias = Callable[[int, FrameType | None], Any] | signal.Handlers

PREFIX: Final = "vdi-gateway-inspect-"
START_SECONDS: Final = 60.0
MOUNT_SECONDS: Final = 60.0
UNMOUNT_SECONDS: Final = 30.0
_END_SECONDS: Final = 25.0
_AGAIN_SECONDS: Final = 0.2
_NOTE: Final = "mounted"

# No journal is replayed, nothing in it runs or is a device, and where ext4's superblock says that the kernel
# is to panic at an error, it doesn't.
_ALWAYS: Final = "loop,ro,nosuid,nodev,noexec"
_OPTIONS: Final = {
    "ext2": "errors=remount-ro",
    "ext3": "noload,errors=remount-ro",
    "ext4": "noload,errors=remount-ro",
    "xfs": "norecovery,nouuid",
    "btrfs": "rescue=nologreplay",
    "f2fs": "norecovery",
    "vfat": "",
    "exfat": "",
    "ntfs": "",
    "iso9660": "",
    "udf": "",
    "squashfs": "",
    "erofs": "",
    "jfs": "",
    "reiserfs": "",
    "hfs": "",
    "hfsplus": "",
}
# The first of them is ntfs-3g where it is installed.
_DRIVERS: Final = {"ntfs": ("ntfs", "ntfs3")}


class Terminated(SystemExit):
    """SIGTERM or SIGHUP has come; the exit code is that of the shells."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of /proc/self/mountinfo: where, and the device that is mounted."""

    directory: str
    source: str


def mounts() -> list[Mounted]:
    """Everything that is mounted, in order."""
    found = []
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            fields, _, rest = line.rstrip(b"\n").partition(b" - ")
            words = (fields.split(b" ")[4], rest.split(b" ")[1])
            # Spaces and the like are written as \040 (proc(5)).
            plain = [re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), word) for word in words]
            found.append(Mounted(os.fsdecode(plain[0]), os.fsdecode(plain[1])))
    return found


def is_mounted(directory: str) -> bool:
    """Whether anything is mounted there; a dead mount is, too."""
    return any(each.directory == directory for each in mounts())


@contextmanager
def inspection(uuid: str, arguments: Sequence[str]) -> "Iterator[Inspection]":
    """The files of one VDI, by `vdi-gateway mount` with `arguments`. CommandError says why not."""
    with _terminable():
        directory, lock = _own_directory()
        session = Inspection(directory, uuid)
        try:
            session.start(arguments)
            yield session
        finally:
            with _undisturbed():
                session.end()
                os.close(lock)


class Inspection:
    """A directory of ours: in it the FUSE mount, a place to mount on, and a note of what is mounted where."""

    def __init__(self, directory: str, uuid: str) -> None:
        self._directory: Final = directory
        self._disks: Final = os.path.join(directory, "disks")
        self._uuid: Final = uuid
        self.files: Final = os.path.join(self._disks, "by-uuid", uuid)
        """The directory with the VDI's files. To touch one is for other processes: it may hang."""
        self._real = self.files
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.scratch: Final = os.path.join(directory, "filesystem")

    def start(self, arguments: Sequence[str]) -> None:
        """Mount the VDI's files, and return when they are there."""
        os.mkdir(self._disks, 0o700)
        os.mkdir(self.scratch, 0o700)
        self._log = os.fdopen(os.memfd_create("log", os.MFD_CLOEXEC), "w+b")
        # When this process is killed, setpriv has seen to it that the mount ends, too.
        command = [program_path("setpriv"), "--pdeathsig", "TERM", sys.executable, "-P", "-c"]
        command += ["from gateway.cli.main import main; main()", "mount", self._disks, "--only", self._uuid]
        self._child = subprocess.Popen(  # noqa: S603 - ourselves
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            process_group=0,
        )
        assert self._child.stdout is not None
        readable, _, _ = select.select([self._child.stdout], [], [], START_SECONDS)
        if not readable:
            raise CommandError(f"vdi-gateway mount has not begun within {START_SECONDS:.0f} s")
        if not os.read(self._child.stdout.fileno(), 4096):
            raise CommandError(self._why())
        ended = run_program(
            ["realpath", "--canonicalize-existing", "--zero", self.files], seconds=START_SECONDS
        )
        if ended.code:
            raise CommandError(f"the disk {self._uuid} isn't among the files; does vdi-list still show it?")
        self._real = os.fsdecode(ended.output.rstrip(b"\0"))

    def _why(self) -> str:
        """The last line of what the mount has said."""
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
        return lines[-1].removeprefix("vdi-gateway mount: ") if lines else "vdi-gateway mount has ended"

    def mount(self, file: str, kind: str, directory: str) -> None:
        """Mount a filesystem that lies in one of the files, read-only. ProgramError has mount's own words."""
        if kind not in _OPTIONS:
            raise ProgramError(errno.EINVAL, f"filesystems of type {kind} aren't mounted")
        # The kernel tells it without links, and so it is found again.
        path = os.path.join(self._real, file)
        # Written before, so that a start after this process was killed knows where to look.
        with open(os.path.join(self._directory, _NOTE), "a", encoding="utf-8") as note:
            note.write(json.dumps([directory, path.removeprefix(self._disks)]) + "\n")
        options = ",".join(filter(None, (_ALWAYS, _OPTIONS[kind])))
        for driver in _DRIVERS.get(kind, (kind,)):
            ended = run_program(
                ["mount", "-t", driver, "-o", options, path, directory], seconds=MOUNT_SECONDS
            )
            if not ended.code:
                return
            if "unknown filesystem type" not in ended.complaint:
                break
        raise ProgramError(errno.EINVAL, ended.complaint.removeprefix(f"{directory}: "))

    def space(self, file: str, kind: str) -> tuple[int, int, int]:
        """Size, used and free bytes of a filesystem, which is mounted just for this. ProgramError."""
        self.mount(file, kind, self.scratch)
        try:
            ended = run_program(
                ["findmnt", "--json", "--bytes", "--output", "SIZE,USED,AVAIL", "--mountpoint", self.scratch],
                seconds=MOUNT_SECONDS,
            )
            [told] = json.loads(ended.output)["filesystems"]
            return int(told["size"]), int(told["used"]), int(told["avail"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProgramError(errno.EIO, f"findmnt's answer isn't understood: {error!r}") from error
        finally:
            self.unmount(self.scratch, seconds=UNMOUNT_SECONDS)

    def hold(self, directory: str) -> None:
        """Return when nothing is mounted there any more. CommandError if the mount of the VDI ends before."""
        assert self._child is not None
        child = os.pidfd_open(self._child.pid)
        try:
            with open("/proc/self/mountinfo", "rb") as changes:
                waiting = select.poll()
                waiting.register(changes, select.POLLPRI)
                waiting.register(child, select.POLLIN)
                while is_mounted(directory):
                    if any(descriptor == child for descriptor, _ in waiting.poll()):
                        raise CommandError(f"the files of the disk are gone: {self._why()}")
        finally:
            os.close(child)

    def unmount(self, directory: str, *, seconds: float | None = None) -> None:
        """Unmount what `mount` has mounted there, once nobody is in it; in vain after `seconds`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        told = False
        while is_mounted(directory):
            ended = run_program(["umount", directory], seconds=UNMOUNT_SECONDS)
            if ended.code and "busy" not in ended.complaint:
                raise CommandError(ended.complaint)
            if not ended.code or (deadline is not None and time.monotonic() > deadline):
                return
            if not told:
                print_note(
                    f"{directory} is in use by {users_of(directory)}; it is unmounted when they have left it."
                    " Ctrl-C or SIGTERM once more takes it away from them."
                )
            told = True
            time.sleep(_AGAIN_SECONDS)

    def end(self) -> None:
        """Undo everything; what hangs in a filesystem ends with the files under it."""
        if self._child is not None:
            _unmount_filesystems(self._directory)
            self._child.terminate()
            end_process(self._child, _END_SECONDS)
            assert self._child.stdout is not None
            self._child.stdout.close()
        if self._log is not None:
            self._log.close()
        _remove(self._directory)


def users_of(directory: str) -> str:
    """The processes that are in a directory or have files in it open, as far as this user may see them."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        links = [f"/proc/{process}/cwd", f"/proc/{process}/root", f"/proc/{process}/exe"]
        with suppress(OSError):
            links += [f"/proc/{process}/fd/{each}" for each in os.listdir(f"/proc/{process}/fd")]
        for link in links:
            with suppress(OSError):
                if (os.readlink(link) + "/").startswith(directory + "/"):
                    with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as name:
                        found.append(f"{name.read().strip()} ({process})")
                    break
    return ", ".join(found) or "somebody"


def _base() -> str:
    """Where our directories are: nobody else may rename what is in it."""
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return "/run"
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    return own if os.geteuid() and os.path.isdir(own) else tempfile.gettempdir()


def _own_directory() -> tuple[str, int]:
    """A new directory, and the descriptor whose lock says that somebody uses it."""
    while True:
        try:
            directory = tempfile.mkdtemp(prefix=PREFIX, dir=_base())
        except OSError as error:
            raise CommandError(f"there can be no directory in {_base()}: {error.strerror}") from None
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.isdir(directory):
                return directory, lock
        os.close(lock)  # Another start has swept it away in between.


def sweep() -> None:
    """Undo what processes that were killed have left."""
    base = _base()
    for name in os.listdir(base):
        directory = os.path.join(base, name)
        if not name.startswith(PREFIX):
            continue
        with suppress(OSError):
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _unmount_filesystems(directory)
                    _remove(directory)
            finally:
                os.close(lock)


def _unmount_filesystems(directory: str) -> None:
    """Unmount what a note in one of our directories names; out of sight at least, if somebody is in it."""
    for place, file in _noted(directory):
        ours = {os.path.join(directory, "disks") + file, file}
        for mounted in mounts():
            if mounted.directory == place and _behind(mounted.source) in ours:
                try:
                    done = not run_program(["umount", place], seconds=UNMOUNT_SECONDS).code
                except ProgramError:
                    done = False
                if not done:
                    with suppress(ProgramError):
                        run_program(["umount", "--lazy", place], seconds=UNMOUNT_SECONDS)


def _noted(directory: str) -> Iterator[tuple[str, str]]:
    """Where something was to be mounted, and the file in the FUSE mount that it is in."""
    with suppress(FileNotFoundError), open(os.path.join(directory, _NOTE), encoding="utf-8") as note:
        for line in note:
            with suppress(ValueError):  # It was killed while it wrote this line, before it mounted.
                place, file = json.loads(line)
                yield place, file


def _behind(device: str) -> str:
    """The file behind a loop device."""
    try:
        with open(f"/sys/block/{os.path.basename(device)}/loop/backing_file", "rb") as file:
            return os.fsdecode(file.read().rstrip(b"\n"))
    except OSError:
        return ""


def _remove(directory: str) -> None:
    """Remove one of our directories, if nothing is mounted there any more; else the next start does it."""
    disks = os.path.join(directory, "disks")
    if is_mounted(disks):
        command = ["umount", "--lazy", disks] if os.geteuid() == 0 else ["fusermount3", "-u", "-z", disks]
        with suppress(ProgramError):
            run_program(command, seconds=UNMOUNT_SECONDS)
    with suppress(OSError):
        for each in (disks, os.path.join(directory, "filesystem")):
            with suppress(FileNotFoundError):
                os.rmdir(each)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, _NOTE))
        os.rmdir(directory)


@contextmanager
def _terminable() -> "Iterator[None]":
    """SIGTERM and SIGHUP end the block as Ctrl-C does."""

    def end(number: int, _: FrameType | None) -> None:
        raise Terminated(128 + number)

    with _signals({each: end for each in (signal.SIGTERM, signal.SIGHUP) if _is_heard(each)}):
        yield


@contextmanager
def _undisturbed() -> "Iterator[None]":
    """Nothing interrupts the block but SIGKILL; it must not last long."""
    with _signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
        yield


def _is_heard(number: signal.Signals) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


@contextmanager
def _signals(handlers: "Mapping[signal.Signals, Handler]") -> "Iterator[None]":
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
