"""The commands of changed blocks, by which a backup copies only what is new since the last one."""

import base64
from typing import Annotated

from cyclopts import Parameter

from gateway.cli.arguments import Flag
from gateway.cli.connection import GatewayChoice
from gateway.cli.output import print_json
from gateway.cli.vdi import Disk, find_vdi

_BLOCK = 64 << 10


def vdi_enable_cbt(disk: Disk, *, gateway: GatewayChoice | None = None) -> int:
    """Track from now on which blocks of a virtual disk change. It may be in use.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    """
    return _call("VDI.enable_cbt", disk, gateway)


def vdi_disable_cbt(disk: Disk, *, gateway: GatewayChoice | None = None) -> int:
    """Track no more which blocks of a virtual disk change.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    """
    return _call("VDI.disable_cbt", disk, gateway)


def vdi_data_destroy(disk: Disk, *, gateway: GatewayChoice | None = None) -> int:
    """Destroy the data of a snapshot; what has changed on the disk since can still be listed.

    Parameters
    ----------
    disk
        Uuid or name of the snapshot.
    """
    return _call("VDI.data_destroy", disk, gateway)


def vdi_list_changed_blocks(
    older: Annotated[str, Parameter(name=["--vdi-from-uuid", "--from"])],
    newer: Annotated[str, Parameter(name=["--vdi-to-uuid", "--to"])],
    *,
    json: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Print which blocks of 64 KiB may differ between a snapshot and a later one: base64 of one bit each.

    Parameters
    ----------
    older
        Uuid or name of the earlier snapshot; its data may have been destroyed.
    newer
        Uuid or name of the later snapshot, or of the disk itself.
    json
        Print the changed ranges in bytes instead, as a JSON document.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        reference, record = find_vdi(connection, newer)
        bits: str = connection.call("VDI.list_changed_blocks", find_vdi(connection, older)[0], reference)
    if not json:
        print(bits)
        return 0
    size = int(record["virtual_size"])
    ranges = [
        {"offset": start, "length": min(stop, size) - start}
        for start, stop in changed_ranges(base64.b64decode(bits))
    ]
    print_json({"virtual_size": size, "changed": ranges})
    return 0


def changed_ranges(bits: bytes) -> list[tuple[int, int]]:
    """The changed ranges [start, stop) in bytes; neighbours are one. The last may end beyond the disk."""
    ranges: list[tuple[int, int]] = []
    for number, byte in enumerate(bits):
        for bit in range(8) if byte else ():
            if byte & 0x80 >> bit:
                start = (8 * number + bit) * _BLOCK
                if ranges and ranges[-1][1] == start:
                    ranges[-1] = (ranges[-1][0], start + _BLOCK)
                else:
                    ranges.append((start, start + _BLOCK))
    return ranges


def _call(method: str, disk: str, gateway: GatewayChoice | None) -> int:
    with (gateway or GatewayChoice()).connect() as connection:
        connection.call(method, find_vdi(connection, disk)[0])
    return 0
