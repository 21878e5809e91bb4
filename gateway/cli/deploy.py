"""`vdi-gateway vdi-deploy`: a disk made of an image on a web server, and clones of it.

The gateway fetches the image; the command follows it. A clone shares all its bytes with the disk, so it takes
no longer for a large one. The trap: the disk is there before its clones, so what a failure leaves is told.
"""

import itertools
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from gateway.cli.arguments import Flag
from gateway.cli.connection import Connection, GatewayChoice
from gateway.cli.following import Followed, first_interrupt_waits, made_by
from gateway.cli.output import CommandError, UsageError, print_json, size_text
from gateway.cli.progress import Display, Transfer, clock_text
from gateway.cli.sr import find_sr
from gateway.cli.transfers import Progress, form_of

_MOST_CLONES = 1000


def vdi_deploy(
    image: Annotated[str, Parameter(name=["--image-url", "--image"])],
    sr: Annotated[str | None, Parameter(name=["--sr-uuid", "--sr"])] = None,
    *,
    name: Annotated[str | None, Parameter(name=["--name-label", "--new-name-label", "--name"])] = None,
    format: Literal["auto", "raw", "vhd", "qcow2", "vhdx", "vmdk"] = "auto",  # noqa: A002 - xe's key
    checksum: str | None = None,
    checksum_url: str | None = None,
    clones: int = 0,
    fresh: Flag = False,
    json: Flag = False,
    progress: Progress = "auto",
    quiet: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Have the gateway fetch an image from a web server, and print the uuid of the disk made of it.

    All of it, or nothing. An image with a checksum that was fetched into the SR before, and has not been
    written to since, isn't fetched again. Ctrl-C cancels the task on the gateway.

    Parameters
    ----------
    image
        URL of the image, with http or https. What gzip, xz or zstd have compressed is unpacked. Addresses
        that are not public have to be named in the gateway's configuration, by pull.from.
    sr
        Uuid or name of the SR for the disk; may be left out when there is only one.
    name
        Name of the disk; else it is called like the file. Its clones have a number behind it.
    format
        auto is a VHD, qcow2, VHDX or VMDK image if the file is one, else a raw disk.
    checksum
        What the file must have, as it lies there, compressed or not: sha256: or sha512: and the digits.
    checksum_url
        URL of a file with it, as sha256sum writes it.
    clones
        How many clones to make of the disk; each is printed on a line of its own, below the disk.
    fresh
        Fetch the image in any case.
    json
        Print a JSON document.
    progress
        What to show on stderr: a bar, a line of JSON each second, or nothing. auto is a bar on a terminal,
        else JSON.
    quiet
        Show nothing but errors.
    """
    if not image.lower().startswith(("http://", "https://")):
        raise UsageError("--image-url: give a URL with http:// or https://; vdi-import takes files")
    if checksum is not None and checksum_url is not None:
        raise UsageError("--checksum and --checksum-url: give one of them")
    if not 0 <= clones <= _MOST_CLONES:
        raise UsageError(f"--clones: give a number from 0 to {_MOST_CLONES}")
    if checksum is not None and "://" in checksum:
        raise UsageError("--checksum: this is a URL; give it with --checksum-url")
    if checksum_url is not None and "://" not in checksum_url:
        raise UsageError("--checksum-url: give a URL with http:// or https://, or a --checksum")
    with (gateway or GatewayChoice()).connect() as connection:
        # sha256sum prints digits alone; their number says what they are.
        wanted = checksum_url or checksum or ""
        if checksum is not None and ":" not in checksum:
            wanted = f"{'sha512' if len(checksum.strip()) == 128 else 'sha256'}:{checksum}"
        arguments = (image, find_sr(connection, sr), name or "", format, wanted, not fresh)
        transfer = Transfer("deploy", "a new disk")
        transfer.begin(0, 0)
        with Display(transfer, form_of(progress, quiet=quiet), figures=_figures) as display:
            followed = Followed(
                connection,
                "VDI.import_from_url",
                arguments,
                noun="deployment",
                look=lambda task: _look(transfer, task),
            )
            task = followed.record(display)
            _look(transfer, task)
            made = _Disk.of(connection, made_by(task))
            transfer.physical = made.physical
            if task["other_config"].get("reused") == "true" and not quiet:
                display.note(
                    f"the disk {made.uuid} was made of this file before and is used again; --fresh fetches it"
                )
        copies = _clones(connection, made, clones, name)
    if json:
        print_json(
            {
                "uuid": made.uuid,
                "ref": made.ref,
                "reused": task["other_config"].get("reused") == "true",
                "clones": [{"uuid": each.uuid, "ref": each.ref} for each in copies],
            }
        )
    else:
        for each in (made, *copies):
            print(each.uuid)
    return 0


@dataclass(frozen=True)
class _Disk:
    """A disk that was made."""

    ref: str
    uuid: str
    name: str
    physical: int

    @classmethod
    def of(cls, connection: Connection, ref: str) -> "_Disk":
        record = connection.call("VDI.get_record", ref)
        return cls(ref, record["uuid"], record["name_label"], int(record["physical_utilisation"]))


def _clones(connection: Connection, disk: _Disk, count: int, name: str | None) -> list[_Disk]:
    made: list[_Disk] = []
    try:
        for label in _free_names(connection, name or disk.name, count):
            with first_interrupt_waits():
                ref = connection.call("VDI.clone", disk.ref, {})
                made.append(_Disk.of(connection, ref))
                connection.call("VDI.set_name_label", ref, label)
    except (CommandError, KeyboardInterrupt) as error:
        there = ", ".join(each.uuid for each in (disk, *made))
        left = f"{len(made)} of {count} clones were made, these disks stay: {there}"
        if isinstance(error, KeyboardInterrupt):
            with suppress(OSError):
                sys.stderr.write(f"{left}\n")
            raise
        raise CommandError(f"{error}; {left}") from None
    return made


def _free_names(connection: Connection, name: str, count: int) -> list[str]:
    """So many names that no disk has, with the lowest numbers."""
    if not count:
        return []
    taken = {record["name_label"] for record in connection.call("VDI.get_all_records").values()}
    numbered = (f"{name}-{number}" for number in itertools.count(1))
    return list(itertools.islice((each for each in numbered if each not in taken), count))


def _look(transfer: Transfer, task: dict[str, Any]) -> None:
    told = task["other_config"]
    transfer.logical = int(told.get("bytes-pulled", 0))
    transfer.total = int(told.get("bytes-to-pull", 0))


def _figures(transfer: Transfer) -> str:
    """What stands beside the bar: once all has come, the disk is still being written."""
    rate = transfer.rate()
    have = f"{size_text(transfer.logical)} of {size_text(transfer.total)} fetched"
    if transfer.logical >= transfer.total:
        return f"{have} in {clock_text(transfer.elapsed)}"
    left = clock_text((transfer.total - transfer.logical) / rate) if rate else "-:--"
    return f"{have}, {size_text(int(rate))}/s ETA {left}"
