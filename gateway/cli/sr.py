"""The sr- commands: storage repositories of a running gateway."""

import os
import uuid as uuids
from json import loads
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag, Texts
from gateway.cli.connection import Connection, GatewayChoice
from gateway.cli.listing import Column, Row, Shape, print_list
from gateway.cli.output import CommandError, UsageError, print_json, print_note, size_text

Name = Annotated[str | None, Parameter(name=["--name", "--name-label"])]
Location = Annotated[FileName | None, Parameter(name=["--path", "--location"])]
DeviceConfig = Texts
Repository = Annotated[str, Parameter(name=["--uuid", "--sr"])]


def sr_create(
    path: Location = None,
    *,
    name: Name = None,
    description: Annotated[str, Parameter(name=["--description", "--name-description"])] = "",
    type: Literal["file"] = "file",  # noqa: A002 - xe's key
    device_config: DeviceConfig = None,
    json: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Make a new SR in an empty or new directory, attach it, and print its uuid.

    Parameters
    ----------
    path
        Directory, on the machine of the gateway.
    name
        Name of the SR; the last part of PATH when it is left out.
    description
        Description of the SR.
    type
        SR type; file is the only one.
    device_config
        location=PATH says the same as PATH, as in device-config:location=/srv/disks.
    json
        Print a JSON document.
    """
    location = _location(path, device_config)
    with (gateway or GatewayChoice()).connect() as connection:
        reference = connection.call(
            "SR.create",
            this_host(connection),
            {"location": location},
            "0",
            os.path.basename(location) if name is None else name,
            description,
            "file",
            "user",
            False,
            {},
        )
        return _print_sr(connection, reference, json=json)


def sr_attach(
    path: Location = None,
    *,
    writable: Flag = False,
    name: Name = None,
    uuid: str | None = None,
    device_config: DeviceConfig = None,
    json: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Attach a directory that is an SR already, and print its uuid. Read-only unless --writable is given.

    A gateway and a XenServer or XCP-ng host don't see each other's locks. Before you attach an SR with
    --writable, make sure that no XenServer or XCP-ng host may have the SR plugged: unplug its PBD on every
    host, and don't plug it again before this gateway has let go of it. Otherwise disks will be damaged.
    Read-only, nothing at all is written to the directory, and disks that a host writes meanwhile may be
    read half old, half new.

    Parameters
    ----------
    path
        Directory, on the machine of the gateway.
    writable
        Allow uploads, new disks and everything else that changes the SR.
    name
        Name of the SR; the last part of PATH when it is left out.
    uuid
        Uuid of the SR; needed only where the gateway is another machine. When it is left out: what the SR
        says of itself or is known as already, else the last part of PATH if that is a uuid, else a new one.
    device_config
        location=PATH says the same as PATH.
    json
        Print a JSON document.
    """
    location = _location(path, device_config)
    configuration = {"location": location, "writable": "true" if writable else "false"}
    with (gateway or GatewayChoice()).connect() as connection:
        host = this_host(connection)
        wanted = uuid or _uuid_of(location, _uuid_at(connection, host, location))
        known = [ref for ref, sr in connection.call("SR.get_all_records").items() if sr["uuid"] == wanted]
        if known:
            reference = known[0]
            if not _let_go(connection, reference, host, configuration):
                print_note("the SR is attached so already")
                return _print_sr(connection, reference, json=json)
        else:
            label = os.path.basename(location) if name is None else name
            reference = connection.call("SR.introduce", wanted, label, "", "file", "user", False, {})
        try:
            pbd = connection.call(
                "PBD.create",
                {"host": host, "SR": reference, "device_config": configuration, "other_config": {}},
            )
            connection.call("PBD.plug", pbd)
        except CommandError:
            # Whoever corrects the mistake must be able to attach it under the same uuid.
            if not known:
                connection.call("SR.forget", reference)
            raise
        if not connection.call("SR.get_VDIs", reference):
            print_note(f"no disk was found in {location}; is it the directory that the .vhd files are in?")
        return _print_sr(connection, reference, json=json)


def _location(path: str | None, device_config: list[str] | None) -> str:
    for entry in device_config or []:
        key, _, value = entry.partition("=")
        if key != "location" or not value:
            raise UsageError(f"--device-config: {entry!r} is not used here; give location=PATH")
        if path is not None and path != value:
            raise UsageError("PATH and device-config:location differ; give one of them")
        path = value
    if path is None:
        raise UsageError("PATH is missing: the directory of the SR, on the machine of the gateway")
    return os.path.abspath(path)


COLUMNS = (
    Column("uuid", "UUID"),
    Column("name-label", "Name"),
    Column("state", "State"),
    Column("physical-size", "Size", size_text),
    Column("physical-utilisation", "Used", size_text),
    Column("virtual-allocation", "Promised", size_text),
    Column("vdis", "Disks"),
    Column("location", "Path"),
    Column("name-description"),
    Column("type"),
    Column("content-type"),
    Column("shared"),
    Column("ref"),
    Column("allowed-operations"),
    Column("current-operations"),
    Column("other-config"),
    Column("sm-config"),
    Column("tags"),
)


def sr_list(*filters: str, shape: Shape | None = None, gateway: GatewayChoice | None = None) -> int:
    """List SRs, by name: whether they are attached, their space, and their directory.

    Parameters
    ----------
    filters
        FIELD=VALUE: only SRs with this value, as in name-label=disks. May be given more than once.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        rows = sr_rows(connection)
    print_list(COLUMNS, rows, filters, shape or Shape())
    return 0


def sr_rows(connection: Connection) -> list[Row]:
    """All SRs, by name."""
    records: dict[str, dict[str, Any]] = connection.call("SR.get_all_records")
    pbds: dict[str, dict[str, Any]] = connection.call("PBD.get_all_records")
    rows = [
        _row(ref, record, [pbd for pbd in pbds.values() if pbd["SR"] == ref])
        for ref, record in records.items()
    ]
    return sorted(rows, key=lambda row: (row["name-label"], row["uuid"]))


def _row(ref: str, sr: dict[str, Any], pbds: list[dict[str, Any]]) -> Row:
    row = {column.name: sr.get(column.name.replace("-", "_")) for column in COLUMNS}
    attached = [pbd for pbd in pbds if pbd["currently_attached"]]
    writable = any(pbd["device_config"].get("writable") != "false" for pbd in attached)
    row |= {
        "ref": ref,
        "state": ("attached" if writable else "read-only") if attached else "detached",
        "location": next((pbd["device_config"].get("location", "") for pbd in attached or pbds), ""),
        "vdis": len(sr["VDIs"]),
    }
    return row | {
        name: int(sr[name.replace("-", "_")])
        for name in ("physical-size", "physical-utilisation", "virtual-allocation")
    }


def sr_scan(sr: Repository, *, gateway: GatewayChoice | None = None) -> int:
    """Look at the files of an SR again, for what was put there or taken away by others.

    Parameters
    ----------
    sr
        Uuid or name of the SR.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        connection.call("SR.scan", find_sr(connection, sr))
    return 0


def sr_forget(sr: Repository, *, gateway: GatewayChoice | None = None) -> int:
    """Detach an SR and forget it; all its files stay, and sr-attach brings it back.

    Parameters
    ----------
    sr
        Uuid or name of the SR.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        reference = find_sr(connection, sr)
        for ref, pbd in connection.call("PBD.get_all_records").items():
            if pbd["SR"] == reference and pbd["currently_attached"]:
                connection.call("PBD.unplug", ref)
        connection.call("SR.forget", reference)
    return 0


def _let_go(connection: Connection, reference: str, host: str, device_config: dict[str, str]) -> bool:
    """Detaches a known SR, so that it can be attached otherwise; False if it is attached so already."""
    for ref, pbd in connection.call("PBD.get_all_records").items():
        if pbd["SR"] != reference or pbd["host"] != host:
            continue
        # sr-create doesn't say so.
        present = {"writable": "true", **pbd["device_config"]}
        same = all(present.get(key) == value for key, value in device_config.items())
        if pbd["currently_attached"]:
            if same:
                return False
            connection.call("PBD.unplug", ref)
            if present["writable"] != "false" and device_config["writable"] == "false":
                print_note(
                    "the SR was attached writable and is read-only from now on; --writable changes it back"
                )
        connection.call("PBD.destroy", ref)
    return True


def this_host(connection: Connection) -> str:
    """Reference of the host that the gateway is."""
    pools: dict[str, dict[str, Any]] = connection.call("pool.get_all_records")
    host: str = next(iter(pools.values()))["master"]
    return host


def find_sr(connection: Connection, wanted: str | None) -> str:
    """Reference of the SR with this uuid or name (an empty one is refused); of the only one without."""
    if wanted == "":
        raise UsageError("the uuid or name of the SR is empty; sr-list shows the SRs")
    records: dict[str, dict[str, Any]] = connection.call("SR.get_all_records")
    if wanted is None:
        found = list(records)
        if not found:
            raise CommandError("there is no SR yet; make one with sr-create or attach one with sr-attach")
    else:
        found = [ref for ref, record in records.items() if record["uuid"] == wanted]
        found = found or [ref for ref, record in records.items() if record["name_label"] == wanted]
        if not found:
            raise CommandError(f"--sr: there is no SR {wanted!r}; give one of: {_choices(records)}")
    if len(found) > 1:
        raise CommandError(f"there are several SRs; name one with --sr UUID: {_choices(records)}")
    return found[0]


def _choices(records: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{record['uuid']} ({record['name_label']})" for record in records.values()) or "(none)"


def _uuid_at(connection: Connection, host: str, location: str) -> str:
    """The uuid of the SR that the host reaches in this directory already; empty if there is none."""
    for pbd in connection.call("PBD.get_all_records").values():
        if pbd["host"] == host and pbd["device_config"].get("location") == location:
            uuid: str = connection.call("SR.get_uuid", pbd["SR"])
            return uuid
    return ""


def _uuid_of(location: str, known: str) -> str:
    """What the SR says of itself, else what it is known as, for a directory that was never writable here has
    no mark; else the directory's name where that is a uuid, else a new one.
    """
    for found in (_marked_uuid(location), known, os.path.basename(location)):
        try:
            if len(found) == 36:
                return str(uuids.UUID(found))
        except ValueError:
            continue
    return str(uuids.uuid4())


def _marked_uuid(location: str) -> str:
    """The uuid in the SR's marker; empty where there is none, or where only the gateway can read it."""
    try:
        with open(os.path.join(location, ".vdi-gateway", "sr.json"), "rb") as file:
            marker = loads(file.read(65536))
    except (OSError, ValueError):
        return ""
    return str(marker.get("uuid", "")) if isinstance(marker, dict) else ""


def _print_sr(connection: Connection, reference: str, *, json: bool) -> int:
    record: dict[str, Any] = connection.call("SR.get_record", reference)
    if json:
        print_json({"uuid": record["uuid"], "ref": reference, "name_label": record["name_label"]})
    else:
        print(record["uuid"])
    return 0
