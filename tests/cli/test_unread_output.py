"""Exit codes when nobody reads the output, or it can't be written: Python by itself would end with 120."""

import os
import subprocess

from tests.conftest import clean_environment, program


def gone() -> int:
    """A descriptor that takes no byte: nobody reads it any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def exit_code(*arguments: str, stdout: int, stderr: int) -> tuple[int, bytes | None]:
    try:
        done = subprocess.run(
            [program(), *arguments],
            stdout=stdout,
            stderr=stderr,
            env=clean_environment(),
            timeout=60,
            check=False,
        )
    finally:
        for descriptor in {stdout, stderr} - {subprocess.PIPE, subprocess.DEVNULL}:
            os.close(descriptor)
    return done.returncode, done.stderr


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    assert exit_code("config-show", stdout=gone(), stderr=subprocess.PIPE) == (0, b"")


def test_output_that_finds_no_space_is_a_failure_of_one_line() -> None:
    code, said = exit_code("config-show", stdout=os.open("/dev/full", os.O_WRONLY), stderr=subprocess.PIPE)
    assert (code, said) == (1, b"vdi-gateway: standard output can't be written: No space left on device\n")


def test_a_complaint_that_nobody_reads_keeps_its_exit_code() -> None:
    assert exit_code("vdi-list", "--no-such", stdout=subprocess.DEVNULL, stderr=gone()) == (2, None)
