"""`vdi-gateway vdi-backup`: the next generation of a disk's backups; only what has changed is fetched."""

from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag
from gateway.cli.backup_directory import BackedUpDisk, backup_directory
from gateway.cli.backup_run import BackupRun, Wish
from gateway.cli.connection import GatewayChoice
from gateway.cli.output import CommandError, UsageError, print_json
from gateway.cli.progress import Display, Transfer
from gateway.cli.transfers import Progress, form_of
from gateway.cli.vdi import Disk, find_vdi

Directory = Annotated[FileName, Parameter(name=["--directory", "--dir"])]


def vdi_backup(
    disk: Disk,
    directory: Directory,
    *,
    full: Flag = False,
    full_if_broken: Flag = False,
    keep: int | None = None,
    json: Flag = False,
    progress: Progress = "auto",
    quiet: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Back a virtual disk up into a directory: the whole disk first, then what has changed each time.

    Prints the number of the generation. Each is a snapshot of the disk as a qcow2 image that QEMU opens;
    the newest snapshot stays. What an interrupted backup has begun, the next one finishes or removes.

    Parameters
    ----------
    disk
        Uuid or name of the disk. Nobody may be writing to it when the snapshot is taken.
    directory
        Directory for the backups of this disk alone; made if it isn't there.
    full
        Begin a new chain with the whole disk.
    full_if_broken
        Begin one if the last generation can't be gone on from, instead of failing.
    keep
        Begin one when the last has so many generations, and remove older chains once there are so many
        generations without them. Without it all are kept.
    json
        Print a JSON document.
    progress
        What to show on stderr: a bar, a line of JSON each second, or nothing. auto is a bar on a terminal,
        else JSON.
    quiet
        Show nothing but errors.
    """
    if keep is not None and keep < 1:
        raise UsageError(f"--keep: {keep} generations are none; give 1 or more")
    with (gateway or GatewayChoice()).connect() as connection:
        reference, record = find_vdi(connection, disk, snapshots=False)
        _check_disk(record)
        known = BackedUpDisk(record["uuid"], record["name_label"])
        with backup_directory(directory, known) as opened:
            transfer = Transfer("backup", known.uuid)
            with Display(transfer, form_of(progress, quiet=quiet)) as display:
                run = BackupRun(connection, reference, opened, display, transfer, quiet=quiet)
                made = run.run(Wish(full, full_if_broken, keep))
    if json:
        print_json([msgspec.to_builtins(generation) for generation in made])
    else:
        print(made[-1].number)
    return 0


def _check_disk(record: dict[str, Any]) -> None:
    if record["is_a_snapshot"]:
        raise CommandError(f"{record['uuid']} is a snapshot; give its disk, or fetch it with vdi-export")
