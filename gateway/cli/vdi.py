"""`vdi-gateway vdi-create` and `vdi-list`: virtual disks of a running gateway."""

from typing import Annotated, Any

from cyclopts import Parameter

from gateway.cli.connection import GatewayChoice
from gateway.cli.output import parse_size, print_json, print_note, print_table, size_text
from gateway.cli.sr import find_sr


def vdi_create(
    name: str,
    size: str,
    /,
    *,
    sr: str | None = None,
    description: str = "",
    json: Annotated[bool, Parameter(negative=())] = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Create an empty virtual disk, and print its uuid.

    Parameters
    ----------
    name
        Name of the disk.
    size
        Virtual size, as in 10GiB; rounded up to 2 MiB.
    sr
        Uuid or name of the SR; may be left out when there is only one.
    description
        Description of the disk.
    json
        Print a JSON document.
    """
    wanted = parse_size(size, "SIZE")
    with (gateway or GatewayChoice()).connect() as connection:
        reference = connection.call(
            "VDI.create",
            {
                "name_label": name,
                "name_description": description,
                "SR": find_sr(connection, sr),
                "virtual_size": str(wanted),
                "type": "user",
                "sharable": False,
                "read_only": False,
                "other_config": {},
                "sm_config": {},
            },
        )
        record: dict[str, Any] = connection.call("VDI.get_record", reference)
    given = int(record["virtual_size"])
    if json:
        print_json(
            {"uuid": record["uuid"], "ref": reference, "virtual_size": given, "requested_size": wanted}
        )
        return 0
    print(record["uuid"])
    if given != wanted:
        print_note(f"the size was rounded up from {wanted} to {given} bytes, a multiple of 2 MiB")
    return 0


def vdi_list(
    *,
    sr: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """List the virtual disks of all SRs, by name.

    Parameters
    ----------
    sr
        Uuid or name of an SR: only its disks.
    json
        Print a JSON document.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        only = None if sr is None else find_sr(connection, sr)
        repositories: dict[str, dict[str, Any]] = connection.call("SR.get_all_records")
        disks: dict[str, dict[str, Any]] = connection.call("VDI.get_all_records")
    found = sorted(
        ({"ref": ref, **record} for ref, record in disks.items() if only in (None, record["SR"])),
        key=lambda disk: (disk["name_label"], disk["uuid"]),
    )
    if json:
        print_json([_for_json(disk, repositories) for disk in found])
        return 0
    print_table(
        ("UUID", "Name", "Size", "Stored", "SR", "State"),
        [
            (
                disk["uuid"],
                disk["name_label"],
                size_text(int(disk["virtual_size"])),
                size_text(int(disk["physical_utilisation"])),
                repositories[disk["SR"]]["name_label"] if disk["SR"] in repositories else "",
                ", ".join(_states(disk)),
            )
            for disk in found
        ],
    )
    return 0


def _for_json(disk: dict[str, Any], repositories: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "uuid": disk["uuid"],
        "ref": disk["ref"],
        "name_label": disk["name_label"],
        "virtual_size": int(disk["virtual_size"]),
        "physical_utilisation": int(disk["physical_utilisation"]),
        "sr_uuid": repositories.get(disk["SR"], {}).get("uuid", ""),
        "state": _states(disk),
    }


def _states(disk: dict[str, Any]) -> list[str]:
    """What a person wants to know before using the disk; empty for an ordinary one."""
    states = []
    if disk["missing"]:
        states.append("missing")
    if disk["is_a_snapshot"]:
        states.append("snapshot")
    if disk["read_only"]:
        states.append("read-only")
    if not disk["managed"]:
        states.append("hidden")
    return states + sorted(set(disk["current_operations"].values()))
