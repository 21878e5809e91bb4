"""`vdi-gateway vdi-import` and `vdi-export`: whole disks between a gateway and this machine."""

import contextlib
import os
from typing import Annotated, Literal

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag
from gateway.cli.connection import GatewayChoice
from gateway.cli.download import Wanted, download
from gateway.cli.export_target import open_target
from gateway.cli.output import CommandError, UsageError, parse_size
from gateway.cli.progress import Display, ProgressForm, Transfer
from gateway.cli.upload import open_source, refuse_images, upload
from gateway.cli.vdi import Disk, find_vdi

File = Annotated[FileName, Parameter(name=["--filename", "--file"])]
Progress = Literal["auto", "bar", "json", "none"]


def vdi_import(
    disk: Disk,
    file: File,
    *,
    size: str | None = None,
    format: Literal["raw"] | None = None,  # noqa: A002 - xe's key
    progress: Progress = "auto",
    quiet: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Replace the content of a virtual disk by a raw disk: all of it at once, or nothing.

    Holes of a sparse file aren't read. Ctrl-C cancels the task on the gateway; the disk stays as it was.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    file
        File or block device, or - for stdin.
    size
        Bytes that stdin will bring, as in 10GiB. Without it a pipe must bring exactly what the disk has. A
        file may be shorter than the disk; the rest of the disk then stays as it is.
    format
        raw is the only one; giving it imports a file that looks like another format as it is.
    progress
        What to show on stderr: a bar, a line of JSON each second, or nothing. auto is a bar on a terminal,
        else JSON.
    quiet
        Show nothing but errors.
    """
    wanted = None if size is None else parse_size(size, "--size")
    if wanted == 0:
        raise UsageError("--size: nothing can't be imported; give the bytes that stdin will bring")
    with open_source(file, wanted) as source:
        if format is None:
            refuse_images(source)
        with (gateway or GatewayChoice()).connect() as connection:
            _, record = find_vdi(connection, disk)
            room, uuid = int(record["virtual_size"]), record["uuid"]
            count = room if source.size is None else source.size
            if count == 0:
                raise CommandError(f"{source.name} is empty; nothing was changed")
            if count > room:
                raise CommandError(
                    f"{source.name} has {count} bytes, the disk {room};"
                    f" make the disk larger: vdi-resize {uuid} {count}"
                )
            transfer = Transfer("import", uuid)
            with Display(transfer, form_of(progress, quiet=quiet)) as display:
                if count < room and not quiet:
                    display.note(f"{count} of {room} bytes are written; the rest of the disk stays as it is")
                upload(connection, source, count, display, transfer)
    return 0


def vdi_export(
    disk: Disk,
    file: File,
    *,
    force: Flag = False,
    format: Literal["raw", "vhd", "qcow2"] | None = None,  # noqa: A002 - xe's key
    base: str | None = None,
    progress: Progress = "auto",
    quiet: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Fetch a virtual disk as a file, sparse where the disk has zeroes.

    Until it is whole it is called FILE.part. A broken connection is tried again; when the command ends early,
    the same command goes on where it stopped, unless the disk has changed.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    file
        File or block device, or - for stdout. A block device is overwritten.
    force
        Replace a file that exists.
    format
        raw is what is meant without it; a VHD or a qcow2 image is asked for by name.
    base
        Uuid or name of another disk, usually a snapshot: only what differs from it is fetched, as a VHD or
        qcow2 image that stands on a file with the base's uuid as its name.
    progress
        What to show on stderr: a bar, a line of JSON each second, or nothing. auto is a bar on a terminal,
        else JSON.
    quiet
        Show nothing but errors.
    """
    image_format = _export_format(file, format, base)
    with (gateway or GatewayChoice()).connect() as connection:
        _, record = find_vdi(connection, disk)
        uuid: str = record["uuid"]
        wanted = Wanted(uuid, image_format, None if base is None else find_vdi(connection, base)[1]["uuid"])
        try:
            target = open_target(file, uuid, force=force, image_format=image_format)
        except OSError as error:
            raise CommandError(f"{error.filename or file}: {error.strerror}") from None
        with contextlib.closing(target):
            transfer = Transfer("export", uuid)
            with Display(transfer, form_of(progress, quiet=quiet)) as display:
                if wanted.base is not None and not quiet:
                    display.note(f"it stands on {wanted.base}.{image_format} in the same directory")
                download(connection, wanted, target, display, transfer)
    return 0


def _export_format(file: str, image_format: str | None, base: str | None) -> str:
    """The format, if it goes with the file's name and with a base. Raises UsageError."""
    chosen = image_format or "raw"
    if base is not None and chosen == "raw":
        raise UsageError("base: a raw disk can't stand on another; give format=vhd or format=qcow2, too")
    named = os.path.splitext(file)[1].lower().removeprefix(".")
    if named in ("vhd", "qcow2") and chosen != named and image_format != "raw":
        raise UsageError(
            f"{file} is named like a {named} image, but {chosen} is what it would be;"
            f" give format={named}, or another name, or format=raw for a raw disk of that name"
        )
    return chosen


def form_of(progress: Progress, *, quiet: bool) -> ProgressForm:
    """What to show."""
    return ProgressForm.NONE if quiet else ProgressForm(progress)
