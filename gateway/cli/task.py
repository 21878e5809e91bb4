"""The task- commands: what a running gateway is doing, and what became of it."""

import sys
import time
from typing import Annotated, Any

from cyclopts import Parameter

from gateway.cli.arguments import Flag
from gateway.cli.connection import Connection, GatewayChoice, error_text
from gateway.cli.listing import Column, Shape, print_list
from gateway.cli.output import CommandError, one_line, print_json, print_table
from gateway.cli.progress import Display, ProgressForm, Transfer

WATCH_SECONDS = 1.0
ONE_TASK_SECONDS = 0.2
_STEPS = 1000

COLUMNS = (
    Column("uuid"),
    Column("status", "Status"),
    Column("progress", "Progress", lambda progress: f"{progress:.0%}"),
    Column("name-label", "Name"),
    Column("created", "Created"),
    Column("ref", "Ref"),
    Column("error", "Error"),
    Column("name-description"),
    Column("finished"),
    Column("type"),
    Column("result"),
    Column("error-info"),
    Column("other-config"),
    Column("allowed-operations"),
    Column("resident-on"),
    Column("subtask-of"),
    Column("subtasks"),
)


def task_list(
    *filters: str,
    watch: Flag = False,
    shape: Shape | None = None,
    gateway: GatewayChoice | None = None,
) -> int:
    """List tasks, newest first: uploads, downloads and whatever else runs under a task.

    Parameters
    ----------
    filters
        FIELD=VALUE: only tasks with this value, as in status=pending. May be given more than once.
    watch
        Look again every second until Ctrl-C, and print each task when it has changed; with --json one line of
        JSON for each change.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        if watch:
            _watch(connection, json=shape is not None and shape.json)
        tasks = _tasks(connection)
    print_list(COLUMNS, [_row(task) for task in tasks], filters, shape or Shape())
    return 0


def task_watch(
    task: Annotated[str | None, Parameter(name=["--uuid", "--task"])] = None,
    *,
    json: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Wait until a task has ended, and show how far it is; without a task, print all changes until Ctrl-C.

    Exit code 0 when the task is a success, 1 when it failed or was cancelled.

    Parameters
    ----------
    task
        Uuid or reference of the task.
    json
        Print JSON, one line for each change.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        if task is None:
            _watch(connection, json=json)
            return 0
        record = _wait(connection, _find(connection, task), json=json)
    if record["status"] != "success":
        raise CommandError(_error(record) or f"the task is {record['status']}")
    return 0


def task_cancel(
    task: Annotated[str, Parameter(name=["--uuid", "--task"])], *, gateway: GatewayChoice | None = None
) -> int:
    """Ask a task to stop.

    Parameters
    ----------
    task
        Uuid or reference of the task.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        connection.call("task.cancel", _find(connection, task))
    return 0


def _find(connection: Connection, wanted: str) -> str:
    if wanted.startswith("OpaqueRef:"):
        return wanted
    reference: str = connection.call("task.get_by_uuid", wanted)
    return reference


def _wait(connection: Connection, ref: str, *, json: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    record: dict[str, Any] = {}
    form = ProgressForm.BAR if sys.stderr.isatty() and not json else ProgressForm.NONE
    transfer = Transfer("task", ref)
    transfer.begin(0, _STEPS)
    with Display(transfer, form, figures=lambda _: record.get("name_label", "")):
        while True:
            record = connection.call("task.get_record", ref)
            transfer.logical = int(float(record["progress"]) * _STEPS)
            told = {key: record[key] for key in ("uuid", "name_label", "status", "progress", "error_info")}
            if json and told != shown:
                print_json(told, indent=None)
                sys.stdout.flush()
            shown = told
            if record["status"] not in ("pending", "cancelling"):
                return record
            time.sleep(ONE_TASK_SECONDS)


def _tasks(connection: Connection) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = connection.call("task.get_all_records")
    tasks = [{"ref": ref, **record} for ref, record in records.items()]
    for task in tasks:
        task["created"] = str(task["created"])
        task["finished"] = str(task["finished"])
    return sorted(tasks, key=lambda task: task["created"], reverse=True)


def _row(task: dict[str, Any]) -> dict[str, Any]:
    row = {column.name: task.get(column.name.replace("-", "_")) for column in COLUMNS}
    return row | {"progress": float(task["progress"]), "error": _error(task)}


def _error(task: dict[str, Any]) -> str:
    code, *details = task["error_info"] or [""]
    return error_text(task["name_label"], code, details) if code else ""


def _watch(connection: Connection, *, json: bool) -> None:
    seen: dict[str, dict[str, Any]] = {}
    headed = [column for column in COLUMNS if column.heading]
    if not json:
        print_table([column.heading for column in headed], [])
    while True:
        for task in reversed(_tasks(connection)):
            row = _row(task)
            if seen.get(task["ref"]) == row:
                continue
            seen[task["ref"]] = row
            if json:
                print_json(task, indent=None)
            else:
                cells = [one_line((column.show or str)(row[column.name])) for column in headed]
                sys.stdout.write("\t".join(cells) + "\n")
        sys.stdout.flush()
        time.sleep(WATCH_SECONDS)
