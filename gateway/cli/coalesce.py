"""sr-coalesce: has a gateway coalesce an SR, shows how far it is, and pauses it.

The trap: a chain that somebody uses is waited for by the gateway, perhaps for days, and not by this command.
It ends when all else is done, and says for whom the rest waits.
"""

import sys
import time
from contextlib import suppress
from typing import Any, Final

from gateway.cli.arguments import Flag
from gateway.cli.connection import Connection, GatewayChoice, error_text
from gateway.cli.output import CommandError, UsageError, print_json, print_note
from gateway.cli.progress import Display, ProgressForm, Transfer
from gateway.cli.sr import Repository, find_sr

# As in gateway/repository/coalescer.py, which a command must not load.
PAUSED_KEY: Final = "gateway-coalesce-paused"

WAITS: Final = 3
"""The exit code when all is done but what waits for people."""

_POLL_SECONDS: Final = 0.2
_CANCEL_SECONDS: Final = 5.0
_STEPS: Final = 1000
_TASKS: Final = 'field "name__label" = "coalesce"'


def sr_coalesce(
    sr: Repository,
    *,
    pause: Flag = False,
    resume: Flag = False,
    json: Flag = False,
    gateway: GatewayChoice | None = None,
) -> int:
    """Merge what destroyed snapshots have left behind into what it stands on, now.

    A gateway does so by itself, whenever nobody uses a chain, and Ctrl-C here doesn't stop it. Exit code 0
    when nothing is left to merge, 3 when the rest waits for people who use the disks (vdi-chain shows for
    whom), 1 when something failed.

    Parameters
    ----------
    sr
        Uuid or name of the SR.
    pause
        Stop at the next block and merge nothing more in this SR, also after a restart of the gateway.
    resume
        Go on where --pause has stopped.
    json
        Print a JSON document.
    """
    if pause and resume:
        raise UsageError("--pause and --resume say the opposite; give one of them")
    with (gateway or GatewayChoice()).connect() as connection:
        reference = find_sr(connection, sr)
        if pause or resume:
            connection.call("SR.remove_from_other_config", reference, PAUSED_KEY)
            if pause:
                connection.call("SR.add_to_other_config", reference, PAUSED_KEY, "true")
            return 0
        uuid: str = connection.call("SR.get_uuid", reference)
        known = _tasks(connection, uuid)
        asked = connection.call("Async.SR.coalesce", reference)
        try:
            record = _follow(connection, asked, uuid)
        except KeyboardInterrupt:
            _stop_waiting(connection, asked)
            print_note(f"the gateway goes on merging; vdi-gateway sr-coalesce {uuid} --pause would stop it")
            raise
        connection.call("task.destroy", asked)
        tasks = {
            ref: task
            for ref, task in _tasks(connection, uuid).items()
            if known.get(ref, {}).get("status") in (None, "pending")
        }
        left = connection.call("SR.get_coalesce_state", reference)
    if record["status"] != "success":
        raise CommandError(_error(record) or f"the task is {record['status']}")
    return _report(list(tasks.values()), left, json=json)


def _stop_waiting(connection: Connection, asked: str) -> None:
    """End the task of the question. The merges have tasks of their own."""
    # The connection may be in the middle of a call.
    connection.restart(_CANCEL_SECONDS)
    with suppress(CommandError):
        connection.call("task.cancel", asked)
        connection.call("task.destroy", asked)


def _follow(connection: Connection, asked: str, sr_uuid: str) -> dict[str, Any]:
    """Show what is being merged until `asked` has ended; its record."""
    shown: dict[str, Any] = {}
    transfer = Transfer("coalesce", sr_uuid)
    transfer.begin(0, _STEPS)
    form = ProgressForm.BAR if sys.stderr.isatty() else ProgressForm.NONE
    with Display(transfer, form, figures=lambda _: _figures(shown)):
        while True:
            record: dict[str, Any] = connection.call("task.get_record", asked)
            if record["status"] not in ("pending", "cancelling"):
                return record
            for task in _tasks(connection, sr_uuid).values():
                if task["status"] == "pending" and "blocked-by" not in task["other_config"]:
                    shown = task
                    transfer.logical = int(float(task["progress"]) * _STEPS)
            time.sleep(_POLL_SECONDS)


def _figures(task: dict[str, Any]) -> str:
    """What stands beside the bar: the uuids are long, and vdi-chain has them in full."""
    return "{vdi:.8} into {into:.8}".format(**_pair(task)) if task else ""


def _tasks(connection: Connection, sr_uuid: str) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = connection.call("task.get_all_records_where", _TASKS)
    return {ref: task for ref, task in records.items() if task["other_config"].get("SR") == sr_uuid}


def _report(tasks: list[dict[str, Any]], left: dict[str, str], *, json: bool) -> int:
    ended = {
        status: [task for task in tasks if task["status"] == status] for status in ("success", "failure")
    }
    waiting = [task for task in tasks if task["status"] == "pending"]
    code = 1 if ended["failure"] else WAITS if waiting else 0
    if json:
        print_json(
            {
                "merged": [_pair(task) for task in ended["success"]],
                "failed": [_pair(task) | {"error": _error(task)} for task in ended["failure"]],
                "waits": bool(waiting),
                "left": left,
            }
        )
        return code
    for task in ended["success"]:
        pair = _pair(task)
        print(f"merged {pair['vdi']} into {pair['into']}")
    for task in ended["failure"]:
        print_note(f"{task['other_config'].get('VDI')}: {_error(task)}")
    for uuid, text in sorted(left.items()):
        print(f"{uuid} {text}")
    return code


def _pair(task: dict[str, Any]) -> dict[str, str]:
    about = task["other_config"]
    return {"vdi": about.get("VDI", ""), "into": about.get("into", "")}


def _error(task: dict[str, Any]) -> str:
    code, *details = task["error_info"] or [""]
    return error_text(task["name_label"], code, details) if code else ""
