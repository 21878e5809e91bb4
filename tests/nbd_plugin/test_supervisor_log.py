import errno
import json
from typing import Any

import pytest

from nbd_plugin.failures import RequestFailed
from nbd_plugin.supervisor_log import Log, Told, Tracebacks, masked

REFUSED = """nbdkit: python[1]: error: plugin.py: open: error: Traceback (most recent call last):
   File "plugin.py", line 105, in open
    export = Export(nbdkit.export_name(), parameters)
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
 nbd_plugin.export_name.ExportNameError: the export name is too long
nbdkit: something else"""


def told(text: str) -> list[Told]:
    tracebacks = Tracebacks()
    return [found for line in text.splitlines() if (found := tracebacks.feed(line)) is not None]


def test_of_a_refusal_its_reason_is_told_in_one_line() -> None:
    reason = "nbd_plugin.export_name.ExportNameError: the export name is too long"
    assert told(REFUSED) == [
        Told(f"nbdkit: python[1]: error: plugin.py: open: error: {reason}"),
        Told("nbdkit: something else"),
    ]


def test_of_a_fault_the_whole_traceback_is_told() -> None:
    fault = REFUSED.replace("ExportNameError", "KeyError")
    found, after = told(fault)
    assert found.line.endswith("KeyError: the export name is too long")
    assert (found.level, found.traceback) == ("error", fault.rpartition("\n")[0])
    assert after == Told("nbdkit: something else")


def test_of_storage_that_is_full_the_disk_and_the_remedy_are_told_in_one_line() -> None:
    failed = RequestFailed("1234", OSError(errno.ENOSPC, "No space left on device"))
    reason = "nbd_plugin.export_name.ExportNameError: the export name is too long"
    found, _ = told(REFUSED.replace(reason, f"nbd_plugin.failures.{type(failed).__name__}: {failed}"))
    assert found.line.endswith("the VDI 1234: No space left on device; free space in its storage repository")
    assert (found.level, found.traceback) == ("error", None)


def test_a_lease_that_was_taken_away_is_no_fault() -> None:
    ended = str(OSError(errno.ESHUTDOWN, "the lease has ended: the task was cancelled"))
    name = type(OSError(errno.ESHUTDOWN, "")).__name__
    found = told(
        REFUSED.replace(
            "nbd_plugin.export_name.ExportNameError: the export name is too long", f"{name}: {ended}"
        )
    )
    assert [(each.level, each.traceback) for each in found] == [("info", None)] * 2


@pytest.mark.parametrize("sign", ["=", "%3D", "%3d"])
def test_the_reference_of_a_session_is_masked(sign: str) -> None:
    text = f"no export '/1234?session_id{sign}OpaqueRef:secret&mode=rw'"
    assert masked(text) == f"no export '/1234?session_id{sign}***&mode=rw'"


def test_lines_go_to_the_gateway_and_without_one_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log()
    sent: list[dict[str, Any]] = []

    def send(message: dict[str, Any]) -> bool:
        sent.append(message)
        return len(sent) == 1

    log.link = send
    log.info("one", line="session_id=secret")
    assert capsys.readouterr().err == ""
    log.error("two", process=7)
    assert sent[0] == {"log": {"level": "info", "event": "one", "about": {"line": "session_id=***"}}}
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["process"]) == ("two", "error", 7)


def test_what_nobody_wants_to_read_goes_to_the_gateway_alone(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("warning")
    log.info("one")
    log.warning("two")
    assert json.loads(capsys.readouterr().err)["event"] == "two"
    sent: list[dict[str, Any]] = []

    def send(message: dict[str, Any]) -> bool:
        sent.append(message)
        return True

    log.link = send
    log.info("three")
    assert sent[0]["log"]["event"] == "three"
