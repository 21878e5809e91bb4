"""`vdi-gateway vdi-import` and `vdi-export`: whole disks between a gateway and this machine."""

import contextlib
import os
from typing import Annotated, Literal
from urllib.parse import quote

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag
from gateway.cli.connection import Connection, GatewayChoice, speakable
from gateway.cli.download import Wanted, download
from gateway.cli.export_target import open_target
from gateway.cli.output import CommandError, UsageError, parse_size
from gateway.cli.progress import Display, ProgressForm, Transfer
from gateway.cli.sr import find_sr
from gateway.cli.upload import Source, Upload, format_of, open_source, upload
from gateway.cli.vdi import Disk, find_vdi, print_sent

File = Annotated[FileName, Parameter(name=["--filename", "--file"])]
Progress = Literal["auto", "bar", "json", "none"]


ImageFormat = Literal["auto", "raw", "vhd", "qcow2", "vhdx", "vmdk", "chunked"]


def vdi_import(
    disk: Annotated[str | None, Parameter(name=["--uuid", "--vdi"])] = None,
    file: Annotated[FileName | None, Parameter(name=["--filename", "--file"])] = None,
    *,
    sr: Annotated[str | None, Parameter(name=["--sr-uuid", "--sr"])] = None,
    name: Annotated[str | None, Parameter(name=["--name-label", "--name"])] = None,
    size: str | None = None,
    format: ImageFormat = "auto",  # noqa: A002 - xe's key
    json: Flag = False,
    progress: Progress = "auto",
    quiet: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Replace the content of a virtual disk by a raw disk or an image, or make a disk of it: all, or nothing.

    Holes of a sparse file aren't read. Ctrl-C cancels the task on the gateway; the disk stays as it was.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    file
        File or block device, or - for stdin.
    sr
        Uuid or name of an SR: instead of a disk. A new disk is made there, as large as needed, and its uuid
        printed.
    name
        Name of the new disk; else it is called like the file.
    size
        Bytes that stdin will bring, as in 10GiB. Without it a pipe must bring exactly what the disk has,
        unless --format says that it brings an image. A raw file may be shorter than the disk; the rest of the
        disk then stays as it is.
    format
        auto is a VHD, qcow2, VHDX or VMDK image if the file is one, else a raw disk, and a raw disk from
        stdin; what is known and can't be read, such as gzip, is refused. raw imports a file as it is,
        whatever it looks like. A differencing VHD is written over what the disk has.
    json
        Of a new disk, print a JSON document.
    progress
        What to show on stderr: a bar, a line of JSON each second, or nothing. auto is a bar on a terminal,
        else JSON.
    quiet
        Show nothing but errors.
    """
    if sr is not None and file is None:
        disk, file = None, disk
    if file is None:
        raise UsageError("give the disk, or --sr for a new one, and then the file, or - for stdin")
    if (disk is None) == (sr is None):
        raise UsageError("give either a disk or --sr for a new one")
    if sr is None and (name is not None or json):
        raise UsageError("--name and --json are for a new disk; give --sr instead of the disk")
    wanted = None if size is None else parse_size(size, "--size")
    if wanted == 0:
        raise UsageError("--size: nothing can't be imported; give the bytes that stdin will bring")
    with open_source(file, wanted) as source:
        image = format_of(source) if format == "auto" else format
        if source.size == 0:
            raise CommandError(f"{source.name} is empty; nothing was changed")
        with (gateway or GatewayChoice()).connect() as connection:
            if disk is not None:
                sent = _into_disk(connection, disk, source, image)
            else:
                label = name or (os.path.basename(source.name) if source.seekable else "")
                sent = _into_sr(connection, sr, source, image, label)
            transfer = Transfer("import", sent.what)
            with Display(transfer, form_of(progress, quiet=quiet)) as display:
                if sent.note and not quiet:
                    display.note(sent.note)
                made = upload(connection, sent, display, transfer)
                if source.was_written_to():
                    display.note(
                        f"{source.name} was written to while it was read: the disk may hold some of what was"
                        " there before, and some of what is there now; import it again"
                    )
            if made is not None:
                return print_sent(connection, made, json=json)
    return 0


def _into_disk(connection: Connection, disk: str, source: Source, image: str) -> Upload:
    _, record = find_vdi(connection, disk)
    room, uuid = int(record["virtual_size"]), record["uuid"]
    if image != "raw":
        return Upload(source, source.size, image, f"vdi={uuid}", uuid)
    count = room if source.size is None else source.size
    if count > room:
        raise CommandError(
            f"{source.name} has {count} bytes, the disk {room};"
            f" make the disk larger: vdi-resize {uuid} {count}"
        )
    note = f"{count} of {room} bytes are written; the rest of the disk stays as it is" if count < room else ""
    return Upload(source, count, image, f"vdi={uuid}", uuid, note)


def _into_sr(connection: Connection, sr: str | None, source: Source, image: str, label: str) -> Upload:
    if source.size is None and image in ("raw", "chunked"):
        raise UsageError("--size: a new disk needs it from a pipe; give the bytes that will come")
    query = f"sr_id={find_sr(connection, sr)}&name_label={quote(speakable(label), safe='')}"
    return Upload(source, source.size, image, query, "a new disk", is_new=True)


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
    if named in ("vhd", "qcow2", "vmdk", "vhdx") and chosen != named and image_format != "raw":
        advice = f"give format={named}, or another name" if named in ("vhd", "qcow2") else "give another name"
        raise UsageError(
            f"{file} is named like a {named} image, but {chosen} is what it would be;"
            f" {advice}, or format=raw for a raw disk of that name"
        )
    return chosen


def form_of(progress: Progress, *, quiet: bool) -> ProgressForm:
    """What to show."""
    return ProgressForm.NONE if quiet else ProgressForm(progress)
