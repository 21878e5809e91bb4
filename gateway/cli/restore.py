"""`vdi-gateway vdi-restore`: a disk as vdi-backup kept it, into the gateway or a file; what there is; whether
it is sound.
"""

import os
import resource
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag
from gateway.cli.backup import Directory
from gateway.cli.backup_directory import Generation, Manifest, read_manifest
from gateway.cli.backup_image import BackedUpChain, DamagedError, ImageFile, check_tables
from gateway.cli.connection import GatewayChoice, speakable
from gateway.cli.output import CommandError, UsageError, print_json, print_table, size_text
from gateway.cli.progress import Display, Transfer
from gateway.cli.restore_targets import Place, restore_to_file, restore_to_gateway
from gateway.cli.sr import find_sr
from gateway.cli.transfers import Progress, form_of
from gateway.cli.vdi import find_vdi, print_sent


def vdi_restore(
    directory: Directory,
    *,
    generation: int | None = None,
    sr: Annotated[str | None, Parameter(name=["--sr-uuid", "--sr"])] = None,
    name: Annotated[str | None, Parameter(name=["--name-label", "--name"])] = None,
    disk: Annotated[str | None, Parameter(name=["--vdi", "--uuid"])] = None,
    to: Annotated[FileName | None, Parameter(name=["--to", "--filename"])] = None,
    force: Flag = False,
    list_: Annotated[bool, Parameter(name="--list", negative=())] = False,
    verify: Flag = False,
    json: Flag = False,
    progress: Progress = "auto",
    quiet: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Restore a virtual disk from a directory of vdi-backup: all of it, or nothing.

    Every file is compared with its checksum while it is read, before anything is there to be used. Only --sr
    and --vdi need a gateway, which may be another one.

    Parameters
    ----------
    directory
        Directory with the backups of the disk.
    generation
        Number of the generation; the newest without it.
    sr
        Uuid or name of an SR: a new disk is made there, and its uuid printed.
    name
        Name of the new disk; else it is called as the disk was.
    disk
        Uuid or name of a disk whose content is replaced. What it has more reads as zeroes afterwards.
    to
        File for the raw disk, a block device, or - for stdout.
    force
        Replace a file that exists.
    list_
        Print which generations there are, instead.
    verify
        Compare all files with their checksums, instead; of one generation those that it needs.
    json
        Print a JSON document.
    progress
        What to show on stderr: a bar, a line of JSON each second, or nothing. auto is a bar on a terminal,
        else JSON.
    quiet
        Show nothing but errors.
    """
    given = {"--sr": sr, "--vdi": disk, "--to": to, "--list": list_ or None, "--verify": verify or None}
    wanted = [option for option, value in given.items() if value is not None]
    if len(wanted) != 1:
        text = " and ".join(wanted) or "none of them"
        raise UsageError(f"give one of --sr, --vdi, --to, --list and --verify; you gave {text}")
    if name is not None and sr is None:
        raise UsageError("--name is for a new disk; give --sr, too")
    manifest = read_manifest(directory)
    if list_:
        return _print_list(manifest, json=json)
    if manifest.newest is None:
        raise CommandError(f"{directory} has no backup yet that was finished")
    chain = manifest.chain(manifest.newest.number if generation is None else generation)
    _allow_files(len(chain))
    transfer = Transfer("verify" if verify else "restore", manifest.vdi.uuid)
    display = Display(transfer, form_of(progress, quiet=quiet))
    if verify:
        with display:
            chosen = manifest.generations if generation is None else chain
            _verify(directory, manifest, chosen, transfer)
        return 0
    try:
        if to is not None:
            with display, BackedUpChain(directory, chain) as backed_up:
                restore_to_file(backed_up, to, chain[-1], transfer, force=force)
            return 0
        with (gateway or GatewayChoice()).connect() as connection:
            if disk is None:
                label = manifest.vdi.name_label if name is None else name
                query = f"sr_id={find_sr(connection, sr)}&name_label={quote(speakable(label), safe='')}"
                place = Place(query, "a new disk", is_new=True)
            else:
                uuid = _replaceable(find_vdi(connection, disk)[1], chain[-1])
                place = Place(f"vdi={uuid}", uuid, is_new=False)
            with display, BackedUpChain(directory, chain) as backed_up:
                made = restore_to_gateway(connection, backed_up, place, display, transfer)
            if made is not None:
                return print_sent(connection, made, json=json)
    except OSError as error:
        raise CommandError(f"{error.filename or directory}: {error.strerror or error}") from None
    return 0


def _replaceable(record: dict[str, Any], newest: Generation) -> str:
    """The uuid of the disk whose content is to be replaced. CommandError if it is too small."""
    uuid, room = str(record["uuid"]), int(record["virtual_size"])
    if room < newest.virtual_size:
        raise CommandError(
            f"the disk {uuid} has {room} bytes, generation {newest.number} {newest.virtual_size};"
            f" make the disk larger: vdi-resize {uuid} {newest.virtual_size}"
        )
    return uuid


def _verify(
    directory: str, manifest: Manifest, generations: Sequence[Generation], transfer: Transfer
) -> None:
    """Read all files. CommandError names each that is wrong."""
    snapshots = {each.number: each.snapshot for each in manifest.generations}
    transfer.begin(0, sum(each.file_size for each in generations))

    def taken(count: int) -> None:
        transfer.logical += count
        transfer.physical += count

    problems = []
    for each in generations:
        try:
            with ImageFile(os.path.join(directory, each.file), taken) as image:
                image.check_size(each)
                base = None if each.base is None else snapshots[each.base]
                check_tables(image, image.tables(), each.virtual_size, base)
                image.check(each)
        except DamagedError as damaged:
            problems.append(str(damaged))
        except OSError as error:
            problems.append(f"{each.file}: {error.strerror}")
    if problems:
        raise CommandError("; ".join(problems))


def _print_list(manifest: Manifest, *, json: bool) -> int:
    if json:
        print_json(
            {
                "vdi": msgspec.to_builtins(manifest.vdi),
                "generations": [msgspec.to_builtins(each) for each in manifest.generations],
            }
        )
        return 0
    rows = [
        [
            str(each.number),
            each.time,
            "whole" if each.base is None else f"since {each.base}",
            size_text(each.file_size),
            size_text(each.virtual_size),
            each.file,
        ]
        for each in manifest.generations
    ]
    print_table(["Generation", "Time", "Content", "Size", "Disk", "File"], rows)
    return 0


def _allow_files(count: int) -> None:
    """Let this process have all files of a chain open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
