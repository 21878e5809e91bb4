"""Consistency of VHD files: checking one, checking a directory, repairing one.

This is what the command `vhd-check FILE-or-SR-DIRECTORY [--repair]` calls.
"""

from gateway.images.vhd.check_directory import MAX_CHAIN, check_directory
from gateway.images.vhd.check_file import check_vhd
from gateway.images.vhd.problems import CheckReport, Problem, ProblemKind, Severity
from gateway.images.vhd.repair import repair_vhd

__all__ = [
    "MAX_CHAIN",
    "CheckReport",
    "Problem",
    "ProblemKind",
    "Severity",
    "check_directory",
    "check_vhd",
    "repair_vhd",
]
