"""A command on a real pseudo-terminal: what it shows is read as it comes, keys are typed."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.conftest import clean_environment, program

SECONDS = 30.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """Runs `vdi-gateway ARGUMENTS`; the terminal is its stdin, stdout, stderr and controlling terminal.

    `command` is the path of another program to run.
    """

    def __init__(
        self, *arguments: str, width: int = 100, state_dir: Path | None = None, command: str | None = None
    ) -> None:
        command = command or program()
        environment = {**clean_environment(), "TERM": "xterm-256color"}
        for name in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "CI"):
            environment.pop(name, None)
        if state_dir is not None:
            environment["VDI_GATEWAY_STATE_DIR"] = str(state_dir)
        self.raw = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
            os.execve(command, [command, *arguments], environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    @property
    def text(self) -> str:
        """All that was shown, without the sequences that move and colour."""
        return _CONTROL.sub("", self.raw).replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, pattern: str) -> "re.Match[str]":
        """Read until the pattern was shown."""
        deadline = time.monotonic() + SECONDS
        while (found := re.search(pattern, self.text)) is None:
            assert self._read(deadline), f"it ended without {pattern!r}:\n{self.text}"
        return found

    def exit_code(self) -> int:
        """Read until the command has ended."""
        deadline = time.monotonic() + SECONDS
        while self._read(deadline):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing came any more after:\n{self.text}"
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)
