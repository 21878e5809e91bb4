"""The `vdi-gateway` command: finds the sub-command, and turns every expected error into one line on stderr.

Exit codes: 0 done, 1 refused or failed, 2 the arguments are wrong, 130 interrupted by Ctrl-C. The trap: each
sub-command is loaded only when it runs, because a command that asks a running gateway must not load
the gateway itself. And cyclopts takes its time: it is loaded where a Ctrl-C is expected already.
"""

import gc
import io
import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

from gateway.cli.loading import loading
from gateway.cli.output import CommandError, UsageError, one_line

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

PROGRAM = "vdi-gateway"

COMMANDS = {
    "serve": "gateway.cli.serve:serve",
    "nbd": "gateway.cli.nbd:nbd",
    "mount": "gateway.cli.mount:mount",
    "inspect": "gateway.cli.inspect:inspect",
    "config-show": "gateway.cli.config:config_show",
    "status": "gateway.cli.host:status",
    "sr-list": "gateway.cli.sr:sr_list",
    "sr-create": "gateway.cli.sr:sr_create",
    "sr-attach": "gateway.cli.sr:sr_attach",
    "sr-scan": "gateway.cli.sr:sr_scan",
    "sr-coalesce": "gateway.cli.coalesce:sr_coalesce",
    "sr-forget": "gateway.cli.sr:sr_forget",
    "vdi-list": "gateway.cli.vdi:vdi_list",
    "vdi-create": "gateway.cli.vdi:vdi_create",
    "vdi-import": "gateway.cli.transfers:vdi_import",
    "vdi-export": "gateway.cli.transfers:vdi_export",
    "vdi-deploy": "gateway.cli.deploy:vdi_deploy",
    "vdi-snapshot": "gateway.cli.chains:vdi_snapshot",
    "vdi-clone": "gateway.cli.chains:vdi_clone",
    "vdi-copy": "gateway.cli.copy:vdi_copy",
    "vdi-revert": "gateway.cli.chains:vdi_revert",
    "vdi-chain": "gateway.cli.chains:vdi_chain",
    "vdi-enable-cbt": "gateway.cli.changed_blocks:vdi_enable_cbt",
    "vdi-disable-cbt": "gateway.cli.changed_blocks:vdi_disable_cbt",
    "vdi-list-changed-blocks": "gateway.cli.changed_blocks:vdi_list_changed_blocks",
    "vdi-data-destroy": "gateway.cli.changed_blocks:vdi_data_destroy",
    "vdi-backup": "gateway.cli.backup:vdi_backup",
    "vdi-restore": "gateway.cli.restore:vdi_restore",
    "vdi-resize": "gateway.cli.vdi:vdi_resize",
    "vdi-param-set": "gateway.cli.vdi:vdi_param_set",
    "vdi-unlock": "gateway.cli.vdi:vdi_unlock",
    "vdi-destroy": "gateway.cli.vdi:vdi_destroy",
    "task-list": "gateway.cli.task:task_list",
    "task-watch": "gateway.cli.task:task_watch",
    "task-cancel": "gateway.cli.task:task_cancel",
    "session-list": "gateway.cli.user:session_list",
    "user-list": "gateway.cli.user:user_list",
    "user-add": "gateway.cli.user:user_add",
    "user-passwd": "gateway.cli.user:user_passwd",
    "user-disable": "gateway.cli.user:user_disable",
    "host-list": "gateway.cli.host:host_list",
    "vhd-check": "gateway.cli.check:vhd_check",
    "completion": "gateway.cli.completion:completion",
}


def application(*, loaded: bool = False) -> "App":
    """The command tree; below it nothing is imported yet, unless `loaded`: the list of commands needs it."""
    import pkgutil  # noqa: PLC0415
    from importlib.metadata import version  # noqa: PLC0415

    from cyclopts import App  # noqa: PLC0415
    from cyclopts.help import DefaultFormatter  # noqa: PLC0415

    from gateway.cli.help import ManualFormatter  # noqa: PLC0415

    app = App(
        name=PROGRAM,
        version=lambda: f"{PROGRAM} {version(PROGRAM)}",
        help="The bytes of XenServer and XCP-ng virtual disks over the doors people already use.",
        help_epilogue=(
            "Commands other than serve, nbd, config-show and vhd-check talk to a running gateway: the one on"
            " --state-dir ($VDI_GATEWAY_STATE_DIR, else ./state), or the one at --url."
        ),
        help_format="plaintext",
        help_formatter=DefaultFormatter() if sys.stdout.isatty() else ManualFormatter(),
        print_error=False,
        exit_on_error=False,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for position, (name, place) in enumerate(COMMANDS.items()):
        app.command(pkgutil.resolve_name(place) if loaded else place, name=name, sort_key=position)
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code."""
    with loading():
        from cyclopts import CycloptsError  # noqa: PLC0415

        from gateway.cli.words import translated  # noqa: PLC0415

    name = f"{PROGRAM} {arguments[0]}" if arguments and arguments[0] in COMMANDS else PROGRAM
    try:
        with loading():
            app = application(loaded=list(arguments) in ([], ["--help"], ["-h"]))
            if name != PROGRAM:
                import_module(COMMANDS[arguments[0]].partition(":")[0])
        code = app(translated(app, arguments) if name != PROGRAM else list(arguments))
    except CycloptsError as error:
        return _complain(name, f"{_one_line(error)} Try: {name} --help", 2)
    except UsageError as error:
        return _complain(name, str(error), 2)
    except CommandError as error:
        return _complain(name, str(error), 1)
    except BrokenPipeError as error:
        if _is_open(sys.stdout.fileno()):
            return _complain(name, f"a connection was broken off: {error.strerror}; try again", 1)
        # The reader of our output has seen enough (`| head`).
        return 0
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # the same of `--help`, which rich prints
            return 0
        raise
    except FileNotFoundError:
        if _is_somewhere():
            raise
        return _complain(name, "the current directory has been removed; change to another one (cd)", 1)
    return code if isinstance(code, int) else 0


def _is_somewhere() -> bool:
    """Whether there is a current directory, where relative paths begin."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _is_open(descriptor: int) -> bool:
    """Whether there is somebody still to read what is written there."""
    asked = select.poll()
    asked.register(descriptor, 0)  # errors and hang-ups are told in any case
    return not asked.poll(0)


def _one_line(error: "CycloptsError") -> str:
    from cyclopts import MissingArgumentError  # noqa: PLC0415

    text = " ".join(str(error).split())
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        # "Command "x" parameter --y requires an argument." reads as if --y had been given.
        names = [name for name in error.argument.names if name.startswith("--")]
        position = f" ({error.argument.field_info.name.upper()})" if error.argument.index is not None else ""
        text = f"{' or '.join(names)}{position} is missing or has no value."
    return text


def _complain(name: str, text: str, code: int) -> int:
    with suppress(OSError):  # Nobody reads it any more; the exit code still tells.
        sys.stderr.write(f"{name}: {one_line(text)}\n")
    return code


class OutputError(OSError):
    """Standard output takes no more, as on a full disk."""


class _Output(io.FileIO):
    """Standard output, whose errors are told from those of a command's own files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error


def _open_closed_streams() -> None:
    """What the caller has closed (`>&-`) leads nowhere: else the next file opened, a disk, would be it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the same holds for processes of ours
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _watched(stream: TextIO) -> TextIO:
    """The same stream, whose failing writes are an OutputError; what its encoding lacks is escaped."""
    output: Any = _Output(stream.fileno(), "wb", closefd=False)
    unbuffered = isinstance(stream.buffer, io.RawIOBase)  # PYTHONUNBUFFERED
    buffer = output if unbuffered else io.BufferedWriter(output)
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    return io.TextIOWrapper(
        buffer, stream.encoding, errors, line_buffering=stream.isatty(), write_through=unbuffered
    )


def _written(code: int) -> int:
    """The exit code once all output is out. Python by itself would end with 120 at a lost reader."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            _drop(stream)
            if isinstance(error, OutputError):
                code = _complain(PROGRAM, _unwritten(error), code or 1)
    return code


def _drop(stream: TextIO) -> None:
    """Let what was not written go, and all that comes."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _unwritten(error: OutputError) -> str:
    return f"standard output can't be written: {error.strerror}"


def main() -> None:
    """Entry point of the installed script."""
    _open_closed_streams()
    sys.stdout = _watched(sys.stdout)
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        with suppress(OSError):
            sys.stderr.write("interrupted\n")
        code = 130
    except OutputError as error:
        _drop(sys.stdout)
        code = _complain(PROGRAM, _unwritten(error), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt, and the exit code is to tell
    code = _written(code)
    gc.freeze()  # or the interpreter looks for garbage in all that it leaves anyway
    sys.exit(code)
