"""`vdi-gateway vhd-check`: looks whether VHD files are sound, and repairs what can be. Needs no gateway."""

import os
from typing import Any

from gateway.cli.arguments import FileName, Flag
from gateway.cli.output import CommandError, print_json
from gateway.images.errors import ImageError
from gateway.images.vhd.check import CheckReport, check_directory, check_vhd, repair_vhd


def vhd_check(
    path: FileName,
    /,
    *,
    repair: Flag = False,
    json: Flag = False,
) -> int:
    """Check a VHD file, or all files of an SR's directory and their chains. Exit code 1 when errors remain.

    Parameters
    ----------
    path
        VHD file, or directory of an SR.
    repair
        Repair what can be repaired without guessing. No VM, host or program may have the file open; one that
        locks it as QEMU and the gateway do is respected.
    json
        Print a JSON document.
    """
    try:
        reports = check_directory(path) if os.path.isdir(path) else (check_vhd(path),)
    except (ImageError, OSError) as error:
        raise CommandError(_failure(path, error)) from None
    failures: list[str] = []
    if repair:
        reports = tuple(_repaired(report, failures) for report in reports)
    if json:
        print_json([_for_json(report) for report in reports])
    else:
        _print(path, reports)
    if failures:
        raise CommandError("; ".join(failures))
    return 1 if any(report.errors for report in reports) else 0


def _repaired(report: CheckReport, failures: list[str]) -> CheckReport:
    """Repair what can be repaired; one file that can't be had doesn't keep the others from it."""
    if not report.repairable:
        return report
    try:
        return repair_vhd(report.path)
    except (ImageError, OSError) as error:
        failures.append(f"not repaired: {_failure(report.path, error)}")
        return report


def _failure(path: str, error: ImageError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or path}: {error.strerror}"
    return str(error)


def _print(path: str, reports: tuple[CheckReport, ...]) -> None:
    problems = [problem for report in reports for problem in report.problems]
    for report in reports:
        for done in report.repaired:
            print(f"repaired: {report.path}: {done}")
    for problem in problems:
        print(problem)
    files = sum(not os.path.isdir(report.path) for report in reports)
    errors = sum(len(report.errors) for report in reports)
    repairable = sum(problem.repairable for problem in problems)
    print(
        f"{path}: {_count(files, 'file')} checked, {_count(errors, 'error')},"
        f" {_count(len(problems) - errors, 'warning')}"
        + (f"; --repair repairs {repairable} of them" if repairable else "")
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _for_json(report: CheckReport) -> dict[str, Any]:
    return {
        "path": report.path,
        "repaired": list(report.repaired),
        "problems": [
            {
                "kind": problem.kind.value,
                "severity": problem.severity.value,
                "path": problem.path,
                "detail": problem.detail,
                "repairable": problem.repairable,
            }
            for problem in report.problems
        ],
    }
