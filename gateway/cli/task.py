"""`vdi-gateway task-list`: what a running gateway is doing, and what became of it."""

import sys
import time
from typing import Annotated, Any

from cyclopts import Parameter

from gateway.cli.connection import Connection, GatewayChoice, error_text
from gateway.cli.output import print_json, print_table

WATCH_SECONDS = 1.0


def task_list(
    *,
    watch: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """List tasks, newest first: uploads, downloads and whatever else runs under a task.

    Parameters
    ----------
    watch
        Look again every second until Ctrl-C, and print each task when it has changed.
    json
        Print a JSON document; with --watch one line of JSON for each change.
    """
    with (gateway or GatewayChoice()).connect() as connection:
        if watch:
            _watch(connection, json=json)
        tasks = _tasks(connection)
    if json:
        print_json(tasks)
    else:
        print_table(COLUMNS, [_row(task) for task in tasks])
    return 0


COLUMNS = ("Status", "Progress", "Name", "Created", "Ref", "Error")


def _tasks(connection: Connection) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = connection.call("task.get_all_records")
    tasks = [{"ref": ref, **record} for ref, record in records.items()]
    for task in tasks:
        task["created"] = str(task["created"])
        task["finished"] = str(task["finished"])
    return sorted(tasks, key=lambda task: task["created"], reverse=True)


def _row(task: dict[str, Any]) -> tuple[str, ...]:
    code, *details = task["error_info"] or [""]
    return (
        task["status"],
        f"{float(task['progress']):.0%}",
        task["name_label"],
        task["created"],
        task["ref"],
        error_text(task["name_label"], code, details) if code else "",
    )


def _watch(connection: Connection, *, json: bool) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    if not json:
        print_table(COLUMNS, [])
    while True:
        for task in reversed(_tasks(connection)):
            row = _row(task)
            if seen.get(task["ref"]) == row:
                continue
            seen[task["ref"]] = row
            if json:
                print_json(task, indent=None)
            else:
                sys.stdout.write("\t".join(row) + "\n")
        sys.stdout.flush()
        time.sleep(WATCH_SECONDS)
