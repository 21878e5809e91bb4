"""The vdi- commands: virtual disks of a running gateway. The transfers are in `transfers`."""

from typing import Annotated, Any

from cyclopts import Parameter

from gateway.cli.arguments import Flag, Texts
from gateway.cli.connection import CallRefusedError, Connection, GatewayChoice
from gateway.cli.following import first_interrupt_waits
from gateway.cli.listing import Column, Row, Shape, print_list
from gateway.cli.output import CommandError, UsageError, parse_size, print_json, print_note, size_text
from gateway.cli.sr import find_sr

NULL_REF = "OpaqueRef:NULL"

Disk = Annotated[str, Parameter(name=["--uuid", "--vdi"])]


def vdi_create(
    name: Annotated[str, Parameter(name=["--name-label", "--name"])],
    size: Annotated[str, Parameter(name=["--virtual-size", "--size"])],
    *,
    sr: Annotated[str | None, Parameter(name=["--sr", "--sr-uuid"])] = None,
    description: Annotated[str, Parameter(name=["--description", "--name-description"])] = "",
    type: str = "user",  # noqa: A002 - xe's key
    sm_config: Texts = None,
    json: Flag = False,
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
    type
        XenAPI's type of the disk.
    sm_config
        KEY=VALUE for the storage, as in sm-config:image-format=raw.
    json
        Print a JSON document.
    """
    wanted = parse_size(size, "SIZE")
    with (gateway or GatewayChoice()).connect() as connection:
        asked = {
            "name_label": name,
            "name_description": description,
            "SR": find_sr(connection, sr),
            "virtual_size": str(wanted),
            "type": type,
            "sharable": False,
            "read_only": False,
            "other_config": {},
            "sm_config": pairs(sm_config or [], "--sm-config"),
        }
        with first_interrupt_waits():  # or there would be a disk that nobody was told of
            reference = connection.call("VDI.create", asked)
            record: dict[str, Any] = connection.call("VDI.get_record", reference)
            uuid, given = record["uuid"], int(record["virtual_size"])
            if json:
                print_json({"uuid": uuid, "ref": reference, "virtual_size": given, "requested_size": wanted})
            else:
                print(uuid)
    if not json:
        _note_rounding(wanted, given)
    return 0


def print_made(connection: Connection, made: str, name: str | None, *, json: bool) -> int:
    """Give a disk that was made of another one its `name`, if there is one, and print its uuid."""
    if name is not None:
        connection.call("VDI.set_name_label", made, name)
    uuid: str = connection.call("VDI.get_uuid", made)
    if json:
        print_json({"uuid": uuid, "ref": made})
    else:
        print(uuid)
    return 0


def print_sent(connection: Connection, uuid: str, *, json: bool) -> int:
    """Print the uuid of a disk that was made of what was sent."""
    if json:
        print_json({"uuid": uuid, "ref": connection.call("VDI.get_by_uuid", uuid)})
    else:
        print(uuid)
    return 0


def _note_rounding(wanted: int, given: int) -> None:
    if given != wanted:
        print_note(f"the size was rounded up from {wanted} to {given} bytes, a multiple of 2 MiB")


COLUMNS = (
    Column("uuid", "UUID"),
    Column("name-label", "Name"),
    Column("virtual-size", "Size", size_text),
    Column("physical-utilisation", "Stored", size_text),
    Column("sr-name-label", "SR"),
    Column("state", "State", ", ".join),
    Column("name-description"),
    Column("sr-uuid"),
    Column("ref"),
    Column("type"),
    Column("sharable"),
    Column("read-only"),
    Column("managed"),
    Column("missing"),
    Column("location"),
    Column("is-a-snapshot"),
    Column("snapshot-of"),
    Column("snapshot-time"),
    Column("allowed-operations"),
    Column("current-operations"),
    Column("other-config"),
    Column("sm-config"),
    Column("tags"),
)


def vdi_list(
    *filters: str,
    sr: str | None = None,
    shape: Shape | None = None,
    gateway: GatewayChoice | None = None,
) -> int:
    """List the virtual disks of all SRs, by name.

    Parameters
    ----------
    filters
        FIELD=VALUE: only disks with this value, as in sr-name-label=disks or managed=true. May be given more
        than once.
    sr
        Uuid or name of an SR: only its disks.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        only = None if sr is None else find_sr(connection, sr)
        repositories: dict[str, dict[str, Any]] = connection.call("SR.get_all_records")
        disks: dict[str, dict[str, Any]] = connection.call("VDI.get_all_records")
    rows = [
        _row(ref, record, repositories, disks)
        for ref, record in disks.items()
        if only in (None, record["SR"])
    ]
    rows.sort(key=lambda row: (row["name-label"], row["uuid"]))
    print_list(COLUMNS, rows, filters, shape or Shape())
    return 0


def _row(
    ref: str, disk: dict[str, Any], repositories: dict[str, dict[str, Any]], disks: dict[str, dict[str, Any]]
) -> Row:
    sr = repositories.get(disk["SR"], {})
    row = {column.name: disk.get(column.name.replace("-", "_")) for column in COLUMNS}
    row |= {
        "ref": ref,
        "virtual-size": int(disk["virtual_size"]),
        "physical-utilisation": int(disk["physical_utilisation"]),
        "sr-uuid": sr.get("uuid", ""),
        "sr-name-label": sr.get("name_label", ""),
        "snapshot-of": disks.get(disk["snapshot_of"], {}).get("uuid", ""),
        "snapshot-time": str(disk["snapshot_time"]),
        "state": _states(disk),
    }
    return row


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


def vdi_destroy(disk: Disk, *, gateway: GatewayChoice | None = None) -> int:
    """Destroy a virtual disk and its image.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        connection.call("VDI.destroy", find_vdi(connection, disk, sole=True)[0])
    return 0


def vdi_unlock(disk: Disk, *, gateway: GatewayChoice | None = None) -> int:
    """Take a virtual disk away from all who hold it over NBD: their requests fail from now on.

    A process that is stopped keeps the disk until it goes on or ends. Uploads and downloads go on.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        connection.call("VDI.force_unlock", find_vdi(connection, disk)[0])
    return 0


def vdi_resize(
    disk: Disk,
    size: Annotated[str, Parameter(name=["--disk-size", "--size"])],
    *,
    gateway: GatewayChoice | None = None,
) -> int:
    """Make a virtual disk larger. Its content stays; what is new reads as zeroes.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    size
        New virtual size, as in 20GiB; rounded up to 2 MiB. It can't be less than the disk has.
    """
    wanted = parse_size(size, "SIZE")
    with (gateway or GatewayChoice()).connect() as connection:
        reference, _ = find_vdi(connection, disk)
        connection.call("VDI.resize", reference, str(wanted))
        given = int(connection.call("VDI.get_virtual_size", reference))
    _note_rounding(wanted, given)
    return 0


def vdi_param_set(
    disk: Disk,
    *,
    name: Annotated[str | None, Parameter(name=["--name-label", "--name"])] = None,
    description: Annotated[str | None, Parameter(name=["--name-description", "--description"])] = None,
    read_only: bool | None = None,
    sharable: bool | None = None,
    tags: str | None = None,
    other_config: Texts = None,
    sm_config: Texts = None,
    xenstore_data: Texts = None,
    gateway: GatewayChoice | None = None,
) -> int:
    """Change what is known about a virtual disk.

    Parameters
    ----------
    disk
        Uuid or name of the disk.
    name
        New name.
    description
        New description.
    read_only
        Whether it may only be read.
    sharable
        Whether several virtual machines may use it.
    tags
        Words for sorting, divided by commas; all that it has from now on.
    other_config
        KEY=VALUE to set, as in other-config:owner=me; an empty value removes the key.
    sm_config
        KEY=VALUE to set, as in sm-config:key=value.
    xenstore_data
        KEY=VALUE to set, as in xenstore-data:key=value.
    """
    plain = {
        "name_label": name,
        "name_description": description,
        "read_only": read_only,
        "sharable": sharable,
        "tags": None if tags is None else [tag.strip() for tag in tags.split(",") if tag.strip()],
    }
    maps = {
        "other_config": pairs(other_config or [], "--other-config"),
        "sm_config": pairs(sm_config or [], "--sm-config"),
        "xenstore_data": pairs(xenstore_data or [], "--xenstore-data"),
    }
    if all(value is None for value in plain.values()) and not any(maps.values()):
        raise UsageError("nothing is to be changed; give a parameter, as in name-label=NAME")
    with (gateway or GatewayChoice()).connect() as connection:
        reference, _ = find_vdi(connection, disk)
        for field, value in plain.items():
            if value is not None:
                connection.call(f"VDI.set_{field}", reference, value)
        for field, entries in maps.items():
            for key, text in entries.items():
                connection.call(f"VDI.remove_from_{field}", reference, key)
                if text:
                    connection.call(f"VDI.add_to_{field}", reference, key, text)
    return 0


def pairs(entries: list[str], argument: str) -> dict[str, str]:
    """A map from `KEY=VALUE` texts. UsageError names `argument`."""
    found: dict[str, str] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise UsageError(f"{argument}: {entry!r} is no KEY=VALUE")
        found[key] = value
    return found


def find_vdi(
    connection: Connection, wanted: str, *, snapshots: bool = True, sole: bool = False
) -> tuple[str, dict[str, Any]]:
    """Reference and record of the disk with this uuid or name. CommandError if there is none, or several.

    A name that a disk shares with snapshots, which are called like their disk at first, is the disk's; with
    `sole` it counts as that of several: what is destroyed doesn't come back. Without `snapshots` a name is
    never that of a snapshot. An empty name is refused: it is what a variable holds that was never set, and a
    disk without a name must not be it.
    """
    if not wanted:
        raise UsageError("the uuid or name of the disk is empty; vdi-list shows the disks")
    # Not all records, of which there may be thousands.
    if reference := _identified(connection, wanted):
        return reference, connection.call("VDI.get_record", reference)
    named: list[str] = connection.call("VDI.get_by_name_label", wanted)
    records: dict[str, dict[str, Any]] = {ref: connection.call("VDI.get_record", ref) for ref in named}
    found = [ref for ref, record in records.items() if sole or not record["is_a_snapshot"]]
    if snapshots and not found:
        found = named
    if not found:
        raise CommandError(f"there is no disk {wanted!r}; vdi-list shows them")
    if len(found) > 1:
        uuids = ", ".join(records[ref]["uuid"] for ref in found)
        raise CommandError(f"several disks are called {wanted!r}; give the uuid of one: {uuids}")
    return found[0], records[found[0]]


def _identified(connection: Connection, wanted: str) -> str | None:
    """The reference of the disk that has this uuid or reference, if there is one."""
    try:
        if wanted.startswith("OpaqueRef:"):
            connection.call("VDI.get_uuid", wanted)
            return wanted
        reference: str = connection.call("VDI.get_by_uuid", wanted)
    except CallRefusedError as refused:
        if refused.code not in ("UUID_INVALID", "HANDLE_INVALID"):
            raise
        return None
    return reference
