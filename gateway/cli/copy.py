"""`vdi-gateway vdi-copy`: a disk with all its bytes, in another SR or over another disk.

The gateway copies under a task; the command follows it. The trap: a disk that is copied into keeps its name
and its size, so nothing may be asked for that would change them.
"""

from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter

from gateway.cli.arguments import Flag
from gateway.cli.connection import GatewayChoice, check_speakable
from gateway.cli.following import Followed, first_interrupt_waits, made_by
from gateway.cli.output import UsageError
from gateway.cli.progress import Display, Transfer, figures_text
from gateway.cli.sr import find_sr
from gateway.cli.transfers import Progress, form_of
from gateway.cli.vdi import NULL_REF, Disk, find_vdi, print_made


def vdi_copy(
    disk: Disk,
    sr: Annotated[str | None, Parameter(name=["--sr-uuid", "--sr"])] = None,
    *,
    into: Annotated[str | None, Parameter(name=["--into-vdi-uuid", "--into"])] = None,
    name: Annotated[str | None, Parameter(name=["--name-label", "--new-name-label", "--name"])] = None,
    json: Flag = False,
    progress: Progress = "auto",
    quiet: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Copy a virtual disk or snapshot with all its bytes, and print the copy's uuid: all of it, or nothing.

    The copy shares nothing with the disk. Others may read the disk meanwhile, nobody may write to it. Ctrl-C
    cancels the task on the gateway.

    Parameters
    ----------
    disk
        Uuid or name of the disk or snapshot.
    sr
        Uuid or name of the SR for the copy; may be left out when there is only one.
    into
        Uuid or name of a disk whose content is to be replaced, instead of making a new one. It must not be
        smaller; what it has more reads as zeroes afterwards.
    name
        Name of the copy; else it is called like the disk.
    json
        Print a JSON document.
    progress
        What to show on stderr: a bar, a line of JSON each second, or nothing. auto is a bar on a terminal,
        else JSON.
    quiet
        Show nothing but errors.
    """
    if into is not None and name is not None:
        raise UsageError("--name-label: a disk that is copied into keeps its name; leave one of the two out")
    check_speakable(name)  # it is told only when the copy is made
    with (gateway or GatewayChoice()).connect() as connection:
        reference, record = find_vdi(connection, disk)
        target = NULL_REF if into is None else find_vdi(connection, into)[0]
        place = NULL_REF if sr is None and into is not None else find_sr(connection, sr)
        transfer = Transfer("copy", record["uuid"])
        transfer.begin(0, int(record["virtual_size"]))
        figures = partial(figures_text, physical=False)
        with Display(transfer, form_of(progress, quiet=quiet), figures=figures) as display:

            def look(task: dict[str, Any]) -> None:
                transfer.logical = int(float(task["progress"]) * transfer.total)

            arguments = (reference, place, NULL_REF, target)
            copy = Followed(connection, "VDI.copy", arguments, noun="copy", look=look)
            made = made_by(copy.record(display))
            with first_interrupt_waits():  # or the copy would be called like the disk
                if name is not None:
                    connection.call("VDI.set_name_label", made, name)
                transfer.logical = transfer.total
                transfer.physical = int(connection.call("VDI.get_physical_utilisation", made))
        return print_made(connection, made, None, json=json)
