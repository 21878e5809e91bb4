import re
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.cli.main import COMMANDS
from tests.conftest import clean_environment, program


def run(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [program(), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean_environment(),
        cwd=cwd,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve",), ["--state-dir"]),
        (("serve", "--state-dir"), ["--state-dir"]),
        (("serve", "--state-dir", "s", "--http", "8080"), ["--http", "'8080'", "127.0.0.1:8080"]),
        (("serve", "--state-dir", "s", "--http", "::1:8080"), ["--http", "[::1]:8080"]),
        (("serve", "--state-dir", "s", "--http", "127.0.0.1:65536"), ["--http", "65536"]),
        (
            ("serve", "--state-dir", "s", "--http", "0.0.0.0:8080"),
            ["--http", "--https 0.0.0.0:8080", "--insecure"],
        ),
        (("serve", "--state-dir", "s", "--http", "[::]:0"), ["--http", "--insecure"]),
        (
            ("serve", "--state-dir", "s", "--http", "no.such.host.invalid:1"),
            ["--http", "no.such.host.invalid"],
        ),
        (
            ("serve", "--state-dir", "s", "--https", "127.0.0.1:0", "--tls-cert", "x.pem"),
            ["--tls-key is missing"],
        ),
        (
            ("serve", "--state-dir", "s", "--https", "127.0.0.1:0", "--tls-key", "x.pem"),
            ["--tls-cert is missing"],
        ),
        (
            (
                "serve",
                "--state-dir",
                "s",
                "--https",
                "127.0.0.1:0",
                "--tls-cert",
                "x.pem",
                "--tls-key",
                "x.pem",
            ),
            ["--tls-cert: x.pem can't be read"],
        ),
        (("serve", "--state-dir", "s", "--log-level", "loud"), ["--log-level", "loud", "debug"]),
        (("serve", "--state-dir", "s", "--port", "1"), ["--port"]),
        (("vdi-create", "disk", "ten"), ["SIZE", "'ten'", "10GiB"]),
        (("vdi-create", "disk", "1.5"), ["SIZE", "'1.5'"]),
        (("vdi-create", "disk"), ["SIZE"]),
        (("vdi-list", "--url", "example"), ["--url", "https://host:8443"]),
        (("vdi-list", "--url", "https://localhost:1"), ["--password-file"]),
        (("vdi-lst",), ["vdi-lst", "vdi-list"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_argument_is_one_line_that_names_it_and_says_what_to_do(
    tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vdi-gateway")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_running_gateway_commands_say_how_to_start_one(tmp_path: Path) -> None:
    (tmp_path / "my disks").mkdir()
    done = run("vdi-list", cwd=tmp_path / "my disks")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert f"vdi-gateway serve --state-dir '{tmp_path}/my disks/state'" in done.stderr


def test_a_current_directory_that_was_removed_is_told(tmp_path: Path) -> None:
    script = f"cd {tmp_path} && mkdir gone && cd gone && rmdir ../gone && {program()} vdi-list"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vdi-gateway vdi-list: the current directory has been removed; change to another one (cd)\n"
    )


def test_a_gateway_that_does_not_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("x\n")
    done = run("vdi-list", "--url", "http://127.0.0.1:1", "--password-file", str(tmp_path / "password"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vdi-gateway vdi-list: no gateway answers at http://127.0.0.1:1: Connection refused; is it running?\n"
    )


@pytest.mark.parametrize(
    "command", [(), ("serve",), ("sr-create",), ("sr-attach",), ("vdi-list",), ("vhd-check",)]
)
def test_help_is_plain_text_without_a_terminal(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert done.stdout.startswith("Usage: vdi-gateway")


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_list_of_commands_says_what_each_does(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    # A name, then its text further in.
    assert re.findall(r"^  ([a-z][a-z-]+)\n      [A-Z]", done.stdout, re.MULTILINE) == list(COMMANDS)
    assert (done.returncode, done.stderr) == (0, "")


def test_attaching_an_sr_warns_of_other_hosts_in_its_help() -> None:
    text = " ".join(run("sr-attach", "--help").stdout.split())
    assert "no XenServer or XCP-ng host may have the SR plugged" in text


def test_the_version_is_told() -> None:
    assert run("--version").stdout == "vdi-gateway 0.1.0\n"


def test_ctrl_c_while_the_command_is_being_loaded_is_one_word() -> None:
    loading = """
import sys
class Slow:
    def find_spec(self, name, *_):
        if name == "cyclopts":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Slow())
sys.argv = ["vdi-gateway", "vdi-list"]
from gateway.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", loading], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
