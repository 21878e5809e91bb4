"""`vdi-gateway inspect`: what is on a disk, and one filesystem of it mounted to look into.

All of it through the files of `vdi-gateway mount`, which runs for as long as the command does. The trap: to
mount a filesystem is to let the kernel of this machine read what somebody else's machine has written, so
nothing is mounted unless the user asks for it.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag
from gateway.cli.connection import DEFAULT_STATE_DIR, GatewayChoice
from gateway.cli.output import CommandError, UsageError, print_json, print_note, print_table, size_text
from gateway.cli.vdi import Disk, find_vdi
from gateway.state import STATE_DIR_VARIABLE

if TYPE_CHECKING:
    from gateway.cli.inspect_session import Inspection
    from gateway.cli.inspect_volumes import Volume, Volumes

_COLUMNS: Final = ("Partition", "Start", "Size", "Type", "Filesystem", "Label", "UUID", "Used", "Free")
_GRACE_SECONDS: Final = 10.0
_NOT_USED: Final = "what is used isn't known; --used has the kernel mount each filesystem, and tells"
_NOT_ROOT: Final = "what is used can't be told without root, since that takes a loop device"


def inspect(
    disk: Disk,
    *,
    json: Flag = False,
    used: Flag = False,
    mount: FileName | None = None,
    partition: int | None = None,
    state_dir: Annotated[FileName | None, Parameter(env_var=STATE_DIR_VARIABLE)] = None,
    user: str | None = None,
    password_file: FileName | None = None,
    url: Annotated[str | None, Parameter(show=False)] = None,
) -> int:
    """Show the partitions and filesystems of a virtual disk, or mount one of its filesystems.

    It runs on the gateway's machine. The disk is leased for reading meanwhile. Nothing on the disk is
    changed, also not by --mount: no journal is replayed.

    Parameters
    ----------
    disk
        Uuid or name of the disk, or of a snapshot.
    json
        Print a JSON document.
    used
        Tell how much of each filesystem is used. For this the kernel mounts each of them for a moment, which
        takes root, and trust in whoever wrote the disk.
    mount
        An empty directory: mount a filesystem of the disk there, read-only, until Ctrl-C or SIGTERM. It takes
        root.
    partition
        Which partition to mount; may be left out when only one can be.
    state_dir
        State directory of the gateway; ./state by default.
    user
        User to open the disk as; root when it is left out.
    password_file
        File whose first line is the password; the gateway's own user and root need none.
    """
    if url is not None:
        raise UsageError(
            "--url: disks are inspected on the gateway's own machine, from its files; give --state-dir there"
        )
    if mount is None and partition is not None:
        raise UsageError("--partition says what --mount mounts; give --mount DIR as well")
    if mount is not None and (json or used):
        raise UsageError(f"--mount goes without --{'json' if json else 'used'}")
    if mount is not None and os.geteuid() != 0:
        raise CommandError(
            "--mount needs root, since it takes a loop device; without root, other programs can read the"
            " files that vdi-gateway mount shows"
        )
    # The gateway that client.toml names is elsewhere.
    choice = GatewayChoice(state_dir=state_dir or DEFAULT_STATE_DIR, user=user, password_file=password_file)
    with choice.connect() as connection:
        record = find_vdi(connection, disk)[1]

    # Loaded only now: bad arguments answer at once.
    from gateway.cli.inspect_session import inspection, sweep  # noqa: PLC0415
    from gateway.cli.inspect_volumes import read_volumes  # noqa: PLC0415

    sweep()
    directory = None if mount is None else _claimed(mount)
    try:
        with inspection(record["uuid"], _arguments(choice)) as session:
            volumes = read_volumes(session.files, int(record["virtual_size"]))
            if directory is not None:
                return _hold(session, _chosen(volumes, partition), directory)
            spaces, remarks = _spaces(session, volumes) if used else ({}, [])
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise CommandError("the disk is being written, or replaced; vdi-chain tells by whom") from None
        raise CommandError(f"the disk {record['uuid']} can't be read: {error.strerror or error}") from None
    for each in (*volumes.remarks, *remarks):
        print_note(each)
    if json:
        print_json(_document(record, volumes, spaces))
        return 0
    if not used and any(each.filesystem and each.filesystem.mountable for each in volumes.found):
        print_note(_NOT_USED if os.geteuid() == 0 else _NOT_ROOT)
    print_table(_COLUMNS, [_row(each, spaces.get(each.file)) for each in volumes.found])
    return 0


def _arguments(choice: GatewayChoice) -> list[str]:
    assert choice.state_dir is not None
    arguments = ["--state-dir", choice.state_dir]
    if choice.user is not None:
        arguments += ["--user", choice.user]
    if choice.password_file is not None:
        arguments += ["--password-file", choice.password_file]
    return arguments


def _claimed(directory: str) -> str:
    from fuse_mount.mounting import MountRefused, claim  # noqa: PLC0415

    try:
        return claim(directory)
    except MountRefused as refused:
        raise CommandError(str(refused)) from None


@dataclass(frozen=True, slots=True)
class Space:
    """A filesystem in bytes, as df tells it: `free` leaves out what is kept for root."""

    size: int
    used: int
    free: int


def _spaces(session: "Inspection", volumes: "Volumes") -> tuple[dict[str, Space], list[str]]:
    """By the volumes' files, and why it can't be told of some."""
    if os.geteuid() != 0:
        return {}, [_NOT_ROOT]
    spaces = {}
    remarks = []
    for each in volumes.found:
        if each.filesystem is None or not each.filesystem.mountable:
            continue
        try:
            spaces[each.file] = Space(*session.space(each.file, each.filesystem.type))
        except OSError as error:
            remarks.append(f"{_called(each)}: {error.strerror}")
    return spaces, remarks


def _hold(session: "Inspection", volume: "Volume", directory: str) -> int:
    """Mount a filesystem and keep it until a signal comes or somebody unmounts it."""
    from gateway.cli.inspect_session import Terminated  # noqa: PLC0415

    assert volume.filesystem is not None
    kind = volume.filesystem.type
    try:
        session.mount(volume.file, kind, directory)
    except OSError as error:
        raise CommandError(f"{_called(volume)} can't be mounted: {error.strerror}") from None
    words = f"{_called(volume)} is mounted on {directory}, read-only ({kind}); Ctrl-C unmounts it"
    try:
        try:
            print(words, flush=True)
        except OSError as error:
            raise CommandError(f"standard output can't be written: {error.strerror}") from None
        session.hold(directory)
    except KeyboardInterrupt:
        session.unmount(directory)
    except Terminated:
        session.unmount(directory, seconds=_GRACE_SECONDS)
    return 0


def _chosen(volumes: "Volumes", number: int | None) -> "Volume":
    """The one to mount. CommandError says which there are."""
    can = [each for each in volumes.found if each.filesystem is not None and each.filesystem.mountable]
    if number is None and len(can) == 1:
        return can[0]
    there = "; ".join(_described(each) for each in can)
    if not can:
        raise CommandError(
            "there is no filesystem on the disk that could be mounted; inspect without --mount shows it"
        )
    if number is None:
        raise CommandError(f"there are several filesystems; give --partition N for one of: {there}")
    for each in can:
        if each.number == number:
            return each
    raise CommandError(f"partition {number} has no filesystem that could be mounted; there is: {there}")


def _called(volume: "Volume") -> str:
    return "the disk" if volume.number is None else f"partition {volume.number}"


def _described(volume: "Volume") -> str:
    assert volume.filesystem is not None
    words = [volume.filesystem.type, volume.filesystem.label, size_text(volume.size)]
    return f"{_called(volume).removeprefix('partition ')} ({', '.join(filter(None, words))})"


def _row(volume: "Volume", space: Space | None) -> Sequence[str]:
    filesystem = volume.filesystem
    cells = [
        "" if volume.number is None else str(volume.number),
        size_text(volume.start),
        size_text(volume.size),
        volume.type_name,
        filesystem.type if filesystem else "",
        filesystem.label if filesystem else "",
        filesystem.uuid if filesystem else "",
        size_text(space.used) if space else "",
        size_text(space.free) if space else "",
    ]
    return [cell or "-" for cell in cells]


def _document(record: dict[str, Any], volumes: "Volumes", spaces: dict[str, Space]) -> dict[str, Any]:
    found = []
    for each in volumes.found:
        document = asdict(each)
        if each.filesystem is not None:
            document["filesystem"] |= (
                asdict(spaces[each.file]) if each.file in spaces else {"used": None, "free": None}
            )
        found.append(document)
    return {
        "uuid": record["uuid"],
        "name_label": record["name_label"],
        "virtual_size": int(record["virtual_size"]),
        "partition_table": volumes.label or None,
        "sector_size": volumes.sector,
        "volumes": found,
    }
