"""The user- commands and session-list: who may log in, and who has.

The trap: a new password is asked for twice on the terminal or read from a file, never an argument.
"""

import getpass
import sys
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag
from gateway.cli.connection import Connection, GatewayChoice, read_password
from gateway.cli.listing import Column, Shape, print_list
from gateway.cli.output import CommandError, UsageError

Name = Annotated[str, Parameter(name=["--name", "--user-name"])]
Role = Literal["read-only", "vm-operator", "vm-admin", "vm-power-admin", "pool-operator", "pool-admin"]

USER_COLUMNS = (
    Column("name", "Name"),
    Column("role", "Role"),
    Column("disabled", "Disabled", lambda disabled: "yes" if disabled else ""),
    Column("uuid"),
    Column("ref"),
)

SESSION_COLUMNS = (
    Column("uuid", "UUID"),
    Column("auth-user-name", "User"),
    Column("originator", "Program"),
    Column("validation-time", "Since"),
    Column("last-active", "Last active"),
    Column("is-local-superuser"),
)


def user_list(*filters: str, shape: Shape | None = None, gateway: GatewayChoice | None = None) -> int:
    """List the users who may log in, by name.

    Parameters
    ----------
    filters
        FIELD=VALUE: only users with this value, as in role=pool-admin. May be given more than once.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        records: dict[str, dict[str, Any]] = connection.call("user.get_all_records")
    rows = [
        {
            "name": record["short_name"],
            "role": record["role"],
            "disabled": record["disabled"],
            "uuid": record["uuid"],
            "ref": ref,
        }
        for ref, record in records.items()
    ]
    print_list(USER_COLUMNS, sorted(rows, key=lambda row: row["name"]), filters, shape or Shape())
    return 0


def user_add(
    name: Name,
    *,
    role: Role = "read-only",
    new_password_file: FileName | None = None,
    gateway: GatewayChoice | None = None,
) -> int:
    """Make a user who may log in.

    Parameters
    ----------
    name
        Name of the user.
    role
        What the user may do; moving disks takes vm-admin.
    new_password_file
        File whose first line is the user's password; without it the password is asked for.
    """
    password = _new_password(name, new_password_file)
    with (gateway or GatewayChoice()).connect() as connection:
        connection.call("user.create", {"short_name": name, "password": password, "role": role})
    return 0


def user_passwd(
    name: Name, *, new_password_file: FileName | None = None, gateway: GatewayChoice | None = None
) -> int:
    """Give a user another password. Sessions go on.

    Parameters
    ----------
    name
        Name of the user.
    new_password_file
        File whose first line is the new password; without it the password is asked for.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        reference = _find(connection, name)
        connection.call("user.set_password", reference, _new_password(name, new_password_file))
    return 0


def user_disable(
    name: Name,
    *,
    enable: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Let a user in no more; open sessions are refused too.

    Parameters
    ----------
    name
        Name of the user.
    enable
        Let the user in again instead.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        connection.call("user.set_disabled", _find(connection, name), not enable)
    return 0


def session_list(*filters: str, shape: Shape | None = None, gateway: GatewayChoice | None = None) -> int:
    """List who is logged in.

    Parameters
    ----------
    filters
        FIELD=VALUE: only sessions with this value, as in auth-user-name=root. May be given more than once.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        records: dict[str, dict[str, Any]] = connection.call("session.get_all_records")
    rows = [
        {column.name: _plain(record.get(column.name.replace("-", "_"))) for column in SESSION_COLUMNS}
        for record in records.values()
    ]
    print_list(SESSION_COLUMNS, sorted(rows, key=lambda row: row["last-active"]), filters, shape or Shape())
    return 0


def _plain(value: Any) -> Any:
    """Dates of XML-RPC as text."""
    return value if isinstance(value, (bool, str)) else str(value)


def _find(connection: Connection, name: str) -> str:
    records: dict[str, dict[str, Any]] = connection.call("user.get_all_records")
    for ref, record in records.items():
        if record["short_name"] == name:
            return ref
    raise CommandError(f"there is no user {name!r}; user-list shows them")


def _new_password(name: str, path: str | None) -> str:
    if path is not None:
        return read_password(path)
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask for the new password; give --new-password-file")
    try:
        password = getpass.getpass(f"New password of {name}: ")
        again = getpass.getpass("Once more: ")
    except EOFError:
        raise CommandError("no password was given; nothing was changed") from None
    if password != again:
        raise CommandError("the passwords differ; nothing was changed")
    if not password:
        raise CommandError("the password is empty; nothing was changed")
    return password
