import os
import sys

import pytest

from fuse_mount.programs import PARSER_MEMORY, ProgramError, run_program


def test_a_program_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ProgramError, match="sleep took too long"):
        run_program(["sleep", "600"], seconds=0.05)


def test_a_program_that_says_too_much_is_ended() -> None:
    with pytest.raises(ProgramError, match="yes says too much"):
        run_program(["yes"], seconds=60, most=100_000)


def test_a_program_gets_no_more_memory_than_it_is_given() -> None:
    command = [sys.executable, "-c", f"bytearray({PARSER_MEMORY})"]
    assert run_program(command, seconds=60, memory=2 * PARSER_MEMORY).code == 0
    assert "MemoryError" in run_program(command, seconds=60, memory=PARSER_MEMORY).complaint


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(ProgramError, match="the program no-such-program is missing"):
        run_program(["no-such-program"], seconds=1)


def test_a_program_that_crashes_is_an_error() -> None:
    with pytest.raises(ProgramError, match="sh was ended by signal 11"):
        run_program(["sh", "-c", "kill -SEGV $$"], seconds=60)


def test_what_a_program_leaves_running_is_not_waited_for() -> None:
    ended = run_program(["sh", "-c", "echo said; sleep 600 & echo $!"], seconds=60)
    said, left = ended.output.split()
    os.kill(int(left), 9)
    assert said == b"said"


def test_programs_are_found_beside_the_users_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/games")
    assert run_program(["sfdisk", "--version"], seconds=60).code == 0
