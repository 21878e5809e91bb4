"""`vdi-gateway host-list` and `status`: the gateways themselves."""

import sys
from typing import Any

from gateway.cli.arguments import Flag
from gateway.cli.connection import Connection, GatewayChoice
from gateway.cli.listing import Column, Shape, print_list
from gateway.cli.output import print_json, print_table, size_text
from gateway.cli.sr import sr_rows, this_host

COLUMNS = (
    Column("uuid", "UUID"),
    Column("name-label", "Name"),
    Column("address", "Address"),
    Column("enabled", "Enabled", lambda enabled: "yes" if enabled else "no"),
    Column("name-description"),
    Column("hostname"),
    Column("ref"),
    Column("software-version"),
    Column("other-config"),
    Column("tags"),
)


def host_list(*filters: str, shape: Shape | None = None, gateway: GatewayChoice | None = None) -> int:
    """List the hosts that the gateway knows: itself, and others to which it sends clients.

    Parameters
    ----------
    filters
        FIELD=VALUE: only hosts with this value. May be given more than once.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        records: dict[str, dict[str, Any]] = connection.call("host.get_all_records")
    rows = [
        {column.name: record.get(column.name.replace("-", "_")) for column in COLUMNS} | {"ref": ref}
        for ref, record in records.items()
    ]
    print_list(COLUMNS, sorted(rows, key=lambda row: row["name-label"]), filters, shape or Shape())
    return 0


def status(*, json: Flag = False, gateway: GatewayChoice | None = None) -> int:
    """Tell whether the gateway answers, what it serves, and what it is doing.

    Parameters
    ----------
    json
        Print a JSON document.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        found = _status(connection)
    if json:
        print_json(found)
        return 0
    for name in ("address", "host", "version", "disks", "stored"):
        text = size_text(found[name]) if name == "stored" else str(found[name])
        sys.stdout.write(f"{name}: {text}\n")
    tasks = ", ".join(f"{count} {state}" for state, count in found["tasks"].items())
    sys.stdout.write(f"tasks: {tasks or 'none'}\n")
    if found["srs"]:
        sys.stdout.write("\n")
        print_table(
            ["SR", "State", "Free", "Path"],
            [
                [sr["name_label"], sr["state"], size_text(max(0, sr["size"] - sr["used"])), sr["location"]]
                for sr in found["srs"]
            ],
        )
    return 0


def _status(connection: Connection) -> dict[str, Any]:
    host: dict[str, Any] = connection.call("host.get_record", this_host(connection))
    disks: dict[str, dict[str, Any]] = connection.call("VDI.get_all_records")
    tasks: dict[str, int] = {}
    for task in connection.call("task.get_all_records").values():
        tasks[task["status"]] = tasks.get(task["status"], 0) + 1
    return {
        "address": connection.door.url,
        "host": host["name_label"],
        "version": host["software_version"].get("product_version", ""),
        "disks": len(disks),
        "stored": sum(int(disk["physical_utilisation"]) for disk in disks.values()),
        "tasks": dict(sorted(tasks.items())),
        "srs": [
            {
                "uuid": sr["uuid"],
                "name_label": sr["name-label"],
                "state": sr["state"],
                "location": sr["location"],
                "size": sr["physical-size"],
                "used": sr["physical-utilisation"],
            }
            for sr in sr_rows(connection)
        ],
    }
