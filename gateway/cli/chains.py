"""The commands of chains: snapshots, clones, reverts, and vdi-chain, which shows what stands on what."""

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from gateway.cli.arguments import Flag
from gateway.cli.connection import Connection, GatewayChoice, check_speakable
from gateway.cli.following import first_interrupt_waits
from gateway.cli.output import one_line, print_json, print_note, size_text
from gateway.cli.sr import find_sr
from gateway.cli.vdi import Disk, find_vdi, print_made


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NewDisk:
    """What a disk that is made of another one is called, and how it is told."""

    name: Annotated[str | None, Parameter(name=["--new-name-label", "--name"])] = None
    """Name of what is made; else it is called like the disk."""

    json: Flag = False
    """Print a JSON document."""


def vdi_snapshot(disk: Disk, *, new: NewDisk | None = None, gateway: GatewayChoice | None = None) -> int:
    """Keep a virtual disk as it is now, and print the snapshot's uuid. Nobody may be writing to it.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    """
    return _fork("VDI.snapshot", disk, new or NewDisk(), gateway)


def vdi_clone(disk: Disk, *, new: NewDisk | None = None, gateway: GatewayChoice | None = None) -> int:
    """Make a writable disk with the bytes of a disk or snapshot, and print its uuid.

    Parameters
    ----------
    disk
        Uuid or name of the disk or snapshot.
    """
    return _fork("VDI.clone", disk, new or NewDisk(), gateway)


def _fork(method: str, disk: str, new: NewDisk, gateway: GatewayChoice | None) -> int:
    check_speakable(new.name)  # it is told only when the disk is made
    with (gateway or GatewayChoice()).connect() as connection:
        reference, _ = find_vdi(connection, disk)
        with first_interrupt_waits():  # or there would be one that is called like the disk, and nobody knows
            made = connection.call(method, reference, {})
            return print_made(connection, made, new.name, json=new.json)


def vdi_revert(
    snapshot: Annotated[str, Parameter(name=["--uuid", "--snapshot-uuid", "--snapshot"])],
    *,
    gateway: GatewayChoice | None = None,
) -> int:
    """Give a virtual disk the bytes and the size of its snapshot. What was written since is gone.

    The snapshot stays. Nobody may be writing to the disk; whoever reads it goes on with what it was.

    Parameters
    ----------
    snapshot
        Uuid or name of the snapshot; it knows of which disk it is.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        connection.call("VDI.revert", find_vdi(connection, snapshot)[0], {})
    return 0


def vdi_chain(
    disk: Annotated[str | None, Parameter(name=["--uuid", "--vdi"])] = None,
    *,
    sr: str | None = None,
    json: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Show which images stand on which: size, stored bytes, depth, who uses them, and what is coalesced.

    Parameters
    ----------
    disk
        Uuid or name of a disk: only the tree that it is in. Without it, all trees.
    sr
        Uuid or name of an SR: only its disks.
    json
        Print a JSON document.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        only = None if sr is None else find_sr(connection, sr)
        wanted = None if disk is None else find_vdi(connection, disk)[1]["uuid"]
        records = _records(connection, only)
        srs = {record["SR"] for record in records.values()}
        states: dict[str, str] = {}
        for each in sorted(srs):
            states |= connection.call("SR.get_coalesce_state", each)
    nodes = trees(records)
    for node in nodes:
        node["coalesce"] = states.pop(node["uuid"], None)
    if wanted is not None:
        root = _root_of(wanted, records)
        nodes = [node for node in nodes if _root_of(node["uuid"], records) == root]
    # What is left is said of a whole SR.
    for uuid, text in sorted(states.items()):
        print_note(f"SR {uuid}: {text}")
    if json:
        print_json(nodes)
        return 0
    for node in nodes:
        words = [size_text(node["virtual_size"]), f"{size_text(node['physical_utilisation'])} stored"]
        words += [f"depth {node['depth']}", *node["state"], *node["held_by"]]
        if node["coalesce"] is not None:
            words.append(node["coalesce"])
        indent = "  " * (node["depth"] - 1)
        print(f"{indent}{node['uuid']}  {one_line(node['name_label']) or '(no name)'}: {', '.join(words)}")
    return 0


def _records(connection: Connection, sr: str | None) -> dict[str, dict[str, Any]]:
    """The records of all disks by uuid, those of one SR if it is given."""
    records: dict[str, dict[str, Any]] = connection.call("VDI.get_all_records")
    return {record["uuid"]: record for record in records.values() if sr in (None, record["SR"])}


def _parent(record: dict[str, Any]) -> str | None:
    uuid: str | None = record["sm_config"].get("vhd-parent")
    return uuid


def trees(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """All nodes, each before its children; last those that stand on each other in a circle."""
    children: dict[str | None, list[str]] = {}
    for uuid in sorted(records, reverse=True):
        parent = _parent(records[uuid])
        children.setdefault(parent if parent in records else None, []).append(uuid)
    nodes = []
    left = [(uuid, 1) for uuid in children.get(None, ())]
    while left:
        uuid, depth = left.pop()
        nodes.append(_node(uuid, records[uuid], depth))
        left += [(child, depth + 1) for child in children.get(uuid, ())]
    shown = {node["uuid"] for node in nodes}
    return nodes + [_node(uuid, records[uuid], 1) for uuid in sorted(records.keys() - shown)]


def _root_of(uuid: str, records: dict[str, dict[str, Any]]) -> str:
    passed = {uuid}
    while (parent := _parent(records[uuid])) is not None and parent in records and parent not in passed:
        passed.add(parent)
        uuid = parent
    return uuid


def _node(uuid: str, record: dict[str, Any], depth: int) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "name_label": record["name_label"],
        "parent": _parent(record),
        "depth": depth,
        "virtual_size": int(record["virtual_size"]),
        "physical_utilisation": int(record["physical_utilisation"]),
        "state": [
            word
            for word, true in (
                ("hidden", not record["managed"]),
                ("snapshot", record["is_a_snapshot"]),
                ("missing", record["missing"]),
            )
            if true
        ],
        "held_by": [
            f"{operation} by {_who(task)}" for task, operation in record["current_operations"].items()
        ],
    }


def _who(task: str) -> str:
    """A task, or the name in the dummy reference of work without one."""
    return task.rpartition("|")[2] if task.startswith("DummyRef:") else f"task {task}"
