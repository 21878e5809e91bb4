"""`vdi-gateway mount`: builds what fuse_mount needs, and lets it run.

The trap: pyfuse3 and what stands on it are loaded only here, when the command runs: other commands start
without them, also where libfuse isn't installed. With --background the process is forked before anything
runs in it that a fork would break: threads, trio, connections.
"""

import os
import resource
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag, Texts
from gateway.cli.connection import DEFAULT_STATE_DIR, read_password
from gateway.cli.door import Door
from gateway.cli.output import CommandError, UsageError
from gateway.state import ADMINISTRATOR, STATE_DIR_VARIABLE, StateDirectory, StateError

if TYPE_CHECKING:
    from fuse_mount.catalogue import Changes
    from gateway.cli.record_feed import RecordFeed

LOG_FILE: Final = "mount.log"
"""Where a mount in the background logs, in the state directory."""

MOST_DESCRIPTORS: Final = 65536


def mount(
    directory: Annotated[FileName, Parameter(name=["--directory", "--dir"])],
    *,
    writable: Flag = False,
    allow_other: Flag = False,
    only: Texts = None,
    background: Flag = False,
    state_dir: Annotated[FileName | None, Parameter(env_var=STATE_DIR_VARIABLE)] = None,
    user: str | None = None,
    password_file: FileName | None = None,
    url: Annotated[str | None, Parameter(show=False)] = None,
) -> int:
    """Show the virtual disks as files in a directory, until it is unmounted.

    It prints one line when it is mounted, and logs to stderr. Ctrl-C, SIGTERM and `fusermount3 -u DIR`
    unmount it. A disk is leased while a file of it is open. It runs on the gateway's machine, because the
    bytes come from the files of the SRs, and goes on over restarts of the gateway.

    Parameters
    ----------
    directory
        An empty directory. What a mount that crashed has left there is cleaned away.
    writable
        Let disk.raw and partitions be written to, each by one writer alone.
    allow_other
        Let all users look in and read, not only the one who mounts. Unless that is root, it needs
        user_allow_other in /etc/fuse.conf.
    only
        Uuid or name of a disk; this one alone is shown, with its snapshots. May be given more than once.
    background
        Return once it is mounted, and go on without a terminal; the log goes to mount.log in the state
        directory.
    state_dir
        State directory of the gateway; ./state by default.
    user
        User to open disks as; root when it is left out.
    password_file
        File whose first line is the password; the gateway's own user and root need none.
    """
    if url is not None:
        raise UsageError(
            "--url: disks are mounted on the gateway's own machine, from its files; give --state-dir there"
        )
    os.umask(0o077)
    wanted = _Wanted(
        # The process in the background has another working directory.
        directory=os.path.abspath(directory) if background else directory,
        state=StateDirectory(state_dir or DEFAULT_STATE_DIR),
        user=user or ADMINISTRATOR,
        password="" if password_file is None else read_password(password_file),
        writable=writable,
        others=allow_other,
        only=tuple(only or ()),
    )
    if background:
        return _in_background(wanted)
    return _serve(wanted, lambda path: _announce(wanted, path, "Ctrl-C or "))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    directory: str
    state: StateDirectory
    user: str
    password: str = field(repr=False)
    writable: bool
    others: bool
    only: tuple[str, ...]


def _announce(wanted: _Wanted, path: str, how: str) -> None:
    """The one line on stdout."""
    writable = "writable" if wanted.writable else "read-only"
    line = (
        f"the gateway on {wanted.state.path} is mounted on {path}, {writable};"
        f" {how}`fusermount3 -u {shlex.quote(path)}` unmounts it\n"
    )
    # A path may be no UTF-8. That nobody reads the line is no reason to end the mount.
    with suppress(OSError):
        sys.stdout.write(line.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        sys.stdout.flush()


def _serve(wanted: _Wanted, mounted: Callable[[str], None]) -> int:
    """Mount and serve; `mounted` gets the path of the directory once it is there."""
    try:
        import pyfuse3  # noqa: F401, PLC0415
    except ImportError as error:
        raise CommandError(
            f"libfuse can't be used: {error}; scripts/setup installs it, or else the packages fuse3 and"
            " libfuse3-dev, and then pyfuse3 with pip"
        ) from None
    import trio  # noqa: PLC0415

    from fuse_mount import mounting  # noqa: PLC0415
    from fuse_mount.attributes import Access  # noqa: PLC0415
    from fuse_mount.catalogue import Catalogue  # noqa: PLC0415
    from fuse_mount.descriptions import Descriptions  # noqa: PLC0415
    from fuse_mount.disks import Disks, Part  # noqa: PLC0415
    from fuse_mount.operations import VdiOperations  # noqa: PLC0415
    from fuse_mount.partitions import Partitions  # noqa: PLC0415
    from fuse_mount.tree import Tree  # noqa: PLC0415
    from gateway.core import log  # noqa: PLC0415

    log.configure()
    _allow_descriptors()
    try:
        path = mounting.claim(wanted.directory)
        mounting.check_machine(others=wanted.others)
        feed = _feed(wanted)
        try:
            changes = feed.wait()
            tree = Tree(Catalogue(_chosen(wanted.only, changes)))
            tree.apply(changes)
            descriptions = Descriptions(wanted.state.access_socket, lambda: feed.session)
            disks = Disks(wanted.state.access_socket, lambda: feed.session)
            partitions = Partitions(
                lambda vdi: disks.open(vdi, Part.RAW, write=False), descriptions, disks.held
            )
            access = Access(writable=wanted.writable, others=wanted.others)
            operations = VdiOperations(tree, disks, descriptions, partitions, access)
            whole = mounting.Mount(
                path, operations, tree, feed, disks, descriptions, wanted.writable, wanted.others
            )
            return trio.run(mounting.serve, whole, lambda: mounted(path))
        finally:
            feed.close()
    except mounting.MountRefused as refused:
        raise CommandError(str(refused)) from None


def _allow_descriptors() -> None:
    """Each open VDI takes as many as its chain has files, and two; 1,024 is a shell's habit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, MOST_DESCRIPTORS) if hard != resource.RLIM_INFINITY else MOST_DESCRIPTORS
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _feed(wanted: _Wanted) -> "RecordFeed":
    from gateway.cli.record_feed import FeedRefused, RecordFeed  # noqa: PLC0415

    try:
        wanted.state.running()
        door = Door(f"the socket {wanted.state.socket}", path=wanted.state.socket)
        return RecordFeed(door, wanted.user, wanted.password)
    except StateError as error:
        raise CommandError(str(error).removesuffix(" or --url")) from None
    except FeedRefused as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(
            f"the gateway on {wanted.state.path} doesn't answer: {error}; is it running?"
        ) from None


def _chosen(only: tuple[str, ...], changes: "Changes") -> frozenset[str] | None:
    """The uuids of the disks that are named by uuid or name. CommandError for one that isn't there."""
    if not only:
        return None
    disks = [vdi for vdi in changes.vdis.values() if vdi is not None and vdi.managed]
    chosen: set[str] = set()
    for name in only:
        found = [vdi.uuid for vdi in disks if name in (vdi.uuid, vdi.ref)]
        called = {vdi.ref: vdi for vdi in disks if vdi.label == name}
        # A snapshot, which is called like its disk at first, comes with it.
        found = found or [vdi.uuid for vdi in called.values() if vdi.snapshot_of not in called]
        if not found:
            raise CommandError(f"there is no disk {name!r}; vdi-list shows them")
        if len(found) > 1:
            raise CommandError(
                f"several disks are called {name!r}; give the uuid of one: {', '.join(sorted(found))}"
            )
        chosen.update(found)
    return frozenset(chosen)


def _in_background(wanted: _Wanted) -> int:
    """Fork, and return when the other process has mounted or failed. CommandError with its reason."""
    log_file = os.path.join(wanted.state.path, LOG_FILE)
    told, telling = os.pipe()
    if os.fork():
        os.close(telling)
        with open(told, encoding="utf-8", errors="surrogateescape") as answer:
            path, _, reason = answer.read().partition("\0")
        if path:
            _announce(wanted, path, "")
            return 0
        raise CommandError(reason or f"the process ended before it had mounted; see {log_file}")
    os.close(told)
    with open(telling, "w", encoding="utf-8", errors="surrogateescape") as answer:

        def tell(path: str, reason: str = "") -> None:
            try:
                answer.write(f"{path}\0{reason}")
                answer.close()
            except OSError:
                # Whoever waited for it has been interrupted, and doesn't want it any more.
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            _detach(log_file)
            return _serve(wanted, tell)
        except CommandError as error:
            tell("", str(error))
            return 1


def _detach(log_file: str) -> None:
    """No terminal, no session of others, no directory that could not be unmounted; stderr is the log file."""
    try:
        log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if os.geteuid() == 0:
            # So that the gateway's own user can write to it as well.
            owner = os.stat(os.path.dirname(log_file))
            os.fchown(log, owner.st_uid, owner.st_gid)
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CommandError(f"the log file {log_file} can't be written: {error.strerror}") from None
    os.setsid()
    for descriptor, stream in ((nowhere, 0), (nowhere, 1), (log, 2)):
        os.dup2(descriptor, stream)
    os.chdir("/")
