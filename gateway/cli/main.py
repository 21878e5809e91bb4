"""The `vdi-gateway` command: finds the sub-command, and turns every expected error into one line on stderr.

Exit codes: 0 done, 1 refused or failed, 2 the arguments are wrong, 130 interrupted. The trap: each
sub-command is loaded only when it runs, because a command that asks a running gateway must not load
the gateway itself.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from cyclopts import App, CycloptsError, MissingArgumentError
from cyclopts.help import DefaultFormatter

from gateway.cli.help import ManualFormatter
from gateway.cli.output import CommandError, UsageError

PROGRAM = "vdi-gateway"

COMMANDS = {
    "serve": "gateway.cli.serve:serve",
    "config-show": "gateway.cli.config:config_show",
    "sr-create": "gateway.cli.sr:sr_create",
    "sr-attach": "gateway.cli.sr:sr_attach",
    "vdi-create": "gateway.cli.vdi:vdi_create",
    "vdi-list": "gateway.cli.vdi:vdi_list",
    "task-list": "gateway.cli.task:task_list",
    "vhd-check": "gateway.cli.check:vhd_check",
}


def application() -> App:
    """The command tree; nothing below it is imported yet."""
    app = App(
        name=PROGRAM,
        version=lambda: f"{PROGRAM} {version(PROGRAM)}",
        help="The bytes of XenServer and XCP-ng virtual disks over the doors people already use.",
        help_epilogue=(
            "Commands other than serve, config-show and vhd-check talk to a running gateway: the one on"
            " --state-dir ($VDI_GATEWAY_STATE_DIR, else ./state), or the one at --url."
        ),
        help_format="plaintext",
        help_formatter=DefaultFormatter() if sys.stdout.isatty() else ManualFormatter(),
        print_error=False,
        exit_on_error=False,
        result_action="return_value",
    )
    for position, (name, place) in enumerate(COMMANDS.items()):
        app.command(place, name=name, sort_key=position)
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code."""
    name = f"{PROGRAM} {arguments[0]}" if arguments and arguments[0] in COMMANDS else PROGRAM
    try:
        code = application()(list(arguments))
    except CycloptsError as error:
        return _complain(name, f"{_one_line(error)} Try: {name} --help", 2)
    except UsageError as error:
        return _complain(name, str(error), 2)
    except CommandError as error:
        return _complain(name, str(error), 1)
    except BrokenPipeError:
        # The reader of our output has seen enough (`| head`).
        return 0
    return code if isinstance(code, int) else 0


def _one_line(error: CycloptsError) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MissingArgumentError):
        # "Command "x" parameter --y requires an argument." reads as if --y had been given.
        text = text.replace("requires an argument", "is missing or has no value")
    return text


def _complain(name: str, text: str, code: int) -> int:
    sys.stderr.write(f"{name}: {text}\n")
    return code


def main() -> None:
    """Entry point of the installed script."""
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
