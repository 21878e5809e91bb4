"""Exit codes when nobody reads the output, or it can't be written: Python by itself would end with 120."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import RunningGateway, clean_environment, program


def gone() -> int:
    """A descriptor that takes no byte: nobody reads it any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def exit_code(
    *arguments: str, stdout: int, stderr: int, environment: dict[str, str] | None = None
) -> tuple[int, bytes | None]:
    try:
        done = subprocess.run(
            [program(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**clean_environment(), **(environment or {})},
            timeout=60,
            check=False,
        )
    finally:
        for descriptor in {stdout, stderr} - {subprocess.PIPE, subprocess.DEVNULL}:
            os.close(descriptor)
    return done.returncode, done.stderr


@pytest.mark.parametrize("much", ["config-show", "--help"])
def test_a_reader_that_has_seen_enough_is_no_failure(much: str) -> None:
    assert exit_code(much, stdout=gone(), stderr=subprocess.PIPE) == (0, b"")


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize("much_or_little", ["config-show", "--version"])
def test_output_that_finds_no_space_is_a_failure_of_one_line(
    much_or_little: str, environment: dict[str, str]
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    code, said = exit_code(much_or_little, stdout=full, stderr=subprocess.PIPE, environment=environment)
    assert (code, said) == (1, b"vdi-gateway: standard output can't be written: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_encoding_lacks_is_escaped(house: RunningGateway, encoding: str) -> None:
    name = "Größe \u65e5\u672c \U0001f4be"
    uuid = house.run("vdi-create", name, "2MiB").stdout.strip()
    environment = {"PYTHONIOENCODING": encoding, "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    for arguments in (["vdi-list"], ["vdi-chain"], ["vdi-list", "--json", f"uuid={uuid}"]):
        done = subprocess.run(
            [program(), *arguments],
            capture_output=True,
            env={**clean_environment(), **environment},
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), done
    assert json.loads(done.stdout.decode(encoding))[0]["name_label"] == name
    assert house.run("vdi-destroy", uuid).returncode == 0


def test_streams_that_are_closed_lead_nowhere() -> None:
    command = f"{program()} config-show <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=clean_environment(), check=False).returncode == 0


def test_nor_do_those_of_what_a_command_starts() -> None:
    script = "import subprocess as s; from gateway.cli import main as m; m._open_closed_streams();"
    script += " raise SystemExit(s.call('cat && echo && echo >&2', shell=True))"
    command = f"{sys.executable} -c {shlex.quote(script)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=clean_environment(), check=False).returncode == 0


def test_a_complaint_that_nobody_reads_keeps_its_exit_code() -> None:
    assert exit_code("vdi-list", "--no-such", stdout=subprocess.DEVNULL, stderr=gone()) == (2, None)


@pytest.fixture
def disk(house: RunningGateway) -> str:
    return house.command("vdi-create", "unread", "4MiB").stdout.strip()


def test_a_transfer_fails_though_nobody_reads_that_it_does(house: RunningGateway, disk: str) -> None:
    arguments = ("vdi-import", disk, "-", "--state-dir", str(house.state_dir), "--progress", "json")
    assert exit_code(*arguments, stdout=subprocess.DEVNULL, stderr=gone()) == (1, None)


def test_a_disk_that_nobody_takes_is_a_failure(house: RunningGateway, disk: str) -> None:
    arguments = ("vdi-export", disk, "-", "--state-dir", str(house.state_dir), "--quiet")
    code, said = exit_code(*arguments, stdout=gone(), stderr=subprocess.PIPE)
    assert (code, said) == (1, b"vdi-gateway vdi-export: stdout: Broken pipe\n")


def test_another_connection_that_breaks_is_a_failure_though_output_is_read() -> None:
    script = """
import sys
from gateway.cli import config, main
def config_show():
    raise BrokenPipeError(32, "Broken pipe")
config.config_show = config_show
sys.exit(main.run(["config-show"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"vdi-gateway config-show: a connection was broken off: Broken pipe; try again\n"
